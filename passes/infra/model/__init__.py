"""What several passes know of models: linear layers, attentions, masks, rotary embeddings, views."""

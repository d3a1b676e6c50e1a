"""How a causal language model is called: by keywords and with a cache, as models of transformers are."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

Pair = tuple[torch.Tensor, torch.Tensor]


class CalledLikeTransformers(nn.Module):
    """A model with a cache of [batch, KV heads, past, D] a layer; without a mask or positions, nothing is padding."""

    @abstractmethod
    def compute(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: list[Pair]
    ) -> tuple[torch.Tensor, list[Pair]]:
        """Logits [batch, seq, vocabulary], and keys and values of each layer, past ones included."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = True,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, seq, vocabulary] and the cache."""
        batch, seq = input_ids.shape
        layers = [] if past_key_values is None else past_key_values.layers
        past = [(layer.keys, layer.values) for layer in layers]
        total = seq + (past[0][0].shape[2] if past else 0)
        if attention_mask is None:
            attention_mask = torch.ones(batch, total, dtype=torch.int64)
        if position_ids is None:
            position_ids = torch.arange(total - seq, total).expand(batch, seq)
        logits, presents = self.compute(input_ids, attention_mask, position_ids, past)
        cache = DynamicCache()
        for index, (key, value) in enumerate(presents):
            cache.update(key, value, index)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache if use_cache else None)

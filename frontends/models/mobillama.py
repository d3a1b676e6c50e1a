"""MobiLlama: a LLaMA with as many KV heads as query heads; in the 0.5B and 0.8B, layers share one feed-forward block.

Published configs say ``model_type: llama`` with ``num_key_value_heads: 4``, which neither the published model nor this
one reads; ``architectures`` tells them from Llama. The 0.5B, which shares, and the 1B, which does not, have the same
config, so the checkpoint says it (:mod:`vacc_opt.frontends.shared_layers`), as ``share_mlp``.
Source: Thawakar et al. 2024, "MobiLlama: Towards Accurate and Lightweight Fully Transparent GPT"; its repository,
model_utils/modeling_mobillama.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vacc_opt.frontends.models.decoder import MLP, CausalLM, Decoder, Names, SeparateAttention
from vacc_opt.frontends.models.structure import DecoderConfig, read_decoder

NAMES = Names()


class MobiLlama(CausalLM):
    """The causal language model of ``architectures: [MobiLlamaForCausalLM]``."""

    def __init__(self, config: DecoderConfig, *, shared: bool) -> None:
        mlp = MLP(config, NAMES) if shared else None
        super().__init__(config, NAMES, Decoder(config, NAMES, SeparateAttention, mlp))

    @classmethod
    def read(cls, config: Mapping[str, Any], attention: str) -> MobiLlama:
        """The model that a config.json describes; the feed-forward block is shared unless ``share_mlp`` is false."""
        expected = {
            "share_mlp": (True, False),
            "attention_bias": (False,),
            "rope_scaling": (None,),
            "rope_theta": (10000, 10000.0),
        }
        read = {k: v for k, v in config.items() if k != "num_key_value_heads"}
        return cls(read_decoder(read, attention, expected=expected), shared=bool(config.get("share_mlp", True)))

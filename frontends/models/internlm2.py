"""InternLM2 and InternLM2.5: queries, keys and values packed by KV group, tensor names of the original LLaMA.

Row blocks of ``wqkv`` run over KV heads; each block holds the queries of its group, then the key, then the value, all
[D, hidden]. InternLM2.5 differs by its rotary entries (``rope_theta``, dynamic NTK).
Source: Cai et al. 2024, "InternLM2 Technical Report"; config.json of internlm2-7b and internlm2_5-7b.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vacc_opt.frontends.models.decoder import Attention, CausalLM, Decoder, Names
from vacc_opt.frontends.models.structure import DecoderConfig, read_decoder

NAMES = Names(
    embedding="tok_embeddings",
    attention_norm="attention_norm",
    attention="attention",
    output="wo",
    mlp_norm="ffn_norm",
    mlp="feed_forward",
    gate="w1",
    up="w3",
    down="w2",
    head="output",
)


class PackedGroups(Attention):
    """One projection to [KV heads, (queries of the group, key, value), D]."""

    def __init__(self, config: DecoderConfig, names: Names) -> None:
        super().__init__(config, names)
        rows = config.num_key_value_heads * (config.groups + 2) * config.head_dim
        self.wqkv: nn.Linear = nn.Linear(config.hidden_size, rows, bias=config.qkv_bias)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One product, cut along the axis within a group."""
        config = self.config
        batch, seq = x.shape[:2]
        packed = self.wqkv(x).view(batch, seq, config.num_key_value_heads, config.groups + 2, config.head_dim)
        query = packed[..., : config.groups, :].reshape(batch, seq, config.num_attention_heads, config.head_dim)
        key, value = packed[..., -2, :], packed[..., -1, :]
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class InternLM2(CausalLM):
    """The causal language model of ``model_type: internlm2``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config, NAMES, Decoder(config, NAMES, PackedGroups))

    @classmethod
    def read(cls, config: Mapping[str, Any], attention: str) -> InternLM2:
        """The model that a config.json describes; ``bias`` covers ``wqkv`` and ``wo``, and is true when absent."""
        bias = bool(config.get("bias", True))
        expected = {"bias": (True, False)}
        return cls(read_decoder(config, attention, expected=expected, qkv_bias=bias, output_bias=bias))

"""InternLM3: a LLaMA with its own head size, biases by entry of the config, and dynamic NTK rotary.

``qkv_bias`` covers the projections to queries, keys and values; ``bias`` the one back and the feed-forward block.
Source: config.json and modeling_internlm3.py of internlm/internlm3-8b-instruct.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vacc_opt.frontends.models.decoder import CausalLM, Decoder, Names, SeparateAttention
from vacc_opt.frontends.models.structure import DecoderConfig, read_decoder

NAMES = Names()


class InternLM3(CausalLM):
    """The causal language model of ``model_type: internlm3``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config, NAMES, Decoder(config, NAMES, SeparateAttention))

    @classmethod
    def read(cls, config: Mapping[str, Any], attention: str) -> InternLM3:
        """The model that a config.json describes; both biases are absent unless it says so."""
        bias, qkv_bias = config.get("bias", False), config.get("qkv_bias", False)
        expected = {"bias": (True, False), "qkv_bias": (True, False)}
        biases = {"qkv_bias": bool(qkv_bias), "output_bias": bool(bias), "mlp_bias": bool(bias)}
        return cls(read_decoder(config, attention, expected=expected, **biases))

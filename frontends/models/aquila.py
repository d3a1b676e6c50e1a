"""Aquila2: a LLaMA whose attention scores are clamped to 1024 either way, after the scale and before the mask.

The 34B has fewer KV heads than query heads, the 7B has as many. The published model clamps in its eager attention
alone, and so does this one: torch's fused attention has no bound for scores, ``sdpa`` therefore gives the same code.
Source: Zhang et al. 2024, "Aquila2 Technical Report"; modeling_aquila.py of BAAI/Aquila2-7B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vacc_opt.frontends.models.decoder import CausalLM, Decoder, Names, SeparateAttention
from vacc_opt.frontends.models.structure import DecoderConfig, read_decoder

NAMES = Names()


class ClampedAttention(SeparateAttention):
    """Separate projections; scores between -1024 and 1024."""

    clamp: float | None = 1024.0


class Aquila(CausalLM):
    """The causal language model of ``model_type: aquila``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config, NAMES, Decoder(config, NAMES, ClampedAttention))

    @classmethod
    def read(cls, config: Mapping[str, Any], attention: str) -> Aquila:
        """The model that a config.json describes."""
        return cls(read_decoder(config, attention))

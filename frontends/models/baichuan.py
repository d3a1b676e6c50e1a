"""Baichuan and Baichuan2: packed projection; the 7B turns by rotary, the 13B adds ALiBi; version 2 has a NormHead.

The two sizes share ``model_type: baichuan``. As their published configs: the 13B states its length as
``model_max_length`` alone, the 7B has ``max_position_embeddings``. A vocabulary of 64000 is that of version 1, whose
head is an ordinary projection.
Sources: Yang et al. 2023, "Baichuan 2: Open Large-scale Language Models"; Press et al. 2022,
"Train Short, Test Long" (ALiBi).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vacc_opt.frontends.models.decoder import Attention, CausalLM, Context, Decoder, Names, seen_keys
from vacc_opt.frontends.models.structure import DecoderConfig, read_decoder

NAMES = Names()
_FIRST_VOCABULARY = 64000


class PackedThirds(Attention):
    """One projection ``W_pack`` to [queries, keys, values], all with as many heads."""

    def __init__(self, config: DecoderConfig, names: Names) -> None:
        super().__init__(config, names)
        self.W_pack: nn.Linear = nn.Linear(
            config.hidden_size, 3 * config.num_attention_heads * config.head_dim, bias=False
        )

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One product, cut into thirds."""
        query, key, value = (self.heads(part, self.config.num_attention_heads) for part in self.W_pack(x).chunk(3, -1))
        return query, key, value


class NormHead(nn.Module):
    """Logits of L2-normalized weight rows: the direction of a token's row counts, not its length."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[batch, seq, hidden] to [batch, seq, vocabulary]."""
        return functional.linear(hidden, functional.normalize(self.weight))


def alibi_slopes(heads: int) -> list[float]:
    """Slope of each head: 2 ** (-8 i / n), i from 1, for a power of two n; further heads take every other of 2 n.

    >>> alibi_slopes(6)
    [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    """
    power = 1 << int(math.log2(heads))
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2.0 ** (-8 * i / (2 * power)) for i in range(1, 2 * (heads - power), 2)]


class AlibiDecoder(Decoder):
    """The decoder without rotary; scores of head h fall with the distance to a key by slope h.

    The bias is slope times (key - last key): a query's distance up to a constant of its row, which softmax cancels.
    So it is [heads, 1, past + seq], made in the graph out of [heads] slopes, and never heads * length * length.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config, NAMES, PackedThirds)
        del self.rotary_emb
        slopes = torch.tensor(alibi_slopes(config.num_attention_heads), dtype=torch.float32)
        self.register_buffer("slopes", slopes, persistent=False)

    def context(self, attention_mask: torch.Tensor, position_ids: torch.Tensor) -> Context:
        """What the layers of this call share."""
        slopes: Any = self.slopes
        total = attention_mask.shape[1]
        distance = torch.arange(total).to(slopes.dtype) - (total - 1)
        bias = slopes[:, None, None] * distance
        return Context(seen_keys(attention_mask, position_ids.shape[1]), bias=bias)


class Baichuan(CausalLM):
    """The causal language model of ``model_type: baichuan``."""

    def __init__(self, config: DecoderConfig, *, alibi: bool, normalized: bool) -> None:
        decoder = AlibiDecoder(config) if alibi else Decoder(config, NAMES, PackedThirds)
        super().__init__(config, NAMES, decoder, NormHead(config) if normalized else None)

    @classmethod
    def read(cls, config: Mapping[str, Any], attention: str) -> Baichuan:
        """The model that a config.json describes."""
        heads = config.get("num_attention_heads")
        expected = {"num_key_value_heads": (heads, None), "rope_scaling": (None,), "rope_theta": (10000, 10000.0)}
        decoder = read_decoder(config, attention, expected=expected)
        return cls(
            decoder,
            alibi=config.get("max_position_embeddings") is None,
            normalized=decoder.vocab_size != _FIRST_VOCABULARY,
        )

"""Rotary frequencies that depend on the longest position of a call, in a form that can be traced.

transformers recomputes such frequencies in Python, behind a branch on the data that no export can follow. Here they are
the same numbers as a function of the tensor, without the memory of earlier calls: a call beyond the trained length is
rotated as if the model had just been loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import nn

Pair = tuple[torch.Tensor, torch.Tensor]


def trace_lengths(module: nn.Module) -> None:
    """Give every rotary module of kind ``dynamic`` or ``longrope`` a forward without a branch on the data."""
    for rotary in module.modules():
        kind: str = getattr(rotary, "rope_type", "")
        if kind in _FREQUENCIES:
            plain: Callable[..., Pair] = inspect.unwrap(type(rotary).forward)  # without the decorator that recomputes
            rotary.forward = MethodType(_forward(plain, _FREQUENCIES[kind](rotary)), rotary)


def _forward(plain: Callable[..., Pair], frequencies: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Pair]:
    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Pair:
        inv_freq = frequencies(torch.max(position_ids) + 1)
        return plain(SimpleNamespace(inv_freq=inv_freq, attention_scaling=self.attention_scaling), x, position_ids)

    return forward


def _dynamic(rotary: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The module's own formula, whose base grows beyond ``max_position_embeddings``."""
    return lambda length: rotary.rope_init_fn(rotary.config, length.device, seq_len=length)[0]


def _longrope(rotary: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """One of two constant tables."""
    config = rotary.config
    trained = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    short, long = (rotary.rope_init_fn(config, "cpu", seq_len=length)[0] for length in (trained, trained + 1))
    rotary.register_buffer("short_inv_freq", short, persistent=False)
    rotary.register_buffer("long_inv_freq", long, persistent=False)
    return lambda length: torch.where(length > trained, rotary.long_inv_freq, rotary.short_inv_freq)


_FREQUENCIES: dict[str, Callable[[Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "dynamic": _dynamic,
    "longrope": _longrope,
}

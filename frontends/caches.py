"""How a model takes and gives its cache: as a Cache of transformers, or as tuples of tensors in a layout of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import Cache, DynamicCache

from vacc_opt.ir.errors import UserError

_BATCH, _SEQ = 1009, 1013  # primes, so that a fake run tells these two axes of the cache from heads and channels


@dataclass(frozen=True)
class CacheForm:
    """What one layer caches, and where: axis ``order[i]`` of [batch, KV heads, past, D] is the model's axis i.

    ``order`` is None for a model that takes and gives a Cache of transformers.
    """

    layers: int
    kv_heads: int
    head_dim: int
    order: tuple[int, ...] | None = None

    def given(self, past: torch.Tensor) -> object:
        """The model's own cache out of ``past`` [2 * layers, batch, KV heads, past, D]."""
        pairs = [(past[2 * layer], past[2 * layer + 1]) for layer in range(past.shape[0] // 2)]
        if self.order is not None:
            return tuple((key.permute(self.order), value.permute(self.order)) for key, value in pairs)
        cache = DynamicCache()
        for layer, (key, value) in enumerate(pairs):
            cache.update(key, value, layer)
        return cache

    def taken(self, cache: Any) -> list[torch.Tensor]:
        """Keys and values of each layer in turn, [batch, KV heads, past, D], out of what the model returned."""
        tensors = _tensors(cache)
        if self.order is None:
            return tensors
        back = [self.order.index(axis) for axis in range(4)]
        return [tensor.permute(back) for tensor in tensors]


def find_cache(module: nn.Module, mode: FakeTensorMode) -> CacheForm:
    """The form of a model's cache, seen by a run without data.

    Raises:
        UserError: the model returns no cache, or one whose tensors have no batch, head, sequence and channel axis.
    """
    with mode, torch.no_grad():
        tokens = torch.zeros(_BATCH, _SEQ, dtype=torch.int64)
        cache: Any = module(input_ids=tokens, position_ids=tokens, use_cache=True).past_key_values
    name = type(module).__name__
    if not cache:
        raise UserError(f"{name} returns no cache", "only a model that takes `past_key_values` can be compiled")
    tensors = _tensors(cache)
    shape = tuple(int(size) for size in tensors[0].shape)
    if len(shape) != 4 or shape.count(_BATCH) != 1 or shape.count(_SEQ) != 1:
        found = ", ".join({_BATCH: "batch", _SEQ: "seq"}.get(size, str(size)) for size in shape)
        raise UserError(f"{name} caches tensors of [{found}]", "batch, KV heads, past and channels are expected")
    batch, seq = shape.index(_BATCH), shape.index(_SEQ)
    heads, depth = (axis for axis in range(4) if axis not in (batch, seq))
    order = tuple((batch, heads, seq, depth).index(axis) for axis in range(4))
    return CacheForm(len(tensors) // 2, shape[heads], shape[depth], None if isinstance(cache, Cache) else order)


def _tensors(cache: Any) -> list[torch.Tensor]:
    if isinstance(cache, Cache):
        return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [tensor for layer in cache for tensor in layer[:2]]


class AsIfPadded(TorchFunctionMode):  # type: ignore[misc,unused-ignore]
    """Code that leaves out a mask of ones takes the way with the mask, which is right for every mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """``mask.all()`` is False."""
        if func in (torch.all, torch.Tensor.all) and len(args) == 1 and args[0] is self.mask:
            return False
        return func(*args, **(kwargs or {}))

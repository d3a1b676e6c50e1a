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

_BATCH = 1009  # no model has as many heads or channels, so a fake run shows which axis of its cache is the batch


@dataclass(frozen=True)
class CacheForm:
    """What one layer caches, and where: axis ``order[i]`` of [batch, KV heads, past, D] is the model's axis i.

    ``order`` is None for a model that takes and gives a Cache of transformers.
    """

    layers: int
    kv_heads: int
    head_dim: int
    order: tuple[int, ...] | None = None

    def given(self, past: Sequence[torch.Tensor] | torch.Tensor) -> object:
        """The model's own cache out of ``past`` [2 * layers, batch, KV heads, past, D], or its 2 * layers parts."""
        pairs = [(past[2 * layer], past[2 * layer + 1]) for layer in range(len(past) // 2)]
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
    tensors = _cached(module, mode, 1)
    name, shape = type(module).__name__, tuple(int(size) for size in tensors.first.shape)
    if tensors.standard:
        return CacheForm(tensors.layers, shape[1], shape[3])
    longer = tuple(int(size) for size in _cached(module, mode, 2).first.shape)
    grown = [axis for axis, sizes in enumerate(zip(shape, longer, strict=True)) if sizes == (1, 2)]
    if len(shape) != 4 or shape.count(_BATCH) != 1 or len(grown) != 1:
        found = ", ".join("batch" if n == _BATCH else "seq" if i in grown else str(n) for i, n in enumerate(shape))
        raise UserError(f"{name} caches tensors of [{found}]", "batch, KV heads, past and channels are expected")
    batch, (seq,) = shape.index(_BATCH), grown
    heads, depth = (axis for axis in range(4) if axis not in (batch, seq))
    order = tuple((batch, heads, seq, depth).index(axis) for axis in range(4))
    return CacheForm(tensors.layers, shape[heads], shape[depth], order)


@dataclass(frozen=True)
class _Seen:
    """The cache of a run: a tensor of it, for how many layers, and whether it is a Cache of transformers."""

    first: torch.Tensor
    layers: int
    standard: bool


def _cached(module: nn.Module, mode: FakeTensorMode, seq: int) -> _Seen:
    with mode, torch.no_grad():
        tokens = torch.zeros(_BATCH, seq, dtype=torch.int64)
        cache: Any = module(input_ids=tokens, position_ids=tokens, use_cache=True).past_key_values
    if not cache:
        name = type(module).__name__
        raise UserError(f"{name} returns no cache", "only a model that takes `past_key_values` can be compiled")
    tensors = _tensors(cache)
    return _Seen(tensors[0], len(tensors) // 2, isinstance(cache, Cache))


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

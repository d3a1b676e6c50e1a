"""Strided windows of DDR tensors: reshapes, transposes and slices of a graph become views, not copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vacc_opt.backends.vacc.kernels.builder import param
from vacc_opt.backends.vacc.schedule import Param, row_major


@dataclass(frozen=True, slots=True)
class Ref:
    """Elements of `tensor` from `offset` with `shape` and element `strides`."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def contiguous(self) -> bool:
        """Whether elements lie in row-major order without gaps."""
        return self.strides == row_major(self.shape) or self.reshaped((-1,)) is not None

    def transposed(self, perm: Sequence[int]) -> Ref:
        """Axes in the order of `perm`."""
        return replace(
            self, shape=tuple(self.shape[one] for one in perm), strides=tuple(self.strides[one] for one in perm)
        )

    def reshaped(self, shape: Sequence[int]) -> Ref | None:
        """The view with another shape (one entry may be -1), or None when the strides do not allow one."""
        block = np.empty(1, np.int8)  # one byte stands for all elements: nothing is ever read through it
        window = np.lib.stride_tricks.as_strided(block, self.shape, self.strides)
        try:
            found = window.reshape(tuple(shape), copy=False)
        except ValueError:
            return None
        return replace(self, shape=found.shape, strides=tuple(found.strides))

    def sliced(self, axis: int, start: int, stop: int, step: int = 1) -> Ref:
        """Elements start:stop:step (step > 0) of one axis."""
        size = max(0, -(-(stop - start) // step))
        shape, strides = list(self.shape), list(self.strides)
        shape[axis], offset = size, self.offset + start * strides[axis]
        strides[axis] *= step
        return replace(self, shape=tuple(shape), strides=tuple(strides), offset=offset)

    def at(self, index: int) -> Ref:
        """Element `index` of the first axis, without that axis."""
        return Ref(self.tensor, self.dtype, self.shape[1:], self.strides[1:], self.offset + index * self.strides[0])

    def broadcast(self, shape: tuple[int, ...]) -> Ref | None:
        """The view of this shape that repeats elements by strides of zero, or None when shapes do not fit."""
        missing = len(shape) - len(self.shape)
        if missing < 0:
            return None
        strides = [0] * missing
        for size, own, stride in zip(shape[missing:], self.shape, self.strides, strict=True):
            if own not in (1, size):
                return None
            strides.append(stride if own == size else 0)
        return replace(self, shape=shape, strides=tuple(strides))

    def param(self, name: str, mode: str) -> Param:
        """The kernel parameter that this window can be passed for."""
        normal = row_major(self.shape)
        strides = tuple(n if size == 1 else s for size, s, n in zip(self.shape, self.strides, normal, strict=True))
        return param(name, mode, self.dtype, self.shape, strides)


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes a transposition.

    >>> inverse((1, 2, 0))
    (2, 0, 1)
    """
    return tuple(order.index(axis) for axis in range(len(order)))

"""Where keys can be at any position: a rotary pair turns with the position, so one token stands for all its turns.

A pair that turns at least once over the positions reaches its radius in both channels, on either side. A slower one is
followed over its arc (Su et al. 2021, "RoFormer", eq. 34, for the rotation itself).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir.graph import Node, Value

Array = npt.NDArray[Any]
_STEPS = 64  # of an arc of less than one turn: a step is below 0.1 rad, and misses 0.12 % of a radius at most


@dataclass(frozen=True)
class Rotary:
    """The rotation of one layer's keys: tables [positions, pairs] float32, pairs (2i, 2i + 1) or (i, i + half)."""

    before: Value
    cos: Array
    sin: Array
    interleaved: bool

    @staticmethod
    def behind(keys: Value | None) -> Rotary | None:
        """The rotation that makes ``keys`` [batch, heads, tokens, channels]; None when a rotation is not what makes it,
        or its tables are not constant or do not cover all channels."""
        node: Node | None = keys.producer if keys is not None else None
        if node is None or node.op != "RotaryEmbedding" or node.attributes.get("rotary_embedding_dim", 0):
            return None
        x, cos, sin = node.inputs[:3]
        if x is None or x.rank != 4 or x.shape is None or cos is None or sin is None:
            return None
        if cos.const is None or sin.const is None or cos.rank != 2 or cos.shape is None:
            return None
        depth = x.shape[3]
        if not isinstance(depth, int) or cos.shape[1] != depth // 2 or (cos.shape[0], True) == (1, True):
            return None
        interleaved = bool(node.attributes.get("interleaved", 0))
        return Rotary(x, cos.const.read().astype(np.float32), sin.const.read().astype(np.float32), interleaved)

    def extent(self, x: Array) -> tuple[Array, Array]:
        """Smallest and largest value of every channel [heads, channels] that ``x`` [1, heads, tokens, channels], taken
        before rotation, has at any position of the tables."""
        first, second = self._pairs(x[0].astype(np.float32))
        low1, high1 = first.min(1), first.max(1)
        low2, high2 = second.min(1), second.max(1)
        for position in np.unique(np.linspace(0, len(self.cos) - 1, _STEPS + 1).round().astype(int)):
            c, s = self.cos[position], self.sin[position]
            turned1, turned2 = first * c - second * s, second * c + first * s
            low1, high1 = np.minimum(low1, turned1.min(1)), np.maximum(high1, turned1.max(1))
            low2, high2 = np.minimum(low2, turned2.min(1)), np.maximum(high2, turned2.max(1))
        radius = np.hypot(first, second).max(1) * np.hypot(self.cos, self.sin).max(0)
        full = self._turns()
        return self._channels(np.where(full, -radius, low1), np.where(full, -radius, low2)), self._channels(
            np.where(full, radius, high1), np.where(full, radius, high2)
        )

    def _turns(self) -> Array:
        """Which pairs turn at least once over the positions of the tables."""
        angle = np.arctan2(self.sin[1], self.cos[1]) - np.arctan2(self.sin[0], self.cos[0])
        return np.asarray(np.abs(angle) * (len(self.cos) - 1) >= 2 * np.pi)

    def _pairs(self, x: Array) -> tuple[Array, Array]:
        half = x.shape[-1] // 2
        return (x[..., ::2], x[..., 1::2]) if self.interleaved else (x[..., :half], x[..., half:])

    def _channels(self, first: Array, second: Array) -> Array:
        if self.interleaved:
            return np.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1).astype(np.float32)
        return np.concatenate([first, second], axis=-1).astype(np.float32)

"""The peer machine by independent arithmetic: bound and least traffic of a product, from its sizes and the name alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

LINEARS = {"qkv": (4096, 1280), "attn_out": (1024, 4096), "ffn_up": (4096, 6848), "ffn_down": (3424, 4096)}  # K, N
TARGETS = [f"peer-64x64-{mib}mib-{rate}bpc" for mib in (1, 2) for rate in (64, 200)]


@dataclass(frozen=True)
class Peer:
    """Y[m, n] = X[m, k] @ W[n, k]^T with f16 X and Y, W of `weight` bytes an element, on one core of 64 x 64."""

    m: int
    n: int
    k: int
    weight: int
    target: str

    @property
    def sram(self) -> int:
        return int(re.findall(r"(\d+)mib", self.target)[0]) << 20

    @property
    def rate(self) -> int:
        return int(re.findall(r"(\d+)bpc", self.target)[0])

    @property
    def compulsory(self) -> int:
        """Every element once, with a f32 scale a column beside int8 weights."""
        scales = 4 * self.n if self.weight == 1 else 0
        return 2 * self.m * self.k + self.weight * self.n * self.k + 2 * self.m * self.n + scales

    @property
    def capacity(self) -> int:
        """2 M N K sqrt(a b c / S) - 2 S bytes: S in SRAM, 256 KiB of accumulators and two 64 x 64 tiles of 4 bytes."""
        room = self.sram + (256 << 10) + 2 * 64 * 64 * 4
        return math.floor(2 * self.m * self.n * self.k * math.sqrt(2 * self.weight * 2 / room) - 2 * room)

    @property
    def bound(self) -> int:
        """Passes of 64 x 64 over all rows, one cycle a row; or the least bytes over the port."""
        least = max(self.compulsory, self.capacity)
        return max(math.ceil(self.k / 64) * math.ceil(self.n / 64) * self.m, math.ceil(least / self.rate))

    def least_bytes(self) -> int:
        """Bytes of the best two-level tiling with single buffers, by trying every even split of rows and columns.

        A tile has its f32 sums and at least one k of both operands in SRAM; one of the operands may stay with all of k.
        """
        x, w, least = 2 * self.m * self.k, self.weight * self.n * self.k, 1 << 62
        splits = [sorted({math.ceil(size / parts) for parts in range(1, size + 1)}) for size in (self.m, self.n)]
        for m in splits[0]:
            for n in splits[1]:
                rows, columns = math.ceil(self.m / m), math.ceil(self.n / n)
                a, b = 2 * m, self.weight * n
                for need, moved in (
                    (a + b, x * columns + w * rows),
                    (a * self.k + b, x + w * rows),
                    (a + b * self.k, x * columns + w),
                ):
                    if 4 * m * n + need <= self.sram:
                        least = min(least, moved)
        return least + 2 * self.m * self.n

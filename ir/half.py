"""Halves to floats, several times as fast as the cast of numpy and with its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_SIGN_AND_MAGNITUDE = np.int32(-0x70002000)  # bits 31 and 13 to 27: where the fields of a half come to lie
_REBIAS = np.float32(2.0**112)  # 127 - 15: the biases of the exponents
_LIMIT = np.float32(65536)  # what the exponent of infinity and NaN stands for here


def to_float32(halves: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """``halves.astype(float32)``: the fields are moved by integer operations, and one product, exact for subnormals
    too, moves the bias of the exponent. A block with infinity or NaN takes numpy's own cast.
    """
    bits: npt.NDArray[Any] = halves.view(np.int16).astype(np.int32)
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _SIGN_AND_MAGNITUDE, out=bits)
    floats = bits.view(np.float32)
    np.multiply(floats, _REBIAS, out=floats)
    if floats.size and (floats.max() >= _LIMIT or floats.min() <= -_LIMIT):
        return halves.astype(np.float32)
    return floats

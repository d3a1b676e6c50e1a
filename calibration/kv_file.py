"""Upstream's file of KV scales, ``kv_scales.pth``: read and written without arbitrary pickles.

It maps ``transformer.encoder.layers.N`` to two arrays (scales of key and value) or to four (scale and float zero of the
key, scale and zero of the value), each of (kv head, channel).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.calibration.kv_scales import KvScales, ScaleZero, load_kv_scales
from vacc_opt.ir.errors import UserError, first_line
from vacc_opt.passes.infra.show.files import check_place

SUFFIXES = (".pth", ".pt")
_LAYER = "transformer.encoder.layers.{}"
_FORM = "it maps transformer.encoder.layers.N to 2 arrays (symmetric) or 4 (asymmetric) of (kv head, channel)"


def read_scales(path: Path) -> KvScales:
    """Read scales in either form, by the ending of the name.

    Raises:
        UserError: the file is missing, holds other objects than arrays, or is of another form.
    """
    return _read_pth(path) if path.suffix in SUFFIXES else load_kv_scales(path)


def write_scales(source: Path, out: Path) -> None:
    """Write the scales of a file in the form that the name ``out`` asks for."""
    scales = read_scales(source)
    if out.suffix in SUFFIXES:
        write_pth(out, scales)
        return
    scratch = out.with_name(out.name + ".tmp")
    scales.save(scratch)
    os.replace(scratch, out)


def check_output(out: Path) -> None:
    """Refuse a name that scales cannot be written to; raises UserError."""
    if out.suffix not in (*SUFFIXES, ".safetensors"):
        raise UserError(f"{out}: no form of KV scales", "end it in .pth (upstream) or .safetensors")
    check_place(out)


def write_pth(path: Path, scales: KvScales) -> None:
    """Write upstream's form: two arrays a layer when every zero is 0, else four; float32 [kv heads, head dim]."""
    import torch

    symmetric = all(not one.zero.any() for one in scales.tensors.values())
    layers: dict[str, list[Any]] = {}
    for layer in range(scales.layers):
        parts = [scales.tensors[layer, part] for part in ("key", "value")]
        arrays = [a for one in parts for a in ([one.scale] if symmetric else [one.scale, one.zero])]
        layers[_LAYER.format(layer)] = [torch.from_numpy(np.array(array)) for array in arrays]
    scratch = path.with_name(path.name + ".tmp")
    torch.save(layers, scratch)
    os.replace(scratch, path)


def _read_pth(path: Path) -> KvScales:
    import torch

    try:
        # weights_only refuses every object but containers of tensors, and of what is allowed here: numpy arrays
        with torch.serialization.safe_globals(_numpy_globals()):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot read the KV scales: {error.strerror}") from error
    except Exception as error:
        raise UserError(f"{path}: not a file of arrays alone: {first_line(error)}"[:300], _FORM) from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a {type(data).__name__}, not a dict", _FORM)
    found: dict[tuple[int, str], ScaleZero] = {}
    pattern = re.compile(re.escape(_LAYER).replace(r"\{\}", r"(\d+)"))
    for name, arrays in data.items():
        match = pattern.fullmatch(str(name))
        if match is None or not isinstance(arrays, list | tuple) or len(arrays) not in (2, 4):
            raise UserError(f"{path}: {name!s:.80} is not a layer's scales", _FORM)
        numbers = [_array(path, str(name), one) for one in arrays]
        if len(numbers) == 2:
            numbers = [numbers[0], np.zeros_like(numbers[0]), numbers[1], np.zeros_like(numbers[1])]
        for part, (scale, zero) in (("key", numbers[:2]), ("value", numbers[2:])):
            if scale.shape != zero.shape or not (scale > 0).all():
                raise UserError(f"{path}: {name}: a scale of the {part} is not a positive number", _FORM)
            found[int(match[1]), part] = ScaleZero(scale, zero)
    if not found or sorted({layer for layer, _ in found}) != list(range(len(found) // 2)):
        raise UserError(f"{path}: the layers are not numbered from 0 without a gap", _FORM)
    return KvScales(dict(sorted(found.items())))


def _array(path: Path, name: str, given: Any) -> npt.NDArray[np.float32]:
    """[kv heads, channels] float32; leading and trailing dimensions of 1 may be there."""
    try:
        numbers = np.asarray(given.float().numpy() if hasattr(given, "float") else given, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {name} holds a {type(given).__name__}, not an array", _FORM) from error
    while numbers.ndim > 2 and 1 in numbers.shape:
        numbers = numbers.squeeze(numbers.shape.index(1))
    if numbers.ndim != 2 or not np.isfinite(numbers).all():
        raise UserError(
            f"{path}: {name} is {list(numbers.shape)}, finite numbers [kv heads, channels] are expected", _FORM
        )
    return numbers


def _numpy_globals() -> list[Any]:
    """What a pickled numpy array of numbers is made of."""
    from numpy._core.multiarray import _reconstruct

    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.float16)]
    # files of older versions of numpy name the same function under its former module
    return [(_reconstruct, "numpy.core.multiarray._reconstruct"), _reconstruct, np.ndarray, np.dtype, *kinds]

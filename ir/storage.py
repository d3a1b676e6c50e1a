"""Weights to disk: constants streamed into safetensors files, and ONNX files whose external data points into them.

The ``safetensors`` package writes only tensors that are all in memory; :mod:`vacc_opt.ir.weight_files` writes tiles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.ir.graph import Graph, Value
from vacc_opt.ir.onnx_proto import is_inline, to_onnx
from vacc_opt.ir.tensor import Source, TensorExpr
from vacc_opt.ir.weight_files import METADATA, NAMES, WeightFile, write_weight_files

_TYPES = {name: dtype for dtype, name in NAMES.items()}
_MAX_HEADER = 100 << 20  # the limit that the safetensors format itself sets
_AGAIN = "write or download the file again"


def is_stored(value: Value) -> bool:
    """True for constants that live in a weight file rather than inside the model."""
    return value.const is not None and not is_inline(value)


def write_safetensors(path: Path, tensors: Mapping[str, TensorExpr]) -> dict[str, int]:
    """Write ``tensors`` in name order, reading each tile once; gives the absolute byte offset of each.

    Equal inputs give equal bytes.
    """
    return write_weight_files([WeightFile(path, tensors)])[0]


def read_safetensors_header(path: Path) -> dict[str, Source]:
    """The tensors of a safetensors file as lazy sources, in the order of their bytes.

    Raises:
        UserError: the file is missing, damaged, truncated or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little") if len(prefix) == 8 else _MAX_HEADER + 1
            if length > min(_MAX_HEADER, size - 8):
                raise UserError(f"{path}: not a safetensors file, or truncated: {size} bytes", _AGAIN)
            header = json.loads(file.read(length))
        entries = [(n, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in header.items() if n != METADATA]
        entries.sort(key=lambda entry: entry[3:])
    except OSError as error:
        raise UserError(f"{path}: cannot read the weight file: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged safetensors header", _AGAIN) from error
    return {entry[0]: _stored(path, size, 8 + length, *entry) for entry in entries}


def _stored(
    path: Path, size: int, start: int, name: str, dtype: str, shape: tuple[int, ...], low: int, high: int
) -> Source:
    """A tensor whose bytes are `low` to `high` behind `start`."""
    if dtype not in _TYPES:
        raise UserError(f"{path}: {name} has type {dtype}", did_you_mean(dtype, _TYPES))
    source = Source(str(path), start + low, _TYPES[dtype].value, shape, name)
    if high - low != source.nbytes:
        raise UserError(f"{path}: {name} has {high - low} bytes, its shape needs {source.nbytes}")
    if start + high > size:
        raise UserError(f"{path}: truncated: {name} ends at byte {start + high}, the file has {size}", _AGAIN)
    return source


def stored_tensors(graph: Graph, rank: int = 0) -> dict[str, TensorExpr]:
    """The constants of one rank that go to a weight file, by value name."""
    return {v.name: v.const.rank(rank) for v in graph.constants() if v.const is not None and is_stored(v)}


def save_onnx(graph: Graph, path: Path, *, rank: int = 0, places: Mapping[str, tuple[str, int]] | None = None) -> None:
    """Write ``path`` and its ``.safetensors`` beside it, unless ``places`` of the weights (file, offset) are given.

    Both appear under their final names only when complete.
    """
    location = path.with_suffix(".safetensors").name
    tensors = stored_tensors(graph, rank)
    weights_part, model_part = path.with_name(location + ".tmp"), path.with_name(path.name + ".tmp")
    try:
        written = write_safetensors(weights_part, tensors) if places is None and tensors else None
        found = places or {name: (location, offset) for name, offset in (written or {}).items()}
        model = to_onnx(graph, lambda v: (*found[v.name], tensors[v.name].nbytes), rank=rank)
        model_part.write_bytes(model.SerializeToString(deterministic=True))
        if written is not None:
            weights_part.replace(path.with_name(location))
        model_part.replace(path)
    finally:
        weights_part.unlink(missing_ok=True)
        model_part.unlink(missing_ok=True)

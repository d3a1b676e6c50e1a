"""Weights to disk: constants streamed into safetensors files, and ONNX files whose external data points into them.

The ``safetensors`` package writes only tensors that are all in memory; this writes one tile of rows at a time and so
needs memory for a tile. The format is its published one: 8 bytes of header length, JSON, data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from onnx import numpy_helper

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Graph, Value
from vacc_opt.ir.onnx_proto import is_inline, to_onnx
from vacc_opt.ir.tensor import Source, TensorExpr
from vacc_opt.ir.types import DType

TILE_BYTES = 16 << 20
_NAMES = {
    DType.FLOAT: "F32",
    DType.FLOAT16: "F16",
    DType.BFLOAT16: "BF16",
    DType.DOUBLE: "F64",
    DType.INT8: "I8",
    DType.UINT8: "U8",
    DType.INT16: "I16",
    DType.UINT16: "U16",
    DType.INT32: "I32",
    DType.UINT32: "U32",
    DType.INT64: "I64",
    DType.UINT64: "U64",
    DType.BOOL: "BOOL",
    DType.FLOAT8E4M3FN: "F8_E4M3",
    DType.FLOAT8E5M2: "F8_E5M2",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
Progress = Callable[[str, int], None]


def is_stored(value: Value) -> bool:
    """True for constants that live in a weight file rather than inside the model."""
    return value.const is not None and not is_inline(value)


def write_safetensors(
    path: Path, tensors: Mapping[str, TensorExpr], progress: Progress | None = None
) -> dict[str, int]:
    """Write ``tensors`` in name order, reading each tile once; gives the absolute byte offset of each.

    ``progress`` hears (tensor name, bytes written) after every tile. Equal inputs give equal bytes.
    """
    header: dict[str, object] = {}
    at = 0
    for name in sorted(tensors):
        expr = tensors[name]
        # what the format has no name for is stored as bytes; ONNX files say what they mean
        named = expr.dtype in _NAMES
        header[name] = {
            "dtype": _NAMES.get(expr.dtype, "U8"),
            "shape": list(expr.shape) if named else [expr.nbytes],
            "data_offsets": [at, at + expr.nbytes],
        }
        at += expr.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets: dict[str, int] = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in sorted(tensors):
            offsets[name] = file.tell()
            try:
                for tile in _tiles(tensors[name]):
                    file.write(_bytes(tensors[name].read(tile), tensors[name].dtype))
                    if progress is not None:
                        progress(name, file.tell() - offsets[name])
            except UserError as error:
                raise UserError(f"weight {name}: {error.message}", error.hint) from error
        file.flush()
        os.fsync(file.fileno())
    assert not offsets or min(offsets.values()) == start
    return offsets


def _bytes(array: npt.NDArray[Any], dtype: DType) -> bytes:
    packed: bytes = array.tobytes() if dtype.bits >= 8 else numpy_helper.from_array(array).raw_data
    return packed


def _tiles(expr: TensorExpr) -> Iterable[tuple[slice, ...]]:
    row = math.prod(expr.shape[1:]) * expr.dtype.bits
    if not expr.shape or expr.nbytes <= TILE_BYTES or row % 8:
        yield ()
        return
    step = max(1, TILE_BYTES // max(1, row // 8))
    for low in range(0, expr.shape[0], step):
        yield (slice(low, min(low + step, expr.shape[0])),)


def read_safetensors_header(path: Path) -> dict[str, Source]:
    """The tensors of a safetensors file as lazy sources.

    Raises:
        UserError: the file is missing, truncated or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, 100 << 20):
                raise UserError(f"{path}: not a safetensors file, or truncated")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path}: cannot read the weight file: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not a safetensors file, or truncated: {error}") from error
    sources: dict[str, Source] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        low, high = entry["data_offsets"]
        if 8 + length + high > size:
            raise UserError(f"{path}: truncated: {name} ends at byte {8 + length + high}, the file has {size}")
        if entry["dtype"] not in _TYPES:
            raise UserError(f"{path}: {name} has element type {entry['dtype']}, which is not supported")
        dtype, shape = _TYPES[entry["dtype"]].value, tuple(entry["shape"])
        sources[name] = Source(str(path), 8 + length + low, dtype, shape, name)
    return sources


def stored_tensors(graph: Graph, rank: int = 0) -> dict[str, TensorExpr]:
    """The constants of one rank that go to a weight file, by value name."""
    return {v.name: v.const.rank(rank) for v in graph.constants() if v.const is not None and is_stored(v)}


def save_onnx(
    graph: Graph, path: Path, *, rank: int = 0, offsets: Mapping[str, int] | None = None, weights: str = ""
) -> None:
    """Write ``path`` and its ``.safetensors`` beside it, unless ``offsets`` into a file ``weights`` are given.

    Both appear under their final names only when complete.
    """
    location = weights or path.with_suffix(".safetensors").name
    tensors = stored_tensors(graph, rank)
    weights_part, model_part = path.with_name(location + ".tmp"), path.with_name(path.name + ".tmp")
    try:
        written = write_safetensors(weights_part, tensors) if offsets is None and tensors else None
        places = dict(offsets or written or {})
        model = to_onnx(graph, lambda v: (location, places[v.name], tensors[v.name].nbytes), rank=rank)
        model_part.write_bytes(model.SerializeToString(deterministic=True))
        if written is not None:
            weights_part.replace(path.with_name(location))
        model_part.replace(path)
    finally:
        weights_part.unlink(missing_ok=True)
        model_part.unlink(missing_ok=True)

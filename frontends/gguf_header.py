"""The header of a GGUF file: metadata and tensor directory, read without touching any weight.

Layout: the GGUF specification, version 2 and 3 (little endian): magic, version, counts, key-value pairs, tensor infos,
then the data section aligned to ``general.alignment``.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vacc_opt.ir.errors import UserError

# value types of the specification, and how ``struct`` calls the scalars
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_MAX_ARRAY_KEPT = 4096  # longer arrays (the vocabulary) are stepped over; nobody here needs them


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: shape outermost dimension first, GGML type name (``Q4_1``), byte offset in the file, and bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key (long arrays left out) and tensors in file order."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """The model family that the file names, such as ``llama``."""
        return str(self.metadata.get("general.architecture", "(none)"))


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse the header; raises UserError for a file that is not GGUF, is damaged, or ends before its last tensor."""
    size = os.path.getsize(path)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file: it does not begin with `GGUF`", "give a .gguf file")
        try:
            header = _parse(path, file, size)
        except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError, ValueError) as error:
            raise UserError(
                f"{path}: damaged or truncated GGUF header at byte {file.tell()} of {size}", "download the file again"
            ) from error
    for tensor in header.tensors:
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise UserError(
                f"{path}: truncated: tensor {tensor.name} ends at byte {end}, the file has {size}",
                "download the file again",
            )
    return header


def _parse(path: Path, file: BinaryIO, size: int) -> GgufHeader:
    (version,) = _unpack(file, "I")
    if version not in (2, 3):
        raise UserError(f"{path}: GGUF version {version} is not supported", "versions 2 and 3 are")
    n_tensors, n_pairs = _unpack(file, "QQ")
    metadata: dict[str, Any] = {}
    for _ in range(n_pairs):
        key = _string(file, size)
        (kind,) = _unpack(file, "I")
        metadata[key] = _value(file, kind, size)
    infos = []
    for _ in range(n_tensors):
        name = _string(file, size)
        (rank,) = _unpack(file, "I")
        if rank > 8:
            raise ValueError("a tensor of more than 8 dimensions")
        dims = _unpack(file, f"{rank}Q")
        kind, offset = _unpack(file, "IQ")
        infos.append((name, tuple(reversed(dims)), kind, offset))
    alignment = int(metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
    start = math.ceil(file.tell() / alignment) * alignment
    return GgufHeader(path, metadata, tuple(_tensor(n, s, k, start + o) for n, s, k, o in infos))


def _tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    quantization = GGMLQuantizationType(kind)
    block, block_bytes = GGML_QUANT_SIZES[quantization]
    if shape and shape[-1] % block:
        raise ValueError(f"a row of {shape[-1]} elements in blocks of {block}")
    return GgufTensor(name, shape, quantization.name, offset, math.prod(shape) // block * block_bytes)


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    layout = "<" + layout
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _string(file: BinaryIO, size: int) -> str:
    (length,) = _unpack(file, "Q")
    if length > size:
        raise ValueError("a string longer than the file")
    data = file.read(length)
    if len(data) < length:
        raise ValueError("a string that the file cuts off")
    return data.decode()


def _value(file: BinaryIO, kind: int, size: int) -> Any:
    if kind == STRING:
        return _string(file, size)
    if kind != ARRAY:
        return _unpack(file, SCALARS[kind])[0]
    element, count = _unpack(file, "IQ")
    if count > size:
        raise ValueError("an array longer than the file")
    if count <= _MAX_ARRAY_KEPT:
        return [_value(file, element, size) for _ in range(count)]
    if element in SCALARS:
        file.seek(count * struct.calcsize("<" + SCALARS[element]), os.SEEK_CUR)
    else:
        for _ in range(count):
            file.seek(_unpack(file, "Q")[0], os.SEEK_CUR)
    return None

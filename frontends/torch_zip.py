"""Tensors of a ``pytorch_model*.bin``: where each lies in the file, read without torch and without running its pickle.

The format is what ``torch.save`` has written since torch 1.6: a zip archive of stored (uncompressed) members, one
``NAME/data.pkl`` that describes the tensors, and one ``NAME/data/KEY`` of raw little-endian bytes a storage. A stored
member is a slice of the file, so a tensor is a :class:`Source` like those of safetensors.
Source: the documentation of ``torch.save`` and of Python's ``pickle`` ("Restricting Globals"); APPNOTE.TXT 4.3.7 (zip).
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.tensor import Source, TensorExpr, transposed

_STORAGES = {
    "DoubleStorage": "double",
    "FloatStorage": "float",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_REBUILD, _PARAMETER = ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")
_ZIP, _OLD_PICKLE = b"PK\x03\x04", b"\x80"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field
_MAX_PICKLE = 100 << 20  # a description of tensors; the largest published ones have less than a megabyte
_AGAIN = "download the file again"


def _convert(path: Path) -> str:
    return (
        "convert it once, where torch is and you trust the file: "
        f"`python -c \"import torch; torch.save(torch.load('{path.name}', weights_only=True), '{path.name}')\"`"
    )


def read_torch_zip(path: Path) -> dict[str, TensorExpr]:
    """The tensors of one file by name, in its order; no weight is read and nothing of the file is run.

    Raises:
        UserError: the file is truncated, of the format before torch 1.6, compressed, big-endian, or holds anything but
            named tensors.
    """
    _check_magic(path)
    try:
        with zipfile.ZipFile(path) as archive:
            storages = _Storages(path, archive)
            text = storages.member("data.pkl", _MAX_PICKLE)
            if storages.has("byteorder") and storages.member("byteorder", 16).strip() != b"little":
                raise UserError(f"{path}: its weights are big-endian", _convert(path))
            state = _TensorUnpickler(path, text, storages).load()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: truncated or damaged: {str(error).lower()}", _AGAIN) from error
    except UserError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of the unpickler
        raise UserError(f"{path}: its description of tensors is damaged: {error}", _AGAIN) from error
    return _named_tensors(path, state)


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:1] == _OLD_PICKLE:
        raise UserError(f"{path}: a pickle in the format before torch 1.6, which cannot be read lazily", _convert(path))
    if start != _ZIP:
        raise UserError(f"{path}: not a file of `torch.save`, or damaged: {os.path.getsize(path)} bytes", _AGAIN)


def _named_tensors(path: Path, state: Any) -> dict[str, TensorExpr]:
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {_kind(state)}, not tensors by name", "save the `state_dict()` of the model")
    tensors: dict[str, TensorExpr] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, _Strided):
            message = f"{path}: {name!r} is a {_kind(tensor)}, not a tensor"
            raise UserError(message, "save the `state_dict()` of the model alone")
        tensors[name] = tensor.expression(path, name)
    return tensors


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, _Strided) else type(value).__name__


@dataclass(frozen=True)
class _Storage:
    """Raw elements: ``offset`` bytes from the start of the file."""

    offset: int
    dtype: str
    elements: int


@dataclass(frozen=True)
class _Strided:
    """A tensor as torch describes it: element ``i`` is at ``start + sum(i * strides)`` of its storage."""

    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def expression(self, path: Path, name: str) -> TensorExpr:
        """A slice of the file, transposed where the strides say so; raises UserError for what is no dense tensor."""
        count = math.prod(self.shape)
        order = sorted(range(len(self.shape)), key=lambda d: (-self.strides[d], self.shape[d] != 1))
        stored = tuple(self.shape[d] for d in order)
        if any(self.strides[d] != math.prod(stored[i + 1 :]) for i, d in enumerate(order) if count and stored[i] != 1):
            message = f"{path}: {name} is a view with gaps or repeats (shape {list(self.shape)}, "
            raise UserError(message + f"strides {list(self.strides)})", "save it with `.contiguous()`")
        if self.start + count > self.storage.elements:
            message = f"{path}: {name} of shape {list(self.shape)} ends at element {self.start + count}"
            raise UserError(f"{message}, its storage has {self.storage.elements}", _AGAIN)
        source = Source(str(path), self.storage.offset, self.storage.dtype, stored, name)
        at = self.storage.offset + self.start * source.dtype.bits // 8
        source = Source(str(path), at, self.storage.dtype, stored, name)
        return transposed(source, [order.index(d) for d in range(len(order))])


class _Storages:
    """The members of an archive: where the data of each begins."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self.archive = archive
        self.size = os.path.getsize(path)
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path}: a zip archive without one NAME/data.pkl: not a file of `torch.save`")
        self.root = pickles[0].partition("/")[0]

    def has(self, name: str) -> bool:
        """True when the archive has the member."""
        return f"{self.root}/{name}" in self.archive.NameToInfo

    def member(self, name: str, limit: int) -> bytes:
        """The bytes of a small member."""
        self.locate(name)
        if self.archive.getinfo(f"{self.root}/{name}").file_size > limit:
            raise UserError(f"{self.path}: {name} is larger than {limit} bytes", _AGAIN)
        return self.archive.read(f"{self.root}/{name}")

    def locate(self, name: str) -> tuple[int, int]:
        """Byte offset and bytes of a stored member in the file."""
        if not self.has(name):
            raise UserError(f"{self.path}: the archive has no {name}", _AGAIN)
        info = self.archive.getinfo(f"{self.root}/{name}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UserError(f"{self.path}: {name} is compressed, so it cannot be read in place", _convert(self.path))
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        start = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if signature != _ZIP or start + info.file_size > self.size:
            raise UserError(f"{self.path}: truncated or damaged at {name}", _AGAIN)
        return start, info.file_size


class _Global:
    """One of the few names that a pickle may ask for; made anew for each file."""

    __slots__ = ("name",)

    def __init__(self, name: tuple[str, str]) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> _Strided:
        if self.name == _PARAMETER and arguments and isinstance(arguments[0], _Strided):
            return arguments[0]
        if self.name == _REBUILD and len(arguments) >= 4 and isinstance(arguments[0], _Storage):
            start, shape, strides = arguments[1], _sizes(arguments[2]), _sizes(arguments[3])
            if isinstance(start, int) and start >= 0 and len(shape) == len(strides):
                return _Strided(arguments[0], start, shape, strides)
        raise ValueError(f"{'.'.join(self.name)} of other arguments than a tensor has")


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or not all(type(v) is int and v >= 0 for v in value):
        raise ValueError("a shape or strides that are not whole numbers")
    return tuple(value)


class _TensorUnpickler(pickle.Unpickler):
    """Knows tensors and dicts of them; any other name that the pickle asks for is refused before anything is made."""

    def __init__(self, path: Path, text: bytes, storages: _Storages) -> None:
        super().__init__(io.BytesIO(text))
        self._path = path
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global of the pickle."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (_REBUILD, _PARAMETER) or (module == "torch" and name in _STORAGES):
            return _Global((module, name))
        message = f"{self._path}: its pickle asks for {module}.{name}, and a checkpoint may hold tensors only"
        hint = "nothing of it was run; save the `state_dict()` of the model alone, or as safetensors"
        raise UserError(message, hint)

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage of a tensor: ("storage", type, key, device, number of elements)."""
        kind, storage_type, key, _, elements = pid
        dtype = _STORAGES.get(storage_type.name[1]) if isinstance(storage_type, _Global) else None
        if kind != "storage" or dtype is None or type(elements) is not int or elements < 0:
            raise ValueError("a reference that is not to a storage")
        offset, size = self._storages.locate(f"data/{key}")
        needed = Source("", 0, dtype, (elements,)).nbytes
        if size < needed:
            message = f"{self._path}: data/{key} has {size} bytes, its {elements} elements need {needed}"
            raise UserError(message, _AGAIN)
        return _Storage(offset, dtype, elements)

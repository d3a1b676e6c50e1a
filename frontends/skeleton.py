"""Config to simplified ONNX skeleton, in a child process (torch leaves no memory behind) or in this one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from vacc_opt.frontends.export_process import export_process
from vacc_opt.frontends.origins import origins_from_json
from vacc_opt.frontends.repeat_layers import DATA, Layers, with_all_layers
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.provenance import Origin

MODEL_FILE, ORIGINS_FILE, ERROR_FILE = "skeleton.onnx", "origins.json", "error.json"
LAYERS_FILE = "layers.json"  # beside a model of two layers


class ExportDefect(RuntimeError):
    """The exporter failed on a model that it should handle: a defect of ours or of torch, with its traceback."""


@dataclass(frozen=True)
class SimplifiedSkeleton:
    """An ONNX model without weights, and the origin of every node output."""

    model: onnx.ModelProto
    origins: Mapping[str, Origin]

    @property
    def weights(self) -> list[onnx.ValueInfoProto]:
        """The inputs that stand for weights."""
        return [i for i in self.model.graph.input if not i.name.startswith(DATA)]


def export_skeleton(
    config: Mapping[str, Any],
    attention: str,
    *,
    isolated: bool,
    progress: Callable[[str], None],
    code: Path | None = None,
) -> SimplifiedSkeleton:
    """Export the model of a config.json; raises UserError for what the config gets wrong, ExportDefect otherwise.

    ``code`` is the directory of the checkpoint if the code in it may run.
    """
    if not isolated:
        from vacc_opt.frontends.worker import make_skeleton

        progress("load torch")
        return _whole(*make_skeleton(config, attention, progress, code))
    request = {"config": dict(config), "attention": attention, "code": str(code) if code else None}
    with export_process() as process:
        folder = process.folder
        _check(folder, *process.run(request, progress))
        origins = origins_from_json((folder / ORIGINS_FILE).read_text())
        layers = folder / LAYERS_FILE
        repeated = Layers(**json.loads(layers.read_text())) if layers.exists() else None
        return _whole(onnx.load(folder / MODEL_FILE), origins, repeated)


def _whole(model: onnx.ModelProto, origins: dict[str, Origin], layers: Layers | None) -> SimplifiedSkeleton:
    return SimplifiedSkeleton(*(with_all_layers(model, origins, layers) if layers else (model, origins)))


def _check(folder: Path, code: int, errors: str) -> None:
    """Raise what a child that failed has to say."""
    if code == 0:
        return
    if (folder / ERROR_FILE).exists():
        raise UserError(**json.loads((folder / ERROR_FILE).read_text()))
    if code == -signal.SIGKILL:
        raise UserError("the export was killed, most likely for want of memory", "free some memory and try again")
    last = errors.splitlines()[-1] if errors else f"exit code {code}"
    if code == os.EX_IOERR:
        raise UserError(f"{folder}: the export cannot be written: {last}", "free some space, or set TMPDIR")
    raise ExportDefect(f"the export failed: {last}\n{errors}")

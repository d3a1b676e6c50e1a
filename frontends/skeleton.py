"""Config to simplified ONNX skeleton, in a child process (torch leaves no memory behind) or in this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from vacc_opt.frontends.origins import origins_from_json
from vacc_opt.frontends.repeat_layers import DATA, Layers, with_all_layers
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.provenance import Origin

MODEL_FILE, ORIGINS_FILE, ERROR_FILE, REQUEST_FILE = "skeleton.onnx", "origins.json", "error.json", "request.json"
LAYERS_FILE = "layers.json"  # beside a model of two layers
STAGE = "stage: "


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

        return _whole(*make_skeleton(config, attention, progress, code))
    with tempfile.TemporaryDirectory(prefix="vacc-opt-export-") as name:
        folder = Path(name)
        request = {"config": dict(config), "attention": attention, "code": str(code) if code else None}
        (folder / REQUEST_FILE).write_text(json.dumps(request))
        _run_worker(folder, progress)
        origins = origins_from_json((folder / ORIGINS_FILE).read_text())
        layers = folder / LAYERS_FILE
        repeated = Layers(**json.loads(layers.read_text())) if layers.exists() else None
        return _whole(onnx.load(folder / MODEL_FILE), origins, repeated)


def _whole(model: onnx.ModelProto, origins: dict[str, Origin], layers: Layers | None) -> SimplifiedSkeleton:
    return SimplifiedSkeleton(*(with_all_layers(model, origins, layers) if layers else (model, origins)))


def _run_worker(folder: Path, progress: Callable[[str], None]) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment["HF_MODULES_CACHE"] = str(folder / "modules")  # where transformers copies code of a checkpoint to
    # -P: the working directory must not shadow installed packages
    command = [sys.executable, "-P", "-m", "vacc_opt.frontends.worker", str(folder)]
    with (folder / "stderr").open("w+b") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True) as child:
            assert child.stdout is not None
            try:
                for line in child.stdout:
                    if line.startswith(STAGE):
                        progress(line.removeprefix(STAGE).strip())
            except BaseException:
                child.kill()
                raise
        if child.returncode == 0:
            return
        if (folder / ERROR_FILE).exists():
            raise UserError(**json.loads((folder / ERROR_FILE).read_text()))
        errors.seek(0)
        text = errors.read().decode(errors="replace").strip()
    if child.returncode == -signal.SIGKILL:
        raise UserError("the export was killed, most likely for want of memory", "free some memory and try again")
    last = text.splitlines()[-1] if text else f"exit code {child.returncode}"
    raise ExportDefect(f"the export failed: {last}\n{text}")

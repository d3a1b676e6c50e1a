"""The child process of an export: reads ``request.json`` in its folder, writes skeleton and origins beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from vacc_opt.frontends.repeat_layers import Layers, is_repeatable
from vacc_opt.frontends.skeleton import ERROR_FILE, LAYERS_FILE, MODEL_FILE, ORIGINS_FILE, REQUEST_FILE, STAGE
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.provenance import Origin

if TYPE_CHECKING:
    from vacc_opt.frontends.torch_export import Skeleton


def make_skeleton(
    config: Mapping[str, Any], attention: str, progress: Callable[[str], None], code: Path | None = None
) -> tuple[onnx.ModelProto, dict[str, Origin], Layers | None]:
    """Build the module, export it, simplify the result: the skeleton and the origin of every node output.

    With layers, the skeleton has two of them, of which the second is to be copied. ``code`` is the directory of the
    checkpoint if the code in it may run.
    """
    progress("load torch")
    from vacc_opt.frontends.origins import complete_origins
    from vacc_opt.frontends.simplify_skeleton import simplify_skeleton
    from vacc_opt.frontends.torch_export import OPSET  # noqa: F401 - loads torch within this stage

    for every_layer in (False, True):
        progress("export")
        skeleton = trace(config, attention, code, every_layer=every_layer)
        progress("simplify")
        model = simplify_skeleton(skeleton.model)
        origins = complete_origins(model, skeleton.origins)
        if skeleton.layers is None or is_repeatable(model, origins, skeleton.layers):
            break
    return model, origins, skeleton.layers


def trace(config: Mapping[str, Any], attention: str, code: Path | None = None, *, every_layer: bool) -> Skeleton:
    """The unsimplified skeleton of the whole model, or of two layers for all that are the same."""
    from vacc_opt.frontends.huggingface import build_module
    from vacc_opt.frontends.torch_export import export_module

    return export_module(*build_module(config, attention, code), every_layer=every_layer)


def main(folder: Path) -> int:
    """Serve one request; exit code 2 with ``error.json`` for a mistake of the user."""
    from vacc_opt.frontends.origins import origins_to_json

    request = json.loads((folder / REQUEST_FILE).read_text())
    try:
        code = Path(request["code"]) if request["code"] else None
        model, origins, layers = make_skeleton(request["config"], request["attention"], _report, code)
    except UserError as error:
        (folder / ERROR_FILE).write_text(json.dumps({"message": error.message, "hint": error.hint}))
        return error.exit_code
    (folder / ORIGINS_FILE).write_text(origins_to_json(origins))
    if layers is not None:
        (folder / LAYERS_FILE).write_text(json.dumps(asdict(layers)))
    onnx.save(model, folder / MODEL_FILE)
    return 0


def _report(stage: str) -> None:
    sys.stdout.write(f"{STAGE}{stage}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

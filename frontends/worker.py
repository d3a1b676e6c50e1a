"""The child process of an export: loads torch, reads one request, writes skeleton and origins into its folder."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from vacc_opt.frontends.export_process import STAGE
from vacc_opt.frontends.repeat_layers import Layers, is_repeatable
from vacc_opt.frontends.skeleton import ERROR_FILE, LAYERS_FILE, MODEL_FILE, ORIGINS_FILE
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.provenance import Origin

if TYPE_CHECKING:
    from vacc_opt.frontends.torch_export import Skeleton


def make_skeleton(
    config: Mapping[str, Any],
    attention: str,
    progress: Callable[[str], None],
    code: Path | None = None,
    *,
    beside: bool = False,
) -> tuple[onnx.ModelProto, dict[str, Origin], Layers | None]:
    """Build the module, export it, simplify the result: the skeleton and the origin of every node output.

    With layers, the skeleton has two of them, of which the second is to be copied. ``code`` is the directory of the
    checkpoint if the code in it may run. ``beside`` lets a fork of this process check what the export rests on.
    """
    from vacc_opt.frontends.origins import complete_origins
    from vacc_opt.frontends.simplify_skeleton import simplify_skeleton

    for every_layer in (False, True):
        progress("export")
        skeleton = trace(config, attention, code, every_layer=every_layer, beside=beside)
        progress("simplify")
        model = simplify_skeleton(skeleton.model)
        origins = complete_origins(model, skeleton.origins)
        if skeleton.layers is None or is_repeatable(model, origins, skeleton.layers):
            break
    return model, origins, skeleton.layers


def trace(
    config: Mapping[str, Any], attention: str, code: Path | None = None, *, every_layer: bool, beside: bool = False
) -> Skeleton:
    """The unsimplified skeleton of the whole model, or of two layers for all that are the same."""
    from vacc_opt.frontends.huggingface import build_module
    from vacc_opt.frontends.torch_export import export_module

    return export_module(*build_module(config, attention, code), every_layer=every_layer, beside=beside)


def main(folder: Path) -> int:
    """Serve one request; exit code 2 with ``error.json`` for a mistake of the user, 74 if the result has no room."""
    _report("load torch")
    _load()
    line = sys.stdin.readline()
    if not line:
        return 0  # nothing was to be exported
    request = json.loads(line)
    try:
        code = Path(request["code"]) if request["code"] else None
        model, origins, layers = make_skeleton(request["config"], request["attention"], _report, code, beside=True)
    except UserError as error:
        (folder / ERROR_FILE).write_text(json.dumps({"message": error.message, "hint": error.hint}))
        return error.exit_code
    from vacc_opt.frontends.origins import origins_to_json

    try:
        (folder / ORIGINS_FILE).write_text(origins_to_json(origins))
        if layers is not None:
            (folder / LAYERS_FILE).write_text(json.dumps(asdict(layers)))
        onnx.save(model, folder / MODEL_FILE)
    except OSError as error:
        sys.stderr.write(f"{error.strerror}\n")
        return os.EX_IOERR
    return 0


def _load() -> None:
    """Import what an export needs, and let torch have no threads, which a fork would miss."""
    gc.disable()  # what is imported stays
    import torch

    from vacc_opt.frontends import huggingface, simplify_skeleton, torch_export  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # a search for cycles would write to the memory of all of it, which a fork shares until then
    gc.set_threshold(50_000)  # traces make many objects that stay
    gc.enable()


def _report(stage: str) -> None:
    sys.stdout.write(f"{STAGE}{stage}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    exit_code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(exit_code)  # all is written; to take torch apart takes a second

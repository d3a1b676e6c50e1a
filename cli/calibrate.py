"""``vacc-opt calibrate CONFIG.yaml``: learn KV scales and GPTQ codes, and keep them for ``compile``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from vacc_opt.cli.console import Steps


@click.command("calibrate")
@click.argument("config", metavar="CONFIG.yaml")
@click.option("-D", "overrides", multiple=True, metavar="dotted.key=value", help="Set a key of the file; repeatable.")
@click.option("--kv-scales", metavar="FILE", help="Write the KV scales too: .pth as upstream does, or .safetensors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: files, and the loss of every linear.")
def command(config: str, overrides: tuple[str, ...], kv_scales: str | None, as_json: bool) -> None:
    """Learn from the data set of CONFIG.yaml what its quantization needs, into a cache in workspace.path.

    `compile` with the same model, text and options finds it there. A run of GPTQ that was ended continues with the
    layer that it was at.
    """
    from vacc_opt.calibration.kv_file import check_output, write_scales
    from vacc_opt.ir.errors import UserError
    from vacc_opt.runtime.compile import calibrate_model

    out = Path(kv_scales) if kv_scales else None
    if out is not None:
        check_output(out)
    with Steps(quiet=as_json) as steps:
        found = calibrate_model(Path(config), overrides, steps)
    if out is not None:
        if found.scales is None:
            raise UserError(f"{out}: the configuration has no int8 KV cache", "frontend.quantize.type: w8kv8")
        write_scales(found.scales, out)
    files = [path for path in (found.scales, found.codes, out) if path is not None]
    if as_json:
        layers = [asdict(one) for one in found.layers]
        said = {"files": [str(path) for path in files], "layers": layers, "seconds_a_text": found.seconds_a_text}
        click.echo(json.dumps(said, indent=2))
        return
    for path in files:
        click.echo(f"-> {path}")

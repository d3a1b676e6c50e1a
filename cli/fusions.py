"""``vacc-opt fusions ARTIFACT|CONFIG``: what each fusion behind linears gains."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vacc_opt.cli.console import Steps, print_table


@click.command("fusions")
@click.argument("source", metavar="ARTIFACT|CONFIG.yaml")
@click.option("-D", "overrides", multiple=True, metavar="dotted.key=value", help="Set a key of the file; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(source: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Predict what each fusion gains: cycles and DDR bytes of a model without it.

    A bias, SwiGLU and GeGLU, rotary embeddings, writes into KV caches and all-reduces are fused into the linear before
    them. The model is lowered and timed with all of these, without each in turn, and without any; no weight is read.
    """
    from vacc_opt.runtime.fusions import HEAD, fusion_gains

    with Steps(to_stderr=True, quiet=as_json) as steps:
        found = fusion_gains(Path(source), overrides, lambda text: steps.running(f"fusions: {text}"))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    click.echo(f"{found.model} on {found.target}")
    print_table(HEAD, found.rows(), left=("phase", "fusions"))

"""``vacc-opt simulate ARTIFACT``: the predicted time of a phase, and a trace of it."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("simulate")
@click.argument("artifact", metavar="ARTIFACT")
@click.option("--phase", required=True, help="The entry point to time: prefill, decode, or one with its sizes.")
@click.option("--context", type=int, help="Tokens cached before the call. Default: none in prefill, all in decode.")
@click.option("--trace", metavar="FILE", help="Write a Chrome trace that Perfetto opens.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(artifact: str, phase: str, context: int | None, trace: str | None, as_json: bool) -> None:
    """Predict the time of a phase of ARTIFACT from its schedule text, on the target that it was compiled for."""
    from vacc_opt.runtime.simulate import simulate

    found = simulate(Path(artifact), phase, context=context, trace=Path(trace) if trace else None)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    click.echo(found.text())
    if trace:
        click.echo(f"-> {trace}   (open it in Perfetto)")

"""``vacc-opt simulate ARTIFACT``: the predicted time of a phase, and a trace of it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vacc_opt.cli.options import what_if_option


@click.command("simulate")
@click.argument("artifact", metavar="ARTIFACT")
@click.option("--phase", required=True, help="The entry point to time: prefill, decode, or one with its sizes.")
@click.option("--context", type=int, help="Tokens cached before the call. Default: none in prefill, all in decode.")
@what_if_option
@click.option("--trace", metavar="FILE", help="Write a Chrome trace that Perfetto opens.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    artifact: str, phase: str, context: int | None, what_if: tuple[str, ...], trace: str | None, as_json: bool
) -> None:
    """Predict the time of a phase of ARTIFACT from its schedule text, on the target that it was compiled for.

    With --what-if the same text is timed on the changed machine: its tiles stay those of the compilation.
    """
    from vacc_opt.runtime.simulate import simulate

    page = Path(trace) if trace else None
    found = simulate(Path(artifact), phase, context=context, trace=page, what_if=what_if)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    click.echo(found.text())
    if trace:
        click.echo(f"-> {trace}   (open it in Perfetto)")

"""``vacc-opt compile CONFIG.yaml``: a model as the file describes it becomes an artifact."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vacc_opt.cli.console import Steps, table
from vacc_opt.cli.options import what_if_option


@click.command("compile")
@click.argument("config", metavar="CONFIG.yaml")
@click.option("-D", "overrides", multiple=True, metavar="dotted.key=value", help="Set a key of the file; repeatable.")
@what_if_option
@click.option("--plan-only", is_flag=True, help="Do all but what reads weights: time the schedules, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object, and no steps.")
def command(config: str, overrides: tuple[str, ...], what_if: tuple[str, ...], plan_only: bool, as_json: bool) -> None:
    """Compile a model as CONFIG.yaml (the upstream schema) describes it into an artifact under workspace.path/name.

    Every step says what it did and how long it took. The artifact appears complete or not at all. With --what-if it is
    made for that machine, whose target file it holds.
    """
    from vacc_opt.runtime.ahead import export_ahead

    with export_ahead(Path(config), overrides), Steps(quiet=as_json) as steps:
        from vacc_opt.runtime.compile import compile_model

        report = compile_model(Path(config), overrides, steps, plan_only=plan_only, what_if=what_if)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
        return
    click.echo(f"\n{table(report.summary())}")
    target = report.facts.target
    assumed = "bandwidth and sizes assumed" if target.assumed else "all numbers sourced"
    made = f"{report.path}   report.html" if report.path is not None else "nothing is written: this was the plan"
    click.echo(f"-> {made}   (target {target.name} v{target.version}: {assumed})")

"""``vacc-opt schedule gemm|check``: the schedule of one kernel without a model, or one that anyone wrote."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vacc_opt.cli.options import what_if_option

if TYPE_CHECKING:
    from vacc_opt.runtime.schedule import Scheduled


@click.group("schedule")
def command() -> None:
    """Search, verify, execute and time the schedule of one kernel."""


@command.command("gemm")
@click.option("--m", type=int, required=True, help="Rows of activations.")
@click.option("--n", type=int, required=True, help="Output channels.")
@click.option("--k", type=int, required=True, help="Input channels.")
@click.option("--weights", type=click.Choice(["float16", "int8"]), default="float16", show_default=True)
@click.option("--target", required=True, metavar="NAME|FILE", help="The machine: a shipped target or a YAML file.")
@what_if_option
@click.option("-o", "out", metavar="FILE", help="Write the schedule text here instead of to stdout.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; the text is under `schedule`.")
def gemm(
    m: int, n: int, k: int, weights: str, target: str, what_if: tuple[str, ...], out: str | None, as_json: bool
) -> None:
    """Schedule Y[M, N] = X[M, K] @ W[N, K]^T with float16 activations; a line about its time goes to stderr."""
    from vacc_opt.runtime.schedule import schedule_gemm

    path = _new_file(out)
    found = schedule_gemm(m, n, k, weights=weights, target=target, what_if=what_if)
    if path:
        path.write_text(found.schedule, encoding="utf-8")
    elif not as_json:
        click.echo(found.schedule, nl=False)
    _say(found, as_json)


@command.command("check")
@click.argument("schedule", metavar="FILE")
@click.option("--target", required=True, metavar="NAME|FILE", help="The machine that the schedule was written for.")
@what_if_option
@click.option("--execute", is_flag=True, help="Run it on random values in four interleavings, which must agree.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(schedule: str, target: str, what_if: tuple[str, ...], execute: bool, as_json: bool) -> None:
    """Verify and time the schedule text in FILE, whoever wrote it; exit code 1 when a rule is broken."""
    from vacc_opt.runtime.schedule import ORDERS, check_schedule, run_orders

    found = check_schedule(Path(schedule), target=target, what_if=what_if)
    if execute:
        count = run_orders(found)
        click.echo(f"executed: {count} elements, equal in {ORDERS} interleavings", err=True)
    _say(found, as_json)


def _say(found: Scheduled, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        click.echo(found.text(), err=True)


def _new_file(out: str | None) -> Path | None:
    """The path of -o, checked before the search; raises UserError when no file can be written there."""
    from vacc_opt.passes.infra.show.files import check_place

    path = Path(out) if out else None
    if path:
        check_place(path)
    return path

"""``vacc-opt tp-plan CONFIG.yaml --tp 1,2,4``: what each number of ranks would hold, exchange and waste."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vacc_opt.cli.console import Steps, print_table

if TYPE_CHECKING:
    from vacc_opt.runtime.tp_plan import Row


@click.command("tp-plan")
@click.argument("config", metavar="CONFIG.yaml")
@click.option("--tp", "ranks", default="1,2,4,8,16", show_default=True, help="Numbers of ranks, separated by commas.")
@click.option("-D", "overrides", multiple=True, metavar="dotted.key=value", help="Set a key of the file; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: bytes as numbers.")
def command(config: str, ranks: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Split the model of CONFIG.yaml over each number of ranks, and say what the splits hold and exchange.

    The model is exported once and no weight is read. Heads are query + KV heads a rank; weights and KV cache are bytes
    of one rank; collectives are those of one call, with the bytes that a rank gives to them; padding is the share of
    zeros among all bytes held. A number of ranks that is not possible is a row that says why.
    """
    from vacc_opt.runtime.tp_plan import parse_ranks, tp_plan

    with Steps(to_stderr=True, quiet=as_json) as steps:
        rows = list(tp_plan(Path(config), parse_ranks(ranks), overrides, lambda text: steps.running(f"plan: {text}")))
    if as_json:
        click.echo(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        _print(rows)


def _print(rows: Sequence[Row]) -> None:
    from vacc_opt.runtime.models import format_bytes

    phases = next((row.traffic for row in rows if row.traffic), ())
    columns = [f"{one.phase}: collectives" for one in phases]
    lines = []
    for row in [row for row in rows if row.reason is None]:
        heads = "; ".join(map(str, row.heads))
        traffic = [f"{sum(one.collectives.values())}, {format_bytes(one.bytes)}" for one in row.traffic]
        held = (format_bytes(row.weights), format_bytes(row.kv_cache))
        lines.append((str(row.tp), heads, *held, *traffic, f"{row.waste:.1%}"))
    if lines:
        head = ("tp", "heads a rank", "weights", "KV cache", *columns, "padding")
        print_table(head, lines, left=("heads a rank", *columns))
    for row in rows:
        if row.reason is not None:
            click.echo(f"{row.tp:>2}  not possible: {row.reason}")

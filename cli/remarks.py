"""``vacc-opt remarks``: hold the remarks of two runs against each other, or read those of one."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.group("remarks")
def command() -> None:
    """Read remarks files (`opt --remarks-file`) or those of artifacts, and hold two of them against each other.

    \b
      vacc-opt remarks diff before.yaml after.yaml
      vacc-opt remarks show vacc_deploy/NAME --kind missed
    """


@command.command("diff", short_help="Hold two runs against each other, pass by pass.")
@click.argument("before", metavar="A", type=click.Path(path_type=Path))
@click.argument("after", metavar="B", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every place.")
def diff(before: Path, after: Path, as_json: bool) -> None:
    """Show per pass what the run of A rewrote and missed, and that of B: of another compiler, or another model.

    A and B are remarks files or artifacts. Exit code 1 when a pass rewrites fewer places in B, else 0.
    """
    from vacc_opt.passes.infra.show.remarks import read_remarks
    from vacc_opt.passes.infra.show.remarks_diff import check_not_worse, compare_remarks, report

    diffs = compare_remarks(read_remarks(before), read_remarks(after))
    click.echo(json.dumps([one.to_json() for one in diffs], indent=2) if as_json else report(diffs))
    check_not_worse(diffs)


@command.command("show", short_help="Print remarks of one run, one a line.")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--kind", multiple=True, type=click.Choice(["passed", "missed", "analysis"]), help="Repeatable.")
@click.option("--pass", "passes", multiple=True, metavar="PASS", help="Remarks by this pass only; repeatable.")
def show(file: Path, kind: tuple[str, ...], passes: tuple[str, ...]) -> None:
    """Print the remarks in FILE, a remarks file or an artifact, one a line."""
    from vacc_opt.passes.infra.show.remarks import chosen, read_remarks

    for one in chosen(read_remarks(file), kind, passes):
        click.echo(f"{one.scope}: {one.remark}" if one.scope else str(one.remark))

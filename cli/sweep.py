"""``vacc-opt sweep ARTIFACT|CONFIG --over KEY=V,V``: predicted times of a model over numbers of its target."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vacc_opt.cli.console import Steps, print_table


@click.command("sweep")
@click.argument("source", metavar="ARTIFACT|CONFIG.yaml")
@click.option(
    "--over", multiple=True, required=True, metavar="KEY=V,V", help="Values of a number of the target; repeatable."
)
@click.option("-D", "overrides", multiple=True, metavar="dotted.key=value", help="Set a key of the file; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--html", metavar="FILE", help="Write a page with a chart.")
def command(source: str, over: tuple[str, ...], overrides: tuple[str, ...], as_json: bool, html: str | None) -> None:
    """Predict prefill and decode of a model at every combination of target numbers.

    The model of an artifact, or of a configuration, is lowered, verified and timed anew for each point; no weight is
    read. A key is the dotted path of a number in the target file, or the end of one: ddr.bytes_per_cycle. A machine
    that cannot run the model is a line that says why.
    """
    from vacc_opt.passes.infra.show.files import check_place
    from vacc_opt.runtime.sweep import parse_over, sweep

    page = Path(html) if html else None
    if page:
        check_place(page)
    with Steps(to_stderr=True, quiet=as_json) as steps:
        found = sweep(Path(source), parse_over(over), overrides, lambda text: steps.running(f"sweep: {text}"))
    if page:
        page.write_text(found.html(), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        click.echo(f"{found.model} on {found.target}")
        print_table(found.head, found.rows(), left=("phase", "binds"))
        if page:
            click.echo(f"-> {page}")

"""``vacc-opt lint CONFIG.yaml``: what is known to go wrong with a configuration and its checkpoint, each with a fix."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("lint")
@click.argument("config", metavar="CONFIG.yaml", required=False)
@click.option("-D", "overrides", multiple=True, metavar="dotted.key=value", help="Set a key of the file; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of findings.")
@click.option("--markdown", is_flag=True, help="Print the page of rules of the documentation.")
def command(config: str | None, overrides: tuple[str, ...], as_json: bool, markdown: bool) -> int:
    """Check CONFIG.yaml and the headers of its checkpoint against what is known to go wrong.

    No weight is read. The exit code is 1 when there is an error, which keeps `compile` from working.
    """
    from vacc_opt.runtime.lint import lint, reference_page

    if markdown:
        click.echo(reference_page(), nl=False)
        return 0
    if config is None:
        raise click.UsageError("give a CONFIG.yaml")
    findings = lint(Path(config), overrides)
    errors = sum(one.severity == "error" for one in findings)
    if as_json:
        click.echo(json.dumps([one.to_json() for one in findings], indent=2))
    else:
        for one in findings:
            click.echo(f"{one.severity}: {one.message}  [{one.rule}]\n  {one.fix}")
        counts = {"error": errors, "warning": len(findings) - errors}
        said = ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for what, count in counts.items())
        click.echo(f"{config}: {said}")
    return 1 if errors else 0

"""``vacc-opt verify ARTIFACT``: everything that an artifact promises, checked again."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vacc_opt.cli.console import Steps


@click.command("verify")
@click.argument("artifact", metavar="ARTIFACT")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every check.")
def command(artifact: str, as_json: bool) -> None:
    """Check ARTIFACT again: digests, manifest, where each graph finds its weights, schedules and their predicted times.

    The exit code is 1 when a check fails; each says which file, and what is wrong with it.
    """
    from vacc_opt.ir.errors import CheckError
    from vacc_opt.runtime.verify_artifact import verify_artifact

    with Steps(quiet=as_json) as steps:
        steps.line(Path(artifact).name)
        checks = []
        for check in verify_artifact(Path(artifact), steps):
            steps.done(check.name, check.sentence, check.seconds)
            checks.append(check)
    failed = [check for check in checks if not check.passed]
    if as_json:
        found = {"artifact": artifact, "passed": not failed, "checks": [check.to_json() for check in checks]}
        click.echo(json.dumps(found, indent=2))
    if failed:
        names = ", ".join(check.name for check in failed)
        raise CheckError(f"{artifact}: {len(failed)} of {len(checks)} checks failed: {names}", failed[0].problems[0])

"""``vacc-opt passes [NAME]``: the registered passes, or one of them with its options."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from vacc_opt.passes.infra.base import Pass


@click.command("passes")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a pass.")
@click.option("--markdown", is_flag=True, help="Print the reference page of the documentation.")
def command(name: str | None, as_json: bool, markdown: bool) -> None:
    """List the passes, or describe one with its options.

    A pass is used by its name in a pipeline: `-p simplify,fuse-gqa{expect=30}`.
    """
    from vacc_opt.passes.infra.registry import all_passes, get_pass

    chosen = {name: get_pass(name)} if name else all_passes()
    if markdown:
        click.echo(reference(chosen), nl=False)
        return
    if as_json:
        found = [
            {
                "name": key,
                "kind": cls.kind.value,
                "summary": cls.help_line(),
                "options": [
                    {"name": o.name, "type": o.type, "default": o.default, "help": o.help} for o in cls.options()
                ],
            }
            for key, cls in chosen.items()
        ]
        click.echo(json.dumps(found, indent=2))
        return
    if name is None:
        width = max(map(len, chosen), default=0)
        for key, cls in chosen.items():
            click.echo(f"{key:<{width}}  {cls.kind.value:<14} {cls.help_line()}")
        return
    cls = chosen[name]
    click.echo(f"{name} ({cls.kind.value})\n")
    click.echo(inspect.cleandoc(cls.__doc__ or ""))
    options = cls.options()
    if options:
        click.echo("\nOptions:")
        left = [f"{o.name}: {o.type} = {o.default}" for o in options]
        width = max(map(len, left))
        for text, option in zip(left, options, strict=True):
            click.echo(f"  {text:<{width}}  {option.help}")


def reference(passes: Mapping[str, type[Pass]]) -> str:
    """Markdown: a table of the passes, then each with its text and its options."""
    lines = ["# Passes", "", "Written by `make docs` from the passes themselves.", "", "| pass | kind | what it does |"]
    lines.append("|---|---|---|")
    lines += [f"| [`{name}`](#{name}) | {cls.kind.value} | {cls.help_line()} |" for name, cls in passes.items()]
    for name, cls in passes.items():
        lines += ["", f"## {name}", "", f"Kind: {cls.kind.value}.", "", inspect.cleandoc(cls.__doc__ or "")]
        options = cls.options()
        if options:
            lines += ["", "| option | type | default | meaning |", "|---|---|---|---|"]
        for option in options:
            plain = str(option.default)
            default = plain.lower() if isinstance(option.default, bool | None) else plain or "empty"
            kind = option.type.replace("|", "or")
            lines.append(f"| `{option.name}` | {kind} | {default} | {option.help.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"

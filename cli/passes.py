"""``vacc-opt passes [NAME]``: what can stand in a pipeline, or one of them; ``vacc-opt passes new``: a new pass."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


class _Passes(click.Group):
    """A group whose commands may be left out: ``passes`` and ``passes NAME`` mean ``passes show``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the command in that was left out."""
        named = bool(args) and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else ["show", *args])


@click.group("passes", cls=_Passes, no_args_is_help=False, subcommand_metavar="[NAME | new NAME]")
def command() -> None:
    """List the passes, presets and scopes, describe one, or write the skeleton of a new pass.

    \b
      vacc-opt passes                  all of them
      vacc-opt passes fuse-gqa         one: promise, order, options, an example
      vacc-opt passes new fuse-relu    a pass and its test, ready to be changed

    A pass is used by its name in a pipeline: `-p simplify,fuse-gqa{expect=30}`.
    """


@command.command("show", short_help="List all, or describe NAME; the word `show` may be left out.")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object each.")
@click.option("--markdown", is_flag=True, help="Print the reference page of the documentation.")
def show(name: str | None, as_json: bool, markdown: bool) -> None:
    """List the passes, presets and scopes, or describe NAME."""
    from vacc_opt.passes.infra.author.catalog import entries, entry
    from vacc_opt.passes.infra.author.reference import described, page, table

    # the page is the project's own
    chosen = [entry(name)] if name else list(entries(plugins=not markdown).values())
    if markdown:
        click.echo(page(chosen), nl=False)
    elif as_json:
        click.echo(json.dumps([asdict(one) for one in chosen], indent=2))
    else:
        click.echo(described(chosen[0]) if name else table(chosen), nl=False)


@command.command("new", short_help="Write the skeleton of a pass, and its test.")
@click.argument("name")
@click.option("--group", metavar="GROUP", help="Directory under passes/.  [default: fuse]")
@click.option("--kind", default="exact", show_default=True, metavar="KIND", help="What the pass promises of values.")
@click.option(
    "--plugin",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write a distribution of its own into DIR, which vacc-opt finds once it is installed.",
)
def new(name: str, group: str | None, kind: str, plugin: Path | None) -> None:
    """Write a pass called NAME that works as it stands, its tests, and its entry in docs/passes.md.

    KIND is exact, reassociating, lossy or interface; GROUP is fuse, simplify, quantize, shard or legalize. Nothing is
    written over, and all files are written or none.
    """
    from vacc_opt.passes.infra.author.scaffold import new_pass, new_plugin

    if plugin is not None and group is not None:
        raise click.UsageError("--group names a directory of this project, --plugin writes outside of it")
    made = new_plugin(name, kind, plugin) if plugin is not None else new_pass(name, group or "fuse", kind)
    for path, what in made.files:
        click.echo(f"  wrote  {path}  {what}")
    click.echo("next")
    for line in made.next_steps:
        click.echo(f"  {line}")

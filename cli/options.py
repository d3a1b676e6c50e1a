"""Options in named groups, and options whose value may be left out (``--print-ir-after[=PASS]``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

EVERY = "*"  # the value of an OptionalValue that is given without one
_F = TypeVar("_F", bound=Callable[..., Any])


class Grouped(click.Option):
    """An option under a heading of ``--help``."""

    def __init__(self, *args: Any, group: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class OptionalValue(Grouped):
    """A repeatable option whose value is joined by ``=`` or left out, which means all.

    The word after it is never its value, so that ``opt --print-ir-after model.onnx`` runs on the model.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, multiple=True, **kwargs)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """The value in brackets, joined to the name."""
        return f"{self.opts[0]}[={self.metavar}]", self.help or ""


class GroupedCommand(click.Command):
    """A command whose options are listed group by group, in the order in which the groups first appear."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give options without their optional value the value that means all."""
        optional = {name for p in self.params if isinstance(p, OptionalValue) for name in p.opts}
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [f"{a}={EVERY}" if a in optional else a for a in args[:end]] + args[end:])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section a group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "") or "Options", []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


def option(group: str, *names: str, **kwargs: Any) -> Callable[[_F], _F]:
    """A ``click.option`` under a heading."""
    return click.option(*names, cls=Grouped, group=group, **kwargs)


def optional_value(group: str, *names: str, **kwargs: Any) -> Callable[[_F], _F]:
    """An :class:`OptionalValue` under a heading."""
    return click.option(*names, cls=OptionalValue, group=group, **kwargs)


def what_if_option(command: _F) -> _F:
    """``--what-if`` of the commands that take a target."""
    return click.option(
        "--what-if",
        multiple=True,
        metavar="KEY=VALUE",
        help="Another number of the target; repeatable: ddr.bytes_per_cycle=200.",
    )(command)


def trust_option(command: _F) -> _F:
    """``--trust-remote-code`` of the commands that export a checkpoint."""
    return click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run the Python code that comes with a checkpoint, in place of our own definition of the model.",
    )(command)

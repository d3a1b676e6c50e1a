"""Instruments that show the graph around passes: whole, only what changed, or as files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vacc_opt.ir import Graph
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import to_text
from vacc_opt.passes.infra.base import Pass
from vacc_opt.passes.infra.instrument import Instrument, PassRecord, Step
from vacc_opt.passes.infra.pipeline import flat
from vacc_opt.passes.infra.registry import all_passes
from vacc_opt.passes.infra.show.diff import compare, render
from vacc_opt.passes.infra.show.files import write_whole
from vacc_opt.passes.infra.show.listing import Listing, aligned, listing

if TYPE_CHECKING:
    from vacc_opt.passes.infra.pipeline import Item

ALL = "*"
INPUT = "input"  # the dump of the graph before the first pass
_CYAN, _RESET = "\x1b[1;36m", "\x1b[0m"
_DUMP = re.compile(r"\d{3,}-(?:.*\.)?([\w-]+)\.vacc")


@dataclass(frozen=True)
class Selection:
    """Some passes by name, or all of them."""

    names: frozenset[str] = frozenset()

    def __contains__(self, item: Pass) -> bool:
        return ALL in self.names or item.name in self.names

    def __bool__(self) -> bool:
        return bool(self.names)


def select(flag: str, names: Sequence[str], items: Sequence[Item]) -> Selection:
    """The passes that a flag names, each held against the pipeline.

    Raises:
        UserError: a name that is no pass, or a pass that the pipeline does not run.
    """
    runs = dict.fromkeys(item.name for item in flat(items) if isinstance(item, Pass))
    for name in names:
        if name == ALL or name in runs:
            continue
        if name in all_passes():
            hint = f"it runs {', '.join(runs)}" if runs else "it is empty"
            raise UserError(f"{flag}={name}: the pipeline does not run {name}", hint)
        raise UserError(f"{flag}={name}: unknown pass {name!r}", did_you_mean(name, all_passes()))
    return Selection(frozenset(names))


@dataclass(eq=False)
class PrintIR(Instrument):
    """Prints the graph before and after passes, whole or as a comparison.

    ``write`` takes one text of several lines; ``after_change`` prints the whole graph after each pass that changed it,
    ``diff`` what each pass changed.
    """

    write: Callable[[str], None]
    before_passes: Selection = Selection()
    after_passes: Selection = Selection()
    after_change: bool = False
    diff: bool = False
    color: bool = False
    _before: Listing | None = None

    def before(self, step: Step, graph: Graph) -> None:
        """Print, and keep what the comparison needs."""
        if step.item in self.before_passes:
            self._print(f"before {_numbered(step)}", f"{len(graph):,} nodes", aligned(list(listing(graph).values())))
        self._before = listing(graph) if self.diff else None

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        """Print what was asked for."""
        if self._before is not None:
            diff = compare(self._before, listing(graph))
            was = sum(row.kind == "node" for row in self._before.values())
            counts = f"; {was:,} -> {len(graph):,}" if was != len(graph) else ""
            self._print(_numbered(step), diff.summary() + counts, render(diff, color=self.color))
        if step.item in self.after_passes or (self.after_change and record.changes):
            self._print(f"after {_numbered(step)}", f"{len(graph):,} nodes", aligned(list(listing(graph).values())))

    def _print(self, what: str, fact: str, lines: Sequence[str]) -> None:
        heading = f"=== {what} ({fact}) ==="
        self.write("\n".join([f"{_CYAN}{heading}{_RESET}" if self.color else heading, *lines]))


def _numbered(step: Step) -> str:
    return f"{step.index + 1} {step}"


class DumpIR(Instrument):
    """Writes the graph as it came and after every pass into numbered files that ``vacc-opt opt`` reads.

    ``003-fuse-gqa.vacc`` is the graph after the third pass, ``004-prefill.simplify.vacc`` that of a phase after the
    fourth. Each file appears whole or not at all; the files of an earlier run go.

    Raises:
        UserError: the directory cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory}: is a file", "name a directory for the graphs")
        if not directory.absolute().parent.is_dir():
            raise UserError(f"{directory}: the directory {directory.absolute().parent} does not exist")
        self.directory = directory
        self.written: int = 0

    def started(self, graph: Graph, items: Sequence[Item]) -> None:
        """Make the directory, remove the files of an earlier run, write the graph as it came."""
        self.directory.mkdir(exist_ok=True)
        for path in sorted(self.directory.iterdir()):
            match = _DUMP.fullmatch(path.name)
            if match is not None and (match[1] == INPUT or match[1] in all_passes()):
                path.unlink()
        self._write(0, INPUT, graph)

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        """Write the graph."""
        scope = re.sub(r"[^\w.-]+", "-", step.scope)
        self._write(step.index + 1, f"{scope}.{step.item.name}" if scope else step.item.name, graph)

    def text(self) -> str:
        """Where the graphs are."""
        return f"  -> {self.directory}  {self.written} graphs" if self.written else ""

    def _write(self, number: int, name: str, graph: Graph) -> None:
        write_whole(self.directory / f"{number:03d}-{name}.vacc", to_text(graph))
        self.written += 1

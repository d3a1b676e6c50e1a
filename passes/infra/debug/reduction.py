"""Reductions of a person's model: by a failing pass, or by a script; the small graph, what to say, and a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vacc_opt.ir import Graph
from vacc_opt.ir.copy import copy
from vacc_opt.passes.infra.check.locate import Verdict
from vacc_opt.passes.infra.debug.failures import find_failure, pytest_of, script_test_of
from vacc_opt.passes.infra.debug.reduce import Reducer
from vacc_opt.passes.infra.debug.reproducer import Numerics
from vacc_opt.passes.infra.debug.scripts import Script
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.pipeline import dump_pipeline
from vacc_opt.passes.infra.show.listing import line

if TYPE_CHECKING:
    from vacc_opt.passes.infra.pipeline import Item

LINES_SHOWN = 15
Say = Callable[[str], None]


@dataclass(frozen=True)
class Reduction:
    """A small graph that still shows the bug, the nodes it had before, the tries, and a pytest file."""

    graph: Graph
    before: int
    tries: int
    test: str
    why: str = ""

    def lines(self) -> list[str]:
        """The result for people."""
        nodes = self.graph.nodes()
        shown = [f"  {line(node)}" for node in nodes[:LINES_SHOWN]]
        more = [f"  ... {len(nodes) - LINES_SHOWN} nodes more"] if len(nodes) > LINES_SHOWN else []
        count = f"{self.before:,} nodes to {len(nodes):,} in {self.tries} tries"
        return [*([self.why] if self.why else []), count, *shown, *more]


def reduce_failure(
    graph: Graph, items: Sequence[Item], numerics: Numerics | None, text: str, say: Say = lambda line: None
) -> Reduction:
    """The smallest graph found on which the failing pass of a pipeline still fails.

    Raises:
        UserError: the pipeline does not fail, or not in that way.
    """
    failure = find_failure(graph, items, numerics, text)
    before = len(failure.graph)
    reducer = Reducer(failure.graph, failure.interesting(text), focus=failure.focus(), say=say)
    small = reducer.run()
    why = (str(failure.error).splitlines() or [type(failure.error).__name__])[0]
    return Reduction(small, before, reducer.calls, pytest_of(failure, small), why)


def reduce_script(
    graph: Graph, items: Sequence[Item], command: str, folder: Path, say: Say = lambda line: None
) -> Reduction:
    """The smallest graph found that a script calls bad, after ``items`` have run on it.

    Raises:
        UserError: it does not call the whole model bad, or cannot be run.
    """
    script = Script(command, folder)

    def interesting(tried: Graph) -> bool:
        try:
            run_pipeline(tried, items)
        except Exception:
            return False
        return script(tried) is Verdict.BAD

    reducer = Reducer(copy(graph), interesting, say=say)
    small = reducer.run()
    return Reduction(small, len(graph), reducer.calls, script_test_of(command, small, dump_pipeline(items)))

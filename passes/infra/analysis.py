"""Analyses: facts computed from a graph on demand, kept until the graph changes, or longer where a pass says so."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from vacc_opt.ir import Graph
from vacc_opt.ir.errors import CheckError

T = TypeVar("T")


@dataclass(frozen=True)
class _Entry:
    analysis: Analysis[Any]
    version: int
    result: Any


@dataclass(frozen=True, eq=False)
class Analysis(Generic[T]):
    """A named fact of a graph.

    Calling it gives the kept result while the graph's ``version`` is the one it was computed at. A pass that lists the
    name in ``preserves`` promises that its changes leave the result true.

    >>> size = Analysis("size", len)
    >>> size(Graph("empty"))
    0
    """

    name: str
    compute: Callable[[Graph], T]

    def __call__(self, graph: Graph) -> T:
        """The result for ``graph`` as it is now."""
        kept = _RESULTS.setdefault(graph, {})
        entry = kept.get(self.name)
        if entry is None or entry.version != graph.version or entry.analysis is not self:
            entry = kept[self.name] = _Entry(self, graph.version, self.compute(graph))
        result: T = entry.result
        return result


_RESULTS: WeakKeyDictionary[Graph, dict[str, _Entry]] = WeakKeyDictionary()


def after_pass(graph: Graph, before: int, preserves: Collection[str], *, check: str = "") -> None:
    """Keep what a pass that began at version ``before`` preserves, forget the rest.

    Args:
        graph: the graph after the pass.
        before: its version before the pass.
        preserves: names of analyses that the pass declares to be true still.
        check: name of the pass when preserved results are to be computed again and compared.

    Raises:
        CheckError: a preserved result is not what the analysis now gives.
    """
    kept = _RESULTS.get(graph)
    if not kept:
        return
    for name, entry in list(kept.items()):
        if entry.version == graph.version:
            continue
        if entry.version != before or name not in preserves:
            del kept[name]
            continue
        if check:
            fresh = entry.analysis.compute(graph)
            if fresh != entry.result:
                raise CheckError(
                    f"{check}: preserves the analysis {name!r} by its declaration, but changed it",
                    f"remove {name!r} from `preserves` of {check}",
                )
        kept[name] = _Entry(entry.analysis, graph.version, entry.result)

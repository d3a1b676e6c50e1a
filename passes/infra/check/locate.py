"""From a wrong pass to the first wrong application, and from there to the first wrong value."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir import Graph, Node, Provenance, Value
from vacc_opt.ir.rewriter import Application, ApplicationLimit, Rewriter
from vacc_opt.passes.infra.base import Pass
from vacc_opt.passes.infra.check.calls import HIDDEN
from vacc_opt.passes.infra.show.diff import compare as compare_listings
from vacc_opt.passes.infra.show.diff import render
from vacc_opt.passes.infra.show.listing import listing_of

Array = npt.NDArray[Any]
LINES_SHOWN = 12
_CANDIDATES = 400  # values behind the first rewrite that are looked at, in topological order


class Verdict(enum.Enum):
    """What a test says of a graph: the bug is not there, it is, or this graph cannot be tested."""

    GOOD = "good"
    BAD = "bad"
    SKIP = "skip"


def first_bad(good: int, bad: int, test: Callable[[int], Verdict]) -> tuple[int, int]:
    """Narrow ``good < bad`` by halves; gives the last number known good and the first known bad.

    They are neighbors, unless the numbers between them cannot be tested. ``test`` is not asked about the ends.

    >>> first_bad(0, 100, lambda n: Verdict.BAD if n >= 37 else Verdict.GOOD)
    (36, 37)
    """
    skipped: set[int] = set()
    while True:
        between = [n for n in range(good + 1, bad) if n not in skipped] if skipped else range(good + 1, bad)
        if not between:
            return good, bad
        middle = between[len(between) // 2]
        verdict = test(middle)
        if verdict is Verdict.SKIP:
            skipped.add(middle)
        elif verdict is Verdict.BAD:
            bad = middle
        else:
            good = middle


class _Recording(Rewriter):
    """A rewriter that knows which value each new value took the place of."""

    def __init__(self, graph: Graph, by: str, limit: int | None) -> None:
        super().__init__(graph, by=by, limit=limit)
        self.replaced: dict[str, str] = {}  # new name -> old name
        self.moved: set[str] = set()  # names that mean something else now
        self.last: Application | None = None  # begun, whether or not it was finished
        self.error: Exception | None = None

    def _begin(self, sources: Sequence[Node], rule: str) -> None:
        super()._begin(sources, rule)
        self.last = self.applications[-1]

    def replace(self, old: Value, new: Value) -> None:
        self.replaced.setdefault(new.name, old.name)
        super().replace(old, new)

    def insert_after(self, value: Value, make: Callable[[Value], Value]) -> Value:
        new = super().insert_after(value, make)
        self.replaced[new.name] = value.name
        self.moved.add(value.name)
        return new


@contextmanager
def applied(item: Pass, graph: Graph, limit: int | None) -> Iterator[_Recording]:
    """``graph`` after the first ``limit`` applications of a pass, for the length of the block.

    What the pass raises is kept as ``error``; ``last`` is the application in which that was.
    """
    rw = _Recording(graph, item.name, limit)
    try:
        item.run(graph, rw)
    except ApplicationLimit:
        pass
    except Exception as error:
        rw.error = error
    try:
        yield rw
    finally:
        rw.rollback()


def first_application(item: Pass, graph: Graph, total: int, test: Callable[[Rewriter], Verdict]) -> Application | None:
    """The first application after which ``test`` says bad; None where the pass makes none, or none can be blamed."""

    def after(count: int) -> Verdict:
        with applied(item, graph, count) as rw:
            return Verdict.SKIP if rw.error is not None else test(rw)

    if not total or after(total) is not Verdict.BAD:
        return None
    _, bad = first_bad(0, total, after)
    with applied(item, graph, bad) as rw:
        return rw.applications[-1]


@dataclass(frozen=True)
class Twin:
    """A value after a pass, and the name of the value before it that it should equal."""

    name: str
    before: str
    provenance: Provenance


def twins(item: Pass, graph: Graph, limit: int | None) -> list[Twin]:
    """Values that a pass may have changed, first in topological order, each with its counterpart of before.

    Values whose own name still means the same are compared with themselves; one that took the place of another, with
    that. Values that exist on one side only have no counterpart.
    """
    names = set(graph.values)
    nodes = {id(node): (node.op, _operands(node), id(node.attributes)) for node in graph.nodes()}
    keep = [node.attributes for node in graph.nodes()]  # so that no identity is used twice
    found: list[Twin] = []
    dirty: set[Value] = set()
    with applied(item, graph, limit) as rw:
        for node in graph.nodes():
            same = nodes.get(id(node)) == (node.op, _operands(node), id(node.attributes))
            if same and not any(v in dirty for v in node.inputs):
                continue
            dirty.update(node.outputs)
            for value in node.outputs:
                before = _counterpart(value.name, rw.replaced, names)
                if before in names and value.name not in rw.moved:
                    found.append(Twin(value.name, before, node.provenance))
            if len(found) >= _CANDIDATES:
                break
    del keep
    return found


def _operands(node: Any) -> tuple[object, ...]:
    return tuple((v.name, id(v.const)) if v is not None else None for v in node.inputs)


def _counterpart(name: str, replaced: Mapping[str, str], names: set[str]) -> str:
    seen: set[str] = set()
    while name not in names and name in replaced and name not in seen:
        seen.add(name)
        name = replaced[name]
    return name


def shown_change(item: Pass, graph: Graph, application: Application) -> list[str]:
    """What one application changed, as lines of nodes before (-) and after (+)."""
    with applied(item, graph, application.index - 1):
        before = listing_of(graph)
    with applied(item, graph, application.index):
        after = listing_of(graph)
    lines = render(compare_listings(before, after), context=0)
    more = [f"... {len(lines) - LINES_SHOWN} lines more"] if len(lines) > LINES_SHOWN else []
    return lines[:LINES_SHOWN] + more


def in_model(provenance: Provenance) -> str:
    """`` [module file:line]``, or nothing where the model says nothing."""
    return f" [{provenance.where()}]" if provenance.origins else ""


class Capture:
    """Keeps the values of some names as a run computes them."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.values: dict[str, list[Array]] = {}

    def __call__(self, name: str, ranks: list[Array]) -> None:
        """Hear a value."""
        if name in self.names:
            self.values[name] = ranks


@dataclass
class Ranges:
    """The range of what a run computes: its finite numbers, and the first value with any of each kind that is none."""

    low: float = math.inf
    high: float = -math.inf
    turned: dict[str, str] = field(default_factory=dict)  # "NaN", "infinity", "-infinity" -> the first such value

    def __call__(self, name: str, ranks: list[Array]) -> None:
        """Hear a value."""
        for array in ranks:
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "fV" or not array.size:
                continue
            low, high = float(array.min()), float(array.max())  # NaN as soon as one element is
            if np.isfinite(low) and np.isfinite(high):
                if max(-low, high) < HIDDEN:
                    self.low, self.high = min(self.low, low), max(self.high, high)
                continue
            wide = array.astype(np.float64)
            use = np.abs(wide) < HIDDEN  # false for NaN
            self.low = float(wide.min(initial=self.low, where=use))
            self.high = float(wide.max(initial=self.high, where=use))
            kinds = {"NaN": np.isnan(wide), "infinity": wide == np.inf, "-infinity": wide == -np.inf}
            for kind, where in kinds.items():
                if where.any():
                    self.turned.setdefault(kind, name)

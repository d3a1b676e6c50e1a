"""What matching gives: a match with its captures, the reason of a check, or the deepest miss at a root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vacc_opt.ir import Dim, Graph, Node, Value
from vacc_opt.passes.infra.patterns.pattern import Pattern
from vacc_opt.passes.infra.patterns.values import scalar, shown


@dataclass(frozen=True)
class Miss:
    """The deepest failure at one root: the nodes that had matched, and what then did not.

    ``pattern`` is the subpattern that was expected of ``value``; ``node`` reads that value.
    """

    template: str = ""
    arguments: tuple[object, ...] = ()
    node: Node | None = None
    matched: tuple[Node, ...] = ()
    pattern: Pattern | None = None
    value: Value | None = None

    @property
    def depth(self) -> int:
        """Number of nodes that had matched."""
        return len(self.matched)

    def __str__(self) -> str:
        return self.template.format(*(shown(a) if isinstance(a, Value) else a for a in self.arguments))


@dataclass(frozen=True)
class Reason:
    """Why a check declined a structural match; formatted only when somebody reads it."""

    template: str
    values: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return self.template.format(**dict(self.values))


@dataclass
class Match:
    """A match: captures are attributes (``m.x`` a Value, a Node or an attribute), ``m.nodes`` the nodes, root first.

    ``dims`` holds the named sizes, ``values`` the matched value of each root of the pattern, ``targets`` the values
    that a rewrite replaces: those, or for a single node all its outputs.
    """

    graph: Graph
    root: Node
    captures: dict[str, Any] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    memo: dict[object, Any] = field(default_factory=dict)
    dims: dict[str, Dim] = field(default_factory=dict)
    values: tuple[Value, ...] = ()
    targets: tuple[Value, ...] = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["captures"][name]
        except KeyError:
            raise AttributeError(f"the match has no capture {name!r}") from None

    def get(self, name: str) -> Any:
        """A capture, or None when its alternative was not taken."""
        return self.captures.get(name)

    def number(self, name: str) -> float:
        """The value of a captured scalar constant; raises ValueError for another capture."""
        found = scalar(self.captures[name])
        if found is None:
            raise ValueError(f"the capture {name!r} is no constant number: annotate it `Scalar`")
        return found

    def reason(self, template: str, **values: object) -> Reason:
        """A reason to decline."""
        return Reason(template, tuple(values.items()))

    def once(self, key: object, compute: Callable[[], Any]) -> Any:
        """``compute()``, evaluated once for each key in a run of the pass."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]


@dataclass(frozen=True)
class NotMatched:
    """A root that a pass did not rewrite: the deepest partial match, or the reasons of its check."""

    root: Node
    miss: Miss | None = None
    reasons: tuple[Reason, ...] = ()
    declined: tuple[Node, ...] = ()

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that the pattern took for its own."""
        return self.miss.matched if self.miss is not None else self.declined

    @property
    def around(self) -> set[Node]:
        """These nodes, and the one that stands where the partial match ends."""
        value = self.miss.value if self.miss is not None else None
        ends = () if value is None or value.producer is None else (value.producer,)
        return {*self.nodes, *ends}

    @property
    def place(self) -> Node:
        """The node to look at."""
        return (self.miss.node if self.miss is not None else None) or self.root

    def message(self, size: int) -> str:
        """One line: the reasons, or what was found after how many of ``size`` nodes."""
        if self.miss is None:
            return "; ".join(map(str, self.reasons))
        return f"{self.miss} after {self.miss.depth} of {size} nodes"

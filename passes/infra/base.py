"""What a pass is: a frozen dataclass of options with a name, a kind and a ``run``."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vacc_opt.ir import Graph, Node
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.check.adapters import Adapter
from vacc_opt.passes.infra.options import Named, Option, option

__all__ = ["Kind", "Option", "Outcome", "Pass", "Remark", "RuleStats", "ancestors", "option", "where"]


class Kind(enum.Enum):
    """What a pass promises about values; the manager and the tests hold it to that."""

    EXACT = "exact"
    REASSOCIATING = "reassociating"
    LOSSY = "lossy"
    INTERFACE = "interface"

    @property
    def promise(self) -> str:
        """What a pass of this kind is held to, for people."""
        return _PROMISES[self]


_PROMISES = {
    Kind.EXACT: "the same values, bit for bit",
    Kind.REASSOCIATING: "the same values up to rounding: within 1e-5 of the output's scale in fp32",
    Kind.LOSSY: "other numbers, changed only as its text defines",
    Kind.INTERFACE: "the same model behind other inputs or outputs",
}


@dataclass(frozen=True)
class Remark:
    """Something a pass says of one place: it fired (passed), it declined and why (missed), or a fact (analysis)."""

    kind: str
    pass_name: str
    message: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.pass_name}: {self.message}" + (f" [{self.where}]" if self.where else "")


@dataclass
class RuleStats:
    """How one rule did in a run: roots tried, matched and rewritten, seconds in both (if measured)."""

    tried: int = 0
    matched: int = 0
    applied: int = 0
    seconds: float = 0.0


@dataclass
class Outcome:
    """What one run of a pass did: remarks, and one sentence for people."""

    summary: str = ""
    remarks: list[Remark] = field(default_factory=list)
    fused: int | None = None
    candidates: int | None = None
    rules: dict[str, RuleStats] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass(Named, ABC):
    """A transformation of a whole graph.

    Subclasses are frozen dataclasses whose fields are made by :func:`option`; the first line of the docstring is the
    one-line help. ``runs_after`` and ``runs_before`` name passes that must stand on that side where a pipeline holds
    both; ``preserves`` names the analyses that stay true although the pass changed the graph.
    """

    kind: ClassVar[Kind]
    runs_after: ClassVar[tuple[str, ...]] = ()
    runs_before: ClassVar[tuple[str, ...]] = ()
    preserves: ClassVar[tuple[str, ...]] = ()
    idempotent: ClassVar[bool] = True

    @abstractmethod
    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Transform ``graph`` through ``rw`` and say what was done.

        Raises:
            VaccError: the pass cannot do what it was asked for; the manager restores the graph, the pipeline stops.
        """

    def adapter(self, before: Graph) -> Adapter | None:
        """How a call of ``before`` is put to the graph after this pass, and the results compared.

        A pass of kind INTERFACE ships its own; without one its values cannot be checked.
        """
        return None if self.kind is Kind.INTERFACE else Adapter()

    def reference(self, before: Graph, roots: Collection[str]) -> Graph | None:
        """What a LOSSY pass promises: ``before``, which may be changed, made to compute its definition.

        ``roots`` are those of the applications that were made. None: the pass has no definition, only a loss.
        """
        return None


def where(node: Node) -> str:
    """A place for a remark: the node's first output, and the model's source line where it is known."""
    return f"{node.output.name} ({node.provenance.where()})" if node.provenance.origins else node.output.name


def ancestors(graph: Graph, *values: Any) -> Iterator[Node]:
    """All nodes that the values depend on, each once, nearest first."""
    seen: set[Node] = set()
    pending = [v.producer for v in values if v is not None and v.producer is not None]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        pending += [v.producer for v in node.inputs if v is not None and v.producer is not None]

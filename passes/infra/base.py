"""What a pass is: a frozen dataclass of options with a name, a kind and a ``run``."""

from __future__ import annotations

import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vacc_opt.ir import Graph, Node
from vacc_opt.ir.rewriter import Rewriter


class Kind(enum.Enum):
    """What a pass promises about values; the manager and the tests hold it to that."""

    EXACT = "exact"
    REASSOCIATING = "reassociating"
    LOSSY = "lossy"
    INTERFACE = "interface"


def option(default: Any, help: str, *, metavar: str = "") -> Any:
    """A pass option: a dataclass field whose ``help`` feeds the CLI, the documentation and the error messages."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True)
class Option:
    """One declared option of a pass."""

    name: str
    type: str
    default: object
    help: str


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
class Outcome:
    """What one run of a pass did: remarks, and one sentence for people."""

    summary: str = ""
    remarks: list[Remark] = field(default_factory=list)
    fused: int | None = None
    candidates: int | None = None


@dataclass(frozen=True)
class Pass(ABC):
    """A transformation of a whole graph.

    Subclasses are frozen dataclasses whose fields are made by :func:`option`; the first line of the docstring is the
    one-line help.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]

    @abstractmethod
    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Transform ``graph`` through ``rw`` and say what was done.

        Raises:
            VaccError: the pass cannot do what it was asked for; the pipeline stops there.
        """

    @classmethod
    def options(cls) -> list[Option]:
        """The declared options in order."""
        return [
            Option(f.name, str(f.type), f.default, f.metadata["help"])
            for f in dataclasses.fields(cls)
            if "help" in f.metadata
        ]

    @classmethod
    def help_line(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    def spec(self) -> str:
        """The pass as pipeline text, with the options that differ from their defaults."""
        given = [(o.name, getattr(self, o.name)) for o in self.options() if getattr(self, o.name) != o.default]
        if not given:
            return self.name
        inner = ",".join(f"{name}={_text(value)}" for name, value in given)
        return f"{self.name}{{{inner}}}"


def _text(value: object) -> str:
    if isinstance(value, str) and (not value or value == "none" or value.strip() != value or set(value) & set(",}{")):
        return f'"{value}"'
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def where(node: Node) -> str:
    """A place for a remark: the node's first output and the model's source line."""
    return f"{node.output.name} ({node.provenance.where()})"


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

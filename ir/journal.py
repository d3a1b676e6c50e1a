"""The journal of a pass: applications as transactions, what each changed, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

from vacc_opt.ir.graph import Graph, Node
from vacc_opt.ir.provenance import Provenance, merge
from vacc_opt.ir.schema import RewriteError
from vacc_opt.ir.verify import type_problem


class Application(NamedTuple):
    """One application of a rule in a run: the ``index``-th (from 1), by ``rule``, to the node that makes ``root``."""

    index: int  # type: ignore[assignment]  # the method of tuples is of no use here
    rule: str
    root: str
    provenance: Provenance

    @property
    def where(self) -> str:
        """Module and source line of the root."""
        return self.provenance.where()


class ApplicationLimit(Exception):
    """Raised instead of an application that the limit of the run does not allow; no error, so no VaccError."""


class _Applying:
    """The context manager of one application; an object, because a generator costs as much as a small rewrite."""

    __slots__ = ("_rule", "_rw", "_sources")

    def __init__(self, rw: Journal, sources: Sequence[Node], rule: str) -> None:
        self._rw, self._sources, self._rule = rw, sources, rule

    def __enter__(self) -> None:
        self._rw._begin(self._sources, self._rule)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._rw._commit()
        else:
            self._rw._abort()


# how to take a step back, and with which arguments behind the graph
Undo = tuple[Callable[..., object], *tuple[Any, ...]]


class Journal:
    """The changes of one graph by one pass, application by application, so that each or all can be taken back."""

    def __init__(self, graph: Graph, by: str = "", *, limit: int | None = None) -> None:
        self.graph = graph
        self.by = by
        self.limit = limit
        self.applications: list[Application] = []
        self.made: list[Node] = []
        self.erased: int = 0
        graph._spread()
        self._journal: list[Undo] = []
        self._names = graph._counter
        self._sources: Sequence[Node] = ()
        self._provenance: Provenance | None = None  # of the nodes that the present application makes
        self._changed: dict[Node, bool] = {}  # True: made or rewired
        self._unchecked: dict[Node, None] = {}  # nodes whose operands or attributes may not fit any more
        self._stems: dict[Node, str] = {}  # of the nodes made, the name of what they stand for
        self._earlier: dict[Node, bool] = {}  # changed before the present application
        self._gone: list[Node] = []  # erased by it
        self._begun: tuple[int, int, int] | None = None  # size of the journal, nodes erased, and the counter of names

    @property
    def modified(self) -> int:
        """Number of changes since the rewriter was made, those taken back not counted."""
        return len(self._journal)

    def applying(self, sources: Sequence[Node] = (), rule: str = "") -> _Applying:
        """One application of ``rule`` (default: the pass): new nodes inherit ``sources``' provenance.

        An exception inside undoes everything. At the end, nodes whose operands or attributes were changed must still
        have the types that their operator gives.

        Raises:
            RewriteError: applications nest, or a changed node does not fit; the graph is as it was.
            ApplicationLimit: ``limit`` applications have been made.
        """
        return _Applying(self, sources, rule)

    def _begin(self, sources: Sequence[Node], rule: str) -> None:
        if self._begun is not None:
            raise RewriteError(f"{self.by}: a rewrite is already being applied")
        index = len(self.applications)
        if index == self.limit:
            raise ApplicationLimit(f"{self.by}: {index} applications are made")
        root = sources[0] if sources else None
        name, provenance = (root.outputs[0].name, root.provenance) if root is not None else ("", _NOWHERE)
        self.applications.append(Application(index + 1, rule or self.by, name, provenance))
        self._begun = len(self._journal), self.erased, self.graph._counter
        self._earlier, self._changed, self._gone = self._changed, {}, []
        self._sources, self._provenance, self.made = sources, None, []
        self._unchecked.clear()

    def _commit(self) -> None:
        assert self._begun is not None
        for node in self._unchecked:
            problem = type_problem(self.graph, node) if node in self.graph else None
            if problem is not None:
                self._abort()
                raise RewriteError(f"{self.by}: {problem}")
        if len(self._journal) == self._begun[0]:
            self.applications.pop()
        if self._earlier:
            for node in self._gone:
                self._earlier.pop(node, None)
            for node, rewired in self._changed.items():
                self._earlier[node] = rewired or self._earlier.get(node, False)
            self._changed = self._earlier
        self._begun, self._sources, self._provenance, self._earlier = None, (), None, {}

    def _abort(self) -> None:
        assert self._begun is not None
        journal, self.erased, self.graph._counter = self._begun
        self._undo_to(journal)
        for node in self.made:
            self._stems.pop(node, None)
        self._changed, self._earlier = self._earlier, {}
        self.applications.pop()
        self._begun, self._sources, self._provenance, self.made = None, (), None, []

    def rollback(self) -> None:
        """Undo everything since the rewriter was made: the graph has the same text, order and names again."""
        self._undo_to(0)
        self.graph._counter = self._names
        self.applications.clear()
        self._changed.clear()
        self.made = []

    def _undo_to(self, mark: int) -> None:
        if len(self._journal) == mark:
            return
        while len(self._journal) > mark:
            undo, *arguments = self._journal.pop()
            undo(self.graph, *arguments)
        self.graph._settle()

    @contextmanager
    def on_behalf_of(self, *sources: Node) -> Iterator[None]:
        """Within an application, let new nodes inherit the provenance of these nodes only."""
        before, self._sources, self._provenance = self._sources, sources, None
        try:
            yield
        finally:
            self._sources, self._provenance = before, None

    def take_changed(self) -> dict[Node, bool]:
        """The nodes that changed since the last call and are still there: True if made or rewired, False if they only
        lost a use."""
        changed, self._changed = self._changed, {}
        return changed

    def _log(self, *undo: Any) -> None:
        self.graph.version += 1
        self._journal.append(undo)

    def _heritage(self) -> Provenance:
        """What the present application hands down to what it makes."""
        if self._provenance is None:
            self._provenance = merge([s.provenance for s in self._sources], self.by)
        return self._provenance


_NOWHERE = Provenance()

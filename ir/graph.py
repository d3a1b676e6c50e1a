"""The graph: SSA values and nodes, stored in a networkx multigraph with an op index and use lists beside it.

Only this file knows how a graph is stored. Everything outside reads it through the methods below and changes it through
:class:`vacc_opt.ir.rewriter.Rewriter`; the methods that begin with an underscore keep the three structures in step.

Values, nodes and uses carry the number of the change that made them, and every dictionary is in the order of these
numbers: that is how a change that is taken back leaves no trace in any order. Nodes also carry a *place*, a number that
is larger than that of every node they read: that is how a new operand is known to close no cycle without a search.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from heapq import heappop, heappush
from operator import attrgetter, itemgetter
from types import MappingProxyType
from typing import Any

import networkx as nx
import numpy as np

from vacc_opt.ir.provenance import Provenance
from vacc_opt.ir.tensor import TensorExpr
from vacc_opt.ir.types import Dim, TensorType

Attribute = Any  # int | float | str | bytes | tuple of these | numpy array
_UNKNOWN = Provenance()
_NO_DATA: Mapping[str, Any] = MappingProxyType({})  # of every node and edge of the multigraph
GAP = 1 << 20  # between the places of an imported node and of its users: what a rewrite puts there seldom moves others


def attribute_key(attributes: Mapping[str, Attribute]) -> tuple[object, ...]:
    """A form of attributes that is equal and hashes equal when they are, element types included."""
    if not attributes:
        return ()
    return tuple(sorted([(name, *_hashable(value)) for name, value in attributes.items()], key=itemgetter(0)))


def _hashable(value: Attribute) -> tuple[object, ...]:
    if isinstance(value, np.ndarray):
        data = tuple(value.reshape(-1)) if value.dtype == object else value.tobytes()  # strings lie behind pointers
        return "array", value.dtype.name, value.shape, data
    if isinstance(value, tuple):
        return "tuple", *(_hashable(v) for v in value)
    if isinstance(value, float):
        return "float", value.hex()  # 0.0 and -0.0 are equal, but not the same attribute
    return type(value).__name__, value


Positions = Mapping[int, Mapping[str, Any]]  # the parallel edges between two nodes, by operand
Edges = dict["Node", Positions]  # of one node, by the node at the other end


@cache
def _edge(position: int) -> Positions:
    """A single edge: one object for all pairs of nodes that are joined by one edge to this operand, as most are."""
    return MappingProxyType({position: _NO_DATA})


def _with(edges: Positions | None, position: int) -> Positions:
    if edges is None:
        return _edge(position)
    own = edges if isinstance(edges, dict) else dict(edges)
    own[position] = _NO_DATA
    return own


def _without(edges: Positions, position: int) -> Positions:
    own = edges if isinstance(edges, dict) else dict(edges)
    del own[position]
    return own


class Value:
    """A tensor in the graph: a graph input, a constant, or one output of a node.

    ``elements`` holds the entries of a small integer tensor as numbers or symbolic dimensions, where they are known:
    it is how ``Shape``/``Concat``/``Reshape`` chains are understood without running anything. ``provenance`` is that of
    a constant; a computed value has its node's.
    """

    __slots__ = ("const", "elements", "index", "name", "producer", "provenance", "serial", "type", "uses")

    def __init__(self, name: str, type: TensorType, const: TensorExpr | None = None) -> None:
        self.name: str = name
        self.type: TensorType = type
        self.const: TensorExpr | None = const
        self.producer: Node | None = None
        self.index: int = 0
        self.elements: tuple[Dim, ...] | None = None
        self.provenance: Provenance = _UNKNOWN
        self.uses: dict[tuple[Node, int], int] = {}  # to the number of the change that made the use
        self.serial: int = 0

    def __repr__(self) -> str:
        return f"<{self.name}: {self.type}>"

    @property
    def shape(self) -> tuple[Dim, ...] | None:
        """Shape of the type."""
        return self.type.shape

    @property
    def rank(self) -> int | None:
        """Number of dimensions, if known."""
        return self.type.rank

    @property
    def is_const(self) -> bool:
        """True for weights and literals."""
        return self.const is not None

    def users(self) -> list[Node]:
        """The nodes that read this value, each once, in order of first use."""
        return list(dict.fromkeys(node for node, _ in self.uses))


class Absent(Value):
    """An output that its node is not asked for: it keeps the place, nothing reads it, and ONNX has no name for it."""

    __slots__ = ()


class Node:
    """One operation: ``outputs = domain::op_type<attributes>(inputs)``. Compared by identity.

    ``incoming`` and ``outgoing`` are the graph's: the node's own rows of the multigraph.
    """

    __slots__ = (
        "attributes",
        "domain",
        "incoming",
        "inputs",
        "name",
        "op",
        "op_type",
        "outgoing",
        "outputs",
        "place",
        "provenance",
        "serial",
    )

    def __init__(
        self,
        op_type: str,
        inputs: Iterable[Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
        name: str = "",
        provenance: Provenance | None = None,
    ) -> None:
        self.op_type: str = op_type
        self.domain: str = domain
        self.op: str = f"{domain}::{op_type}" if domain else op_type  # ``MatMul`` or ``Vastai::AllReduce``
        self.inputs: tuple[Value | None, ...] = tuple(inputs)
        self.attributes: dict[str, Attribute] = dict(attributes or {})
        self.name: str = name
        self.outputs: tuple[Value, ...] = ()
        self.provenance: Provenance = provenance or _UNKNOWN
        self.place: int = 0
        self.serial: int = 0
        self.incoming: Edges = {}
        self.outgoing: Edges = {}

    @property
    def output(self) -> Value:
        """The first output."""
        return self.outputs[0]

    def input(self, index: int) -> Value | None:
        """The input at ``index``, None when it is absent."""
        return self.inputs[index] if index < len(self.inputs) else None

    def __repr__(self) -> str:
        return f"<{self.op} {self.name or (self.outputs[0].name if self.outputs else '')}>"


class Graph:
    """A single-assignment dataflow graph with a fixed, named interface; ``version`` grows with every change.

    >>> graph = Graph("empty")
    >>> len(graph)
    0
    """

    def __init__(self, name: str, *, opset: int = 24) -> None:
        self.name = name
        self.opset = opset
        self.version: int = 0
        self.ranks = 1
        self.metadata: dict[str, str] = {}
        self.domains: dict[str, int] = {}  # versions of the operators of other domains than the standard one
        self.functions: dict[str, Graph] = {}  # bodies of local functions, by the operator that calls them
        self.phases: dict[str, Graph] = {}  # this graph at the sizes of each entry point
        self.inputs: list[Value] = []
        self.outputs: dict[str, Value] = {}
        self.values: dict[str, Value] = {}
        self._structure: nx.MultiDiGraph[Node] = nx.MultiDiGraph()
        # the multigraph's own dictionaries: its methods for one edge cost several times what the dictionaries do
        structure: Any = self._structure
        self._node: dict[Node, Mapping[str, Any]] = structure._node
        self._succ: dict[Node, Edges] = structure._adj
        self._pred: dict[Node, Edges] = structure._pred
        self._by_op: dict[tuple[str, str], dict[Node, None]] = {}
        self._output_names: dict[Value, dict[str, None]] = {}
        self._order: list[Node] | None = None
        self._dense = False  # some places have no gap behind them
        self._counter = 0
        self._clock = 0
        self._restored = _Restored()

    # reading

    def __len__(self) -> int:
        return len(self._node)

    def __contains__(self, node: object) -> bool:
        return node in self._node

    @property
    def networkx(self) -> nx.MultiDiGraph[Node]:
        """A read-only networkx view: nodes are :class:`Node`, edge keys are input positions of the consumer.

        Nodes are in the order of their making; the order of edges carries no meaning.
        """
        view: nx.MultiDiGraph[Node] = nx.subgraph_view(self._structure)  # type: ignore[type-var,unused-ignore]
        return view

    def nodes(self) -> list[Node]:
        """All nodes in a topological order that depends on the graph alone (depth first from the outputs)."""
        if self._order is None:
            self._order = self._sort()
        return self._order

    def by_op(self, op_type: str, domain: str = "") -> list[Node]:
        """The nodes of one operator, oldest first; cost is that of the answer."""
        return list(self._by_op.get((domain, op_type), ()))

    def op_counts(self) -> dict[str, int]:
        """Number of nodes of each operator, by name."""
        counts = {f"{d}::{o}" if d else o: len(n) for (d, o), n in self._by_op.items() if n}
        return dict(sorted(counts.items()))

    def constants(self) -> list[Value]:
        """The values that hold a weight or a literal, by name."""
        return sorted((v for v in self.values.values() if v.const is not None), key=lambda v: v.name)

    def output_names(self, value: Value) -> list[str]:
        """The interface names under which a value leaves the graph."""
        return list(self._output_names.get(value, ()))

    def is_output(self, value: Value) -> bool:
        """True when the value leaves the graph."""
        return bool(self._output_names.get(value))

    def is_read(self, node: Node) -> bool:
        """True when a node or an output of the graph reads one of the node's values."""
        for value in node.outputs:  # noqa: SIM110 - the generator of any() would cost more than the answer
            if value.uses or self._output_names.get(value):
                return True
        return False

    def use_count(self, value: Value) -> int:
        """Uses by nodes plus uses as an output."""
        return len(value.uses) + len(self._output_names.get(value, ()))

    def input_named(self, name: str) -> Value | None:
        """The graph input of that name."""
        value = self.values.get(name)
        return value if value is not None and value in self.inputs else None

    def fresh_name(self, stem: str) -> str:
        """A value name that is not taken: the stem itself, else the stem with a number."""
        if stem not in self.values:
            return stem
        while True:
            self._counter += 1
            name = f"{stem}_{self._counter}"
            if name not in self.values:
                return name

    def _sort(self) -> list[Node]:
        order: list[Node] = []
        placed: dict[Node, bool] = {}  # False: on the way from the root to the present node
        for root in (*[v.producer for v in self.outputs.values() if v.producer is not None], *self._node):
            stack = [root]
            while stack:
                node = stack[-1]
                known = placed.get(node)
                if known is None:
                    placed[node] = False
                    for value in reversed(node.inputs):
                        producer = value.producer if value is not None else None
                        if producer is None or placed.get(producer):
                            continue
                        if producer in placed:
                            raise ValueError(f"a cycle passes through {producer!r}")
                        stack.append(producer)
                else:
                    stack.pop()
                    if not known:
                        placed[node] = True
                        order.append(node)
        return order

    # writing: for Rewriter and the importers only

    def _tick(self) -> int:
        """The number of a new change."""
        self.version += 1
        self._clock += 1
        return self._clock

    def _add_value(self, value: Value) -> None:
        if value.name in self.values:
            raise ValueError(f"two values are called {value.name!r}")
        value.serial = self._tick()
        self.values[value.name] = value

    def _remove_value(self, value: Value) -> None:
        self.version += 1
        del self.values[value.name]

    def _restore_value(self, value: Value) -> None:
        self.values[value.name] = value
        self._restored.values = True

    def _add_input(self, value: Value) -> None:
        self._add_value(value)
        self.inputs.append(value)

    def _remove_input(self, value: Value) -> int:
        """Give the position that the input had."""
        position = self.inputs.index(value)
        del self.inputs[position]
        self._remove_value(value)
        return position

    def _restore_input(self, value: Value, position: int) -> None:
        self._restore_value(value)
        self.inputs.insert(position, value)

    def _set_output(self, name: str, value: Value | None) -> None:
        self.version += 1
        self._order = None
        old = self.outputs.get(name)
        if old is not None:
            self._output_names[old].pop(name)
        if value is None:
            self.outputs.pop(name, None)
            return
        self.outputs[name] = value
        names = self._output_names.setdefault(value, {})
        names[name] = None
        if len(names) > 1:
            self._output_names[value] = {n: None for n in self.outputs if n in names}

    def _restore_output(self, name: str, value: Value, order: Iterable[str]) -> None:
        self._set_output(name, value)
        self.outputs = {n: self.outputs[n] for n in order}
        self._output_names[value] = {n: None for n in self.outputs if n in self._output_names[value]}

    def _add_node(self, node: Node, outputs: Iterable[Value], gap: int = GAP) -> None:
        """Append a node; its place is ``gap`` behind the last of the nodes that it reads."""
        node.outputs = tuple(outputs)
        for index, value in enumerate(node.outputs):
            value.producer, value.index = node, index
            self._add_value(value)
        node.serial = self._tick()
        self._file(node)
        place = 0
        for position, used in enumerate(node.inputs):
            if used is not None:
                self._link(node, position, used, self._tick())
                if used.producer is not None and used.producer.place > place:
                    place = used.producer.place
        node.place = place + gap
        self._dense |= gap != GAP

    def _spread(self) -> None:
        """Put gaps between the places again, where nodes made by rewrites stand close: else each would push the next.

        Only between journals: places that a journal holds would not be those of this numbering.
        """
        if not self._dense:
            return
        self._dense = False
        for index, node in enumerate(sorted(self._node, key=attrgetter("place", "serial")), 1):
            node.place = index * GAP

    def _remove_node(self, node: Node) -> tuple[int, ...]:
        """Take a node out, and give the numbers of its uses, for :meth:`_restore_node`."""
        self.version += 1
        self._order = None
        stamps = tuple([0 if v is None else v.uses.pop((node, i)) for i, v in enumerate(node.inputs)])
        for producer in node.incoming:
            del producer.outgoing[node]
        for user in node.outgoing:
            del user.incoming[node]
        del self._node[node], self._succ[node], self._pred[node]
        del self._by_op[(node.domain, node.op_type)][node]
        for value in node.outputs:
            del self.values[value.name]
        return stamps

    def _restore_node(self, node: Node, stamps: Sequence[int]) -> None:
        for value in node.outputs:
            self._restore_value(value)
        self._file(node)
        self._restored.nodes[(node.domain, node.op_type)] = None
        for producer, edges in node.incoming.items():
            producer.outgoing[node] = edges
        for user, edges in node.outgoing.items():
            user.incoming[node] = edges
        for position, (used, stamp) in enumerate(zip(node.inputs, stamps, strict=True)):
            if used is not None:
                used.uses[(node, position)] = stamp
                self._restored.uses[used] = None

    def _file(self, node: Node) -> None:
        self._order = None
        self._node[node] = _NO_DATA
        self._succ[node] = node.outgoing
        self._pred[node] = node.incoming
        self._by_op.setdefault((node.domain, node.op_type), {})[node] = None

    def _set_input(self, node: Node, position: int, value: Value | None) -> int:
        """Let an operand be another value, and give the number of the use that ends, for :meth:`_restore_use`."""
        self._order = None
        before = node.inputs[position]
        stamp = 0 if before is None else self._unlink(node, position, before)
        node.inputs = (*node.inputs[:position], value, *node.inputs[position + 1 :])
        if value is not None:
            self._link(node, position, value, self._tick())
        return stamp

    def _move_uses(self, old: Value, new: Value) -> dict[tuple[Node, int], int]:
        """Let every node that reads ``old`` read ``new``, and give the uses that end, for :meth:`_restore_uses`."""
        self._order = None
        self.version += 1
        moved, old.uses = old.uses, {}
        source, target = old.producer, new.producer
        before = {} if source is None else source.outgoing
        after = {} if target is None else target.outgoing
        uses, clock = new.uses, self._clock
        for use in moved:
            clock += 1
            uses[use] = clock
            node, position = use
            inputs = list(node.inputs)
            inputs[position] = new
            node.inputs = tuple(inputs)
            if source is not None:
                if len(before[node]) == 1:
                    del before[node], node.incoming[source]
                else:
                    before[node] = node.incoming[source] = _without(before[node], position)
            if target is not None:
                after[node] = node.incoming[target] = _with(after.get(node), position)
        self._clock = clock
        return moved

    def _restore_uses(self, old: Value, moved: Mapping[tuple[Node, int], int]) -> None:
        for (node, position), stamp in moved.items():
            self._restore_use(node, position, old, stamp)

    def _restore_use(self, node: Node, position: int, value: Value | None, stamp: int) -> None:
        self._set_input(node, position, None)
        if value is not None:
            node.inputs = (*node.inputs[:position], value, *node.inputs[position + 1 :])
            self._link(node, position, value, stamp)
            self._restored.uses[value] = None

    def _link(self, node: Node, position: int, value: Value, stamp: int) -> None:
        value.uses[(node, position)] = stamp
        producer = value.producer
        if producer is not None:
            users = producer.outgoing
            users[node] = node.incoming[producer] = _with(users.get(node), position)

    def _unlink(self, node: Node, position: int, value: Value) -> int:
        producer = value.producer
        if producer is not None:
            users = producer.outgoing
            if len(users[node]) == 1:
                del users[node], node.incoming[producer]
            else:
                users[node] = node.incoming[producer] = _without(users[node], position)
        return value.uses.pop((node, position))

    def _lift(self, nodes: Iterable[Node], after: Node) -> list[tuple[Node, int]] | None:
        """Place ``nodes`` and their users behind ``after``; give the old places, or None when ``after`` reads one."""
        wanted = dict.fromkeys(nodes, after.place + 1)
        # by old places, so that a node is reached after everything that moves it
        pending = [(node.place, node.serial, node) for node in wanted]
        pending.sort()
        moved: list[tuple[Node, int]] = []
        while pending:
            place, _, node = heappop(pending)
            if node is after:
                return None
            moved.append((node, place))
            for user in node.outgoing:
                if user.place <= wanted[node]:
                    if user not in wanted:
                        heappush(pending, (user.place, user.serial, user))
                    wanted[user] = max(wanted.get(user, 0), wanted[node] + 1)
        for node, _ in moved:
            node.place = wanted[node]
        return moved

    def _restore_places(self, moved: Iterable[tuple[Node, int]]) -> None:
        for node, place in moved:
            node.place = place

    def _settle(self) -> None:
        """Bring the dictionaries that had something restored back into the order of their numbers."""
        restored, self._restored = self._restored, _Restored()
        self.version += 1
        for value in restored.uses:
            value.uses = dict(sorted(value.uses.items(), key=lambda item: item[1]))
        if restored.values:
            _sort_by_serial(self.values, of_value=True)
        for op in restored.nodes:
            _sort_by_serial(self._by_op[op])
        if restored.nodes:
            for table in (self._node, self._succ, self._pred):
                _sort_by_serial(table)


def _sort_by_serial(table: dict[Any, Any], *, of_value: bool = False) -> None:
    items = sorted(table.items(), key=lambda item: item[of_value].serial)
    table.clear()
    table.update(items)


class _Restored:
    """What has been put back out of order since the last :meth:`Graph._settle`."""

    __slots__ = ("nodes", "uses", "values")

    def __init__(self) -> None:
        self.nodes: dict[tuple[str, str], None] = {}
        self.uses: dict[Value, None] = {}
        self.values = False

"""The graph: SSA values and nodes, stored in a networkx multigraph with an op index and use lists beside it.

Only this file knows how a graph is stored. Everything outside reads it through the methods below and changes it through
:class:`vacc_opt.ir.rewriter.Rewriter`; the methods that begin with an underscore keep the three structures in step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import networkx as nx

from vacc_opt.ir.provenance import Provenance
from vacc_opt.ir.tensor import TensorExpr
from vacc_opt.ir.types import Dim, TensorType

Attribute = Any  # int | float | str | bytes | tuple of these | numpy array


class Value:
    """A tensor in the graph: a graph input, a constant, or one output of a node.

    ``elements`` holds the entries of a small integer tensor as numbers or symbolic dimensions, where they are known:
    it is how ``Shape``/``Concat``/``Reshape`` chains are understood without running anything.
    """

    __slots__ = ("const", "elements", "index", "name", "producer", "type", "uses")

    def __init__(self, name: str, type: TensorType, const: TensorExpr | None = None) -> None:
        self.name = name
        self.type = type
        self.const = const
        self.producer: Node | None = None
        self.index = 0
        self.elements: tuple[Dim, ...] | None = None
        self.uses: dict[tuple[Node, int], None] = {}

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


class Node:
    """One operation: ``outputs = domain::op_type<attributes>(inputs)``. Compared by identity."""

    __slots__ = ("attributes", "domain", "inputs", "name", "op_type", "outputs", "provenance")

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
        self.op_type = op_type
        self.domain = domain
        self.inputs: tuple[Value | None, ...] = tuple(inputs)
        self.attributes: dict[str, Attribute] = dict(attributes or {})
        self.name = name
        self.outputs: tuple[Value, ...] = ()
        self.provenance = provenance or Provenance()

    @property
    def op(self) -> str:
        """``MatMul`` or ``Vastai::AllReduce``."""
        return f"{self.domain}::{self.op_type}" if self.domain else self.op_type

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
    """A single-assignment dataflow graph with a fixed, named interface.

    >>> graph = Graph("empty")
    >>> len(graph)
    0
    """

    def __init__(self, name: str, *, opset: int = 24) -> None:
        self.name = name
        self.opset = opset
        self.ranks = 1
        self.metadata: dict[str, str] = {}
        self.inputs: list[Value] = []
        self.outputs: dict[str, Value] = {}
        self.values: dict[str, Value] = {}
        self._structure: nx.MultiDiGraph[Node] = nx.MultiDiGraph()
        self._by_op: dict[tuple[str, str], dict[Node, None]] = {}
        self._output_names: dict[Value, dict[str, None]] = {}
        self._order: list[Node] | None = None
        self._counter = 0

    # reading

    def __len__(self) -> int:
        return len(self._structure)

    def __contains__(self, node: object) -> bool:
        return node in self._structure

    @property
    def networkx(self) -> nx.MultiDiGraph[Node]:
        """A read-only networkx view: nodes are :class:`Node`, edge keys are input positions of the consumer."""
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
        state: dict[Node, bool] = {}  # False: on the stack, True: placed
        roots = [v.producer for v in self.outputs.values()] + list(self._structure)
        for root in roots:
            if root is None or root in state:
                continue
            stack: list[tuple[Node, Iterator[Value | None]]] = [(root, iter(root.inputs))]
            state[root] = False
            while stack:
                node, rest = stack[-1]
                for value in rest:
                    producer = value.producer if value is not None else None
                    if producer is None or state.get(producer) is True:
                        continue
                    if producer in state:
                        raise ValueError(f"the graph has a cycle through {producer!r}")
                    state[producer] = False
                    stack.append((producer, iter(producer.inputs)))
                    break
                else:
                    stack.pop()
                    state[node] = True
                    order.append(node)
        return order

    # writing: for Rewriter and the importers only

    def _add_value(self, value: Value) -> None:
        if value.name in self.values:
            raise ValueError(f"two values are called {value.name!r}")
        self.values[value.name] = value

    def _remove_value(self, value: Value) -> None:
        del self.values[value.name]

    def _add_input(self, value: Value, position: int | None = None) -> None:
        self._add_value(value)
        self.inputs.insert(len(self.inputs) if position is None else position, value)

    def _remove_input(self, value: Value) -> None:
        self.inputs.remove(value)
        self._remove_value(value)

    def _set_output(self, name: str, value: Value | None) -> None:
        old = self.outputs.get(name)
        if old is not None:
            self._output_names[old].pop(name)
        if value is None:
            self.outputs.pop(name, None)
        else:
            self.outputs[name] = value
            self._output_names.setdefault(value, {})[name] = None
        self._order = None

    def _add_node(self, node: Node, outputs: Iterable[Value]) -> None:
        node.outputs = tuple(outputs)
        for index, value in enumerate(node.outputs):
            value.producer, value.index = node, index
            self._add_value(value)
        self._structure.add_node(node)
        self._by_op.setdefault((node.domain, node.op_type), {})[node] = None
        for position, used in enumerate(node.inputs):
            self._connect(node, position, used)
        self._order = None

    def _remove_node(self, node: Node) -> None:
        for position, value in enumerate(node.inputs):
            self._disconnect(node, position, value)
        self._structure.remove_node(node)
        del self._by_op[(node.domain, node.op_type)][node]
        for value in node.outputs:
            self._remove_value(value)
        self._order = None

    def _set_input(self, node: Node, position: int, value: Value | None) -> None:
        self._disconnect(node, position, node.inputs[position])
        node.inputs = (*node.inputs[:position], value, *node.inputs[position + 1 :])
        self._connect(node, position, value)
        self._order = None

    def _connect(self, node: Node, position: int, value: Value | None) -> None:
        if value is None:
            return
        value.uses[(node, position)] = None
        if value.producer is not None:
            self._structure.add_edge(value.producer, node, key=position)

    def _disconnect(self, node: Node, position: int, value: Value | None) -> None:
        if value is None:
            return
        value.uses.pop((node, position), None)
        if value.producer is not None and self._structure.has_edge(value.producer, node, position):
            self._structure.remove_edge(value.producer, node, position)

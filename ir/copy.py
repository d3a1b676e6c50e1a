"""Copies of graphs: whole, with sizes bound to numbers, or a region cut out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vacc_opt.ir.collector import paused
from vacc_opt.ir.functions import called_functions
from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.infer import InferenceError, infer
from vacc_opt.ir.types import SymbolicDim


def copy(graph: Graph, sizes: Mapping[str, int] | None = None) -> Graph:
    """A copy that shares nothing mutable; with ``sizes``, symbolic dimensions of those names become numbers.

    >>> copy(Graph("g"), {"seq": 4}).name
    'g'
    """
    with paused():
        result = _copied(graph, sizes)
    copy_functions(graph.functions, result, sizes)
    if not sizes:  # a graph for fixed sizes is a phase itself
        result.phases = {name: copy(phase) for name, phase in graph.phases.items()}
    return result


def copy_functions(functions: Mapping[str, Graph], into: Graph, sizes: Mapping[str, int] | None = None) -> None:
    """Give ``into`` copies of bodies, which know each other as the bodies of one model do."""
    into.functions = {op: _copied(body, sizes) for op, body in functions.items()}
    for body in into.functions.values():
        body.functions = into.functions


def _copied(graph: Graph, sizes: Mapping[str, int] | None) -> Graph:
    result = _empty(graph, graph.name)
    result.metadata = dict(graph.metadata)
    made: dict[Value, Value] = {}
    for value in graph.inputs:
        made[value] = Value(value.name, value.type.bind(sizes or {}))
        result._add_input(made[value])
    for value in graph.values.values():
        if value.const is not None:
            made[value] = Value(value.name, value.type, value.const)
            made[value].elements, made[value].provenance = value.elements, value.provenance
            result._add_value(made[value])
    for node in graph.nodes():
        _copy_node(node, result, made, sizes)
    for name, value in graph.outputs.items():
        result._set_output(name, made[value])
    return result


def bind(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """The graph for fixed sizes, such as ``{"batch": 1, "seq": 64}``; names that do not occur are ignored."""
    return copy(graph, sizes)


def symbols(graph: Graph) -> set[str]:
    """The names of the sizes that are still symbolic at the interface."""
    found: set[str] = set()
    for value in graph.inputs:
        for dim in value.shape or ():
            if isinstance(dim, SymbolicDim):
                found.update(dim.names())
    return found


def extract(graph: Graph, nodes: Iterable[Node], name: str, keep: Iterable[Value] = ()) -> Graph:
    """The region of ``nodes`` as a graph of its own.

    Values that come from outside become inputs, constants stay constants; values that are read outside, leave the
    graph, or are in ``keep`` become outputs under their own names.
    """
    inside = dict.fromkeys(nodes)
    kept = set(keep)
    result = _empty(graph, name)
    made: dict[Value, Value] = {}
    ordered = [n for n in graph.nodes() if n in inside]
    for node in ordered:
        for value in node.inputs:
            if value is None or value in made or value.producer in inside:
                continue
            made[value] = Value(value.name, value.type, value.const)
            made[value].elements, made[value].provenance = value.elements, value.provenance
            (result._add_input if value.const is None else result._add_value)(made[value])
        _copy_node(node, result, made, None)
    for node in ordered:
        for value in node.outputs:
            if value in kept or graph.is_output(value) or any(u not in inside for u, _ in value.uses):
                result._set_output(value.name, made[value])
    result.functions = graph.functions
    copy_functions(called_functions(result), result)
    return result


def _empty(graph: Graph, name: str) -> Graph:
    """A graph of the same operators and ranks."""
    result = Graph(name, opset=graph.opset)
    result.ranks, result.domains = graph.ranks, dict(graph.domains)
    return result


def _copy_node(node: Node, into: Graph, made: dict[Value, Value], sizes: Mapping[str, int] | None) -> None:
    twin = Node(
        node.op_type,
        [None if v is None else made[v] for v in node.inputs],
        node.attributes,
        domain=node.domain,
        name=node.name,
        provenance=node.provenance,
    )
    values = [type(v)(v.name, v.type.bind(sizes or {})) for v in node.outputs]
    for value, old in zip(values, node.outputs, strict=True):
        value.elements = old.elements
    if sizes:
        _infer_again(twin, values, into.opset)
    into._add_node(twin, values)
    made.update(zip(node.outputs, values, strict=True))


def _infer_again(node: Node, values: list[Value], opset: int) -> None:
    try:
        found = infer(node.op, node.inputs, node.attributes, len(values), opset=opset, label=values[0].name)
    except InferenceError:
        if "::" not in node.op or node.domain == "Vastai":
            raise
        return  # a foreign operator and a call keep their declared type
    for value, result in zip(values, found, strict=True):
        value.type, value.elements = result.type, result.elements

"""The structural verifier: what must hold of every graph after every pass."""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx

from vacc_opt.ir.errors import CheckError
from vacc_opt.ir.graph import Graph, Node
from vacc_opt.ir.infer import InferenceError, infer, shape_text
from vacc_opt.ir.origins import without_origin
from vacc_opt.ir.tensor import PerRank


class InvalidGraph(CheckError):
    """A graph breaks an invariant; the message lists the first few."""


def verify(graph: Graph, *, after: str = "", origins: bool = False) -> None:
    """Check order, use lists, index, names and types; with ``origins`` also that all nodes and constants have one.

    Raises:
        InvalidGraph: with up to five broken invariants, and the pass that broke them when ``after`` is given.
    """
    _report(graph, list(_problems(graph)) + (list(without_origin(graph)) if origins else []), after)


def verify_origins(graph: Graph, *, after: str = "") -> None:
    """Check only that all nodes and constants have an origin; raises InvalidGraph."""
    _report(graph, list(without_origin(graph)), after)


def _report(graph: Graph, problems: list[str], after: str) -> None:
    if problems:
        where = f"after {after}: " if after else ""
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise InvalidGraph(f"{where}the graph {graph.name!r} is not valid: {shown}")


def _problems(graph: Graph) -> Iterator[str]:
    if not nx.is_directed_acyclic_graph(graph._structure):
        cycle = nx.find_cycle(graph._structure)
        yield f"a cycle passes through {cycle[0][0]!r}"
        return
    yield from _uses(graph)
    yield from _types(graph)
    yield from _interface(graph)


def _uses(graph: Graph) -> Iterator[str]:
    structure = graph._structure
    for node in graph.nodes():
        for position, value in enumerate(node.inputs):
            if value is None:
                continue
            if graph.values.get(value.name) is not value:
                yield f"{node!r} reads {value.name!r}, which nothing defines"
            elif (node, position) not in value.uses:
                yield f"{value.name!r} does not know its use by {node!r}"
            if value.producer is not None and not structure.has_edge(value.producer, node, position):
                yield f"the edge from {value.name!r} to {node!r} is missing"
        if node not in graph._by_op.get((node.domain, node.op_type), {}):
            yield f"{node!r} is missing from the operator index"
    for name, value in graph.values.items():
        if value.producer is None and value.const is None and value not in graph.inputs:
            yield f"{name!r} is neither an input, a constant nor computed"
        if value.name != name:
            yield f"{value.name!r} is filed under {name!r}"
        for user, position in value.uses:
            if user not in graph or user.inputs[position] is not value:
                yield f"{name!r} lists a use by {user!r} that does not exist"


def type_problem(graph: Graph, node: Node) -> str | None:
    """What the operator's type rule says against the types of a node, if anything; foreign operators have no rule."""
    label = node.output.name
    try:
        found = infer(node.op, node.inputs, node.attributes, len(node.outputs), opset=graph.opset, label=label)
    except InferenceError as error:
        return error.message if _has_rule(node.op) else None
    for value, result in zip(node.outputs, found, strict=True):
        if value.type.dtype is not result.type.dtype:
            return f"{value.name!r} is {value.type.dtype.value}, {node.op} gives {result.type.dtype.value}"
        if not _agree(value.type.shape, result.type.shape):
            return f"{value.name!r} is {shape_text(value.shape)}, {node.op} gives {shape_text(result.type.shape)}"
    return None


def _types(graph: Graph) -> Iterator[str]:
    for node in graph.nodes():
        problem = type_problem(graph, node)
        if problem is not None:
            yield problem
    for value in graph.constants():
        if value.const is not None and value.const.type != value.type:
            yield f"constant {value.name!r} is {value.type}, its expression {value.const.type}"
        if isinstance(value.const, PerRank) and len(value.const.parts) != graph.ranks:
            yield f"constant {value.name!r} has {len(value.const.parts)} parts, the graph has {graph.ranks} ranks"


def _has_rule(op: str) -> bool:
    return "::" not in op or op.startswith("Vastai::")


def _agree(have: object, found: object) -> bool:
    if not isinstance(have, tuple) or not isinstance(found, tuple):
        return True
    if len(have) != len(found):
        return False
    return all(a == b or not isinstance(a, int) or not isinstance(b, int) for a, b in zip(have, found, strict=True))


def _interface(graph: Graph) -> Iterator[str]:
    for value in graph.inputs:
        if graph.values.get(value.name) is not value or value.producer is not None or value.const is not None:
            yield f"input {value.name!r} is not a plain input any more"
    for name, value in graph.outputs.items():
        if graph.values.get(value.name) is not value:
            yield f"output {name!r} is bound to {value.name!r}, which is not in the graph"

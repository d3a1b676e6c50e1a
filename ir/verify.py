"""The structural verifier: what must hold of every graph after every pass."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vacc_opt.ir.errors import CheckError
from vacc_opt.ir.functions import call_problem
from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.infer import InferenceError, infer, inference_key, shape_text
from vacc_opt.ir.origins import without_origin
from vacc_opt.ir.schema import schema_problem
from vacc_opt.ir.tensor import PerRank, TensorExpr
from vacc_opt.ir.types import TensorType


class InvalidGraph(CheckError):
    """A graph breaks an invariant; the message lists the first few."""


@dataclass(frozen=True)
class Interface:
    """The inputs and outputs of a graph in order: names, and types where these matter."""

    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    types: bool = True

    @staticmethod
    def of(graph: Graph, *, types: bool = True) -> Interface:
        """That of a graph as it stands."""
        outputs = {name: value.type for name, value in graph.outputs.items()}
        return Interface({value.name: value.type for value in graph.inputs}, outputs, types)

    def problems(self, graph: Graph) -> Iterator[str]:
        """What is different in a graph that should have this interface."""
        now = Interface.of(graph)
        for kind, before, after in (("input", self.inputs, now.inputs), ("output", self.outputs, now.outputs)):
            if list(before) != list(after):
                yield f"the {kind}s are {', '.join(after) or 'none'}, they were {', '.join(before) or 'none'}"
                continue
            for name, type in before.items():
                found = after[name]
                if self.types and (found.dtype is not type.dtype or not _agree(found.shape, type.shape)):
                    yield f"the {kind} {name!r} is {found}, it was {type}"


def verify(graph: Graph, *, after: str = "", origins: bool = False, interface: Interface | None = None) -> None:
    """Check order, use lists, index, names, arity and types, also inside the bodies of the model's functions.

    With ``origins`` also that all nodes and constants have one; with ``interface`` also that the graph has it.

    Raises:
        InvalidGraph: with up to five broken invariants, and the pass that broke them when ``after`` is given.
    """
    problems = [*_problems(graph), *(without_origin(graph) if origins else ())]
    problems += [] if interface is None else interface.problems(graph)
    for op, body in graph.functions.items():
        if graph in graph.functions.values():
            break  # a body is checked alone
        inside = [*_problems(body), *(without_origin(body) if origins else ())]
        problems += [f"in {op}: {problem}" for problem in inside]
    _report(graph, problems, after)


def verify_origins(graph: Graph, *, after: str = "") -> None:
    """Check only that all nodes and constants have an origin; raises InvalidGraph."""
    _report(graph, list(without_origin(graph)), after)


def _report(graph: Graph, problems: list[str], after: str) -> None:
    if problems:
        where = f"after {after}: " if after else ""
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise InvalidGraph(f"{where}the graph {graph.name!r} is not valid: {shown}")


def _problems(graph: Graph) -> Iterator[str]:
    try:
        nodes = graph.nodes()
    except ValueError as error:
        yield str(error)
        return
    if not _linked(graph, nodes):
        yield from _broken_links(graph, nodes)
    yield from _misfits(graph, nodes)
    yield from _values(graph)
    yield from _index(graph)
    yield from _interface(graph)


def _linked(graph: Graph, nodes: Sequence[Node]) -> bool:
    """Operands, use lists and edges say the same: each use is an operand and an edge, and there are as many of each."""
    present, uses, computed, edges = graph._node, 0, 0, 0
    for value in graph.values.values():
        for user, position in value.uses:
            if user not in present or user.inputs[position] is not value:
                return False
        uses += len(value.uses)
        if value.producer is not None:
            behind = value.producer.outgoing
            for user, position in value.uses:
                if position not in behind.get(user, ()):
                    return False
            computed += len(value.uses)
    reads = 0
    for node in nodes:
        reads += len(node.inputs) - node.inputs.count(None)
        if graph._succ.get(node) is not node.outgoing or graph._pred.get(node) is not node.incoming:
            return False
        for user, positions in node.outgoing.items():
            if user.incoming.get(node) is not positions:
                return False
            edges += len(positions)
    return reads == uses and edges == computed and len(graph._succ) == len(graph._pred) == len(nodes)


def _broken_links(graph: Graph, nodes: Sequence[Node]) -> Iterator[str]:
    """What :func:`_linked` found, by name."""
    found = False
    for problem in (*_lost_links(graph, nodes), *_false_links(graph)):
        found = True
        yield problem
    if not found:
        yield "the multigraph has an edge that no operand stands for"


def _lost_links(graph: Graph, nodes: Sequence[Node]) -> Iterator[str]:
    for node in nodes:
        for position, value in enumerate(node.inputs):
            if value is None:
                continue
            if graph.values.get(value.name) is not value:
                yield f"{node!r} reads {value.name!r}, which nothing defines"
            elif (node, position) not in value.uses:
                yield f"{value.name!r} does not know its use by {node!r}"
            elif value.producer is not None:
                edges = value.producer.outgoing.get(node, {})
                if position not in edges or node.incoming.get(value.producer) is not edges:
                    yield f"the edge from {value.name!r} to {node!r} is missing"


def _false_links(graph: Graph) -> Iterator[str]:
    for name, value in graph.values.items():
        for user, position in value.uses:
            if user not in graph or user.inputs[position] is not value:
                yield f"{name!r} lists a use by {user!r} that does not exist"


def _misfits(graph: Graph, nodes: Sequence[Node]) -> Iterator[str]:
    """Arity, attributes and types; nodes that agree in all that decides them are looked at once."""
    fitting: set[Hashable] = set()
    for node in nodes:
        key = inference_key(node.op, node.inputs, node.attributes, len(node.outputs), graph.opset)
        if key is not None:
            key = (key, *[value.type for value in node.outputs])
            if key in fitting:
                continue
        problem = schema_problem(node, len(node.outputs), graph.opset)
        misfit = type_problem(graph, node) if problem is None else f"{node!r}: {problem[0]}"
        if misfit is not None:
            yield misfit
        elif key is not None:
            fitting.add(key)


def _values(graph: Graph) -> Iterator[str]:
    inputs = set(graph.inputs)
    for name, value in graph.values.items():
        if value.name != name:
            yield f"{value.name!r} is filed under {name!r}"
        producer = value.producer
        if producer is None:
            if value.const is None and value not in inputs:
                yield f"{name!r} is neither an input, a constant nor computed"
            elif value.const is not None:
                yield from _constant(graph, value, value.const)
        elif producer not in graph or producer.outputs[value.index] is not value:
            yield f"{name!r} is not an output of {producer!r}"


def _constant(graph: Graph, value: Value, expr: TensorExpr) -> Iterator[str]:
    if expr.type != value.type:
        yield f"constant {value.name!r} is {value.type}, its expression {expr.type}"
    if isinstance(expr, PerRank) and len(expr.parts) != graph.ranks:
        yield f"constant {value.name!r} has {len(expr.parts)} parts, the graph has {graph.ranks} ranks"


def _index(graph: Graph) -> Iterator[str]:
    """The operator index holds each node once; that it holds no other is a matter of counting."""
    indexed, present = 0, graph._node
    for op, nodes in graph._by_op.items():
        indexed += len(nodes)
        for node in nodes:
            if (node.domain, node.op_type) != op or node not in present:
                yield f"the operator index has {node!r} under {op[1]}"
    if indexed < len(graph):
        missing = next(n for n in graph.nodes() if n not in graph._by_op.get((n.domain, n.op_type), ()))
        yield f"{missing!r} is missing from the operator index"


def type_problem(graph: Graph, node: Node) -> str | None:
    """What the operator's type rule says against the types of a node, if anything; foreign operators have no rule."""
    if node.domain and node.op in graph.functions:
        return call_problem(node, graph.functions[node.op])
    label = node.output.name
    try:
        found = infer(node.op, node.inputs, node.attributes, len(node.outputs), opset=graph.opset, label=label)
    except InferenceError as error:
        return error.message if _has_rule(node.op) else None
    for value, result in zip(node.outputs, found, strict=True):
        if value.type is result.type:
            continue
        if value.type.dtype is not result.type.dtype:
            return f"{value.name!r} is {value.type.dtype.value}, {node.op} gives {result.type.dtype.value}"
        if not _agree(value.type.shape, result.type.shape):
            return f"{value.name!r} is {shape_text(value.shape)}, {node.op} gives {shape_text(result.type.shape)}"
    return None


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

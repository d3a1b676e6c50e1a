"""The structural verifier: what must hold of every graph after every pass."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from vacc_opt.ir.errors import CheckError
from vacc_opt.ir.functions import call_problem
from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.infer import InferenceError, infer, inference_key, shape_text
from vacc_opt.ir.origins import without_origin
from vacc_opt.ir.schema import schema_problem
from vacc_opt.ir.tensor import PerRank, TensorExpr


class InvalidGraph(CheckError):
    """A graph breaks an invariant; the message lists the first few."""


def verify(graph: Graph, *, after: str = "", origins: bool = False) -> None:
    """Check order, use lists, index, names, arity and types, also inside the bodies of the model's functions.

    With ``origins`` also that all nodes and constants have one.

    Raises:
        InvalidGraph: with up to five broken invariants, and the pass that broke them when ``after`` is given.
    """
    problems = [*_problems(graph), *(without_origin(graph) if origins else ())]
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
    for node in nodes:
        if not _linked(graph, node):
            yield from _broken_links(graph, node)
    yield from _misfits(graph, nodes)
    yield from _values(graph)
    yield from _nothing_more(graph)
    yield from _interface(graph)


_NO_EDGES: dict[Node, dict[int, dict[str, object]]] = {}


def _linked(graph: Graph, node: Node) -> bool:
    """What a node reads is there, and knows it; and the multigraph has the edge."""
    values, before = graph.values, graph._pred[node]
    for position, value in enumerate(node.inputs):
        if value is None:
            continue
        if values.get(value.name) is not value or (node, position) not in value.uses:
            return False
        producer = value.producer
        if producer is not None:
            edges = before.get(producer)
            if edges is None or position not in edges:
                return False
    return True


def _broken_links(graph: Graph, node: Node) -> Iterator[str]:
    for position, value in enumerate(node.inputs):
        if value is None:
            continue
        if graph.values.get(value.name) is not value:
            yield f"{node!r} reads {value.name!r}, which nothing defines"
        elif (node, position) not in value.uses:
            yield f"{value.name!r} does not know its use by {node!r}"
        elif value.producer is not None and position not in graph._pred[node].get(value.producer, ()):
            yield f"the edge from {value.name!r} to {node!r} is missing"


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


def _nothing_more(graph: Graph) -> Iterator[str]:
    """Use lists, index and multigraph hold what the nodes say; that they hold nothing else is a matter of counting."""
    reads = [v for node in graph.nodes() for v in node.inputs if v is not None]
    if sum([len(value.uses) for value in graph.values.values()]) != len(reads):
        for name, value in graph.values.items():
            for user, position in value.uses:
                if user not in graph or user.inputs[position] is not value:
                    yield f"{name!r} lists a use by {user!r} that does not exist"
    edges = 0
    for producer, users in graph._succ.items():
        for user, positions in users.items():
            edges += len(positions)
            if graph._pred[user].get(producer) is not positions:
                yield f"the edge from {producer!r} to {user!r} is there in one direction only"
    if edges != sum([value.producer is not None for value in reads]):
        yield "the multigraph has an edge that no operand stands for"
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

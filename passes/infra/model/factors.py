"""Factors that move through a model: what a linear gives times a number is a linear of other constants."""

from __future__ import annotations

from vacc_opt.ir import Graph, Multiplied, Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.model.linear import as_linear


def without_bias(value: Value) -> tuple[Value, Node | None]:
    """A value without the bias that was added to it, and the node that added it."""
    node = value.producer
    if node is not None and node.op == "Add":
        computed = [v for v in node.inputs if v is not None and not v.is_const]
        if len(computed) == 1:
            return computed[0], node
    return value, None


def is_foldable(graph: Graph, value: Value) -> bool:
    """Made by a linear, perhaps with a bias, whose result nothing else reads and whose constants are its own."""
    inner, _ = without_bias(value)
    linear = as_linear(inner.producer) if inner.producer is not None else None
    if linear is None:
        return False
    constant = linear.scale if linear.scale is not None else linear.weight
    matrix = linear.node.inputs[1]
    return all(graph.use_count(v) == 1 for v in (value, inner, constant, matrix) if v is not None)


def has_own_constants(graph: Graph, node: Node) -> bool:
    """A linear whose constants are its own."""
    linear = as_linear(node)
    if linear is None:
        return False
    constant = linear.scale if linear.scale is not None else linear.weight
    return all(graph.use_count(v) == 1 for v in (constant, node.inputs[1]) if v is not None)


def fold(rw: Rewriter, value: Value, factor: float) -> None:
    """Multiply what a linear gives; of the value itself a bias is a part, and so it takes the factor too."""
    inner, added = without_bias(value)
    assert inner.producer is not None
    linear = as_linear(inner.producer)
    assert linear is not None
    constant = linear.scale if linear.scale is not None else linear.weight
    assert constant.const is not None
    rw.set_const(constant, Multiplied(constant.const, factor))
    if added is not None:
        position = 0 if added.inputs[0] is not inner else 1
        given = added.inputs[position]
        assert given is not None
        assert given.const is not None
        rw.set_input(added, position, rw.const(Multiplied(given.const, factor), given.name, of=given.provenance))


def is_embedding(value: Value) -> bool:
    """Rows of a constant table."""
    node = value.producer
    return node is not None and node.op == "Gather" and node.inputs[0] is not None and node.inputs[0].is_const


def residual_stream(end: Value | None) -> tuple[list[Value], list[Value]]:
    """The values of the residual stream up to ``end``, and what is added up in them."""
    stream: list[Value] = []
    sources: list[Value] = []
    pending = [end]
    while pending:
        value = pending.pop()
        if value is None or value in stream or value in sources:
            continue
        node = value.producer
        if node is not None and node.op == "Add" and all(v is not None and not v.is_const for v in node.inputs):
            stream.append(value)
            pending += node.inputs
        else:
            sources.append(value)
    return stream, sources


def scale_rows(rw: Rewriter, value: Value, factor: float) -> None:
    """The table may be lm_head's too, so its rows are multiplied after they are taken."""
    users = list(value.uses)
    assert value.producer is not None
    with rw.on_behalf_of(value.producer):
        scaled = rw.op.Mul(value, rw.const(factor, f"{value.name}.factor", "float32"))
    for node, position in users:
        rw.set_input(node, position, scaled)

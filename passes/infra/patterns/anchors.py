"""An anchor that no root came near: how far its readers follow the pattern upwards, and what then reads instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.passes.infra.patterns.match import Miss
from vacc_opt.passes.infra.patterns.pattern import Either, Op, Output, Pattern, Through, Where

_Way = tuple[Op, ...]  # from a node pattern up to the root


def stopped(patterns: Sequence[Pattern], graph: Graph, anchor: Node) -> Miss:
    """Where the longest way from ``anchor`` to a root ends: the value there, its reader, and who should read it."""
    matched: list[Node] = []
    wanted: dict[str, Op] = {}
    for way in (w for p in patterns for w in _ways(p, anchor.op, ())):
        climbed = _climb(anchor, way)
        if len(climbed) > len(matched):
            matched, wanted = climbed, {}
        if len(climbed) == len(matched) and len(climbed) < len(way):
            wanted[way[len(climbed)].op] = way[len(climbed)]
    top = matched[-1] if matched else anchor
    users = top.output.users()
    reader = users[0].output if users else "an output" if graph.is_output(top.output) else "no node"
    pattern = next(iter(wanted.values()), None)
    arguments = (top.output, reader, " or ".join(wanted) or "no more")
    node, value = (users[0], users[0].output) if users else (top, top.output)
    return Miss("{} is read by {}, expected {}", arguments, node, tuple(matched), pattern, value)


def _ways(pattern: Pattern, op: str, above: _Way) -> Iterator[_Way]:
    """The ways from each node of that operator up to the root."""
    if isinstance(pattern, Either):
        for choice in pattern.choices:
            yield from _ways(choice, op, above)
    elif isinstance(pattern, Where | Through):
        yield from _ways(pattern.inner, op, above)
    elif isinstance(pattern, Output):
        yield from _ways(pattern.node, op, above)
    elif isinstance(pattern, Op):
        way = (pattern, *above)
        if pattern.op == op:
            yield way
        for operand in pattern.operands:
            yield from _ways(operand, op, way)


def _climb(anchor: Node, way: _Way) -> list[Node]:
    """The nodes that follow a way, the anchor first."""
    nodes, value = [anchor], anchor.output
    for step in way[1:]:
        above: Value | None = next((u.output for u in value.users() if u.op == step.op), None)
        if above is None or above.producer is None:
            break
        nodes.append(above.producer)
        value = above
    return nodes

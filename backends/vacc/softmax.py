"""The online softmax as an expression: blocks of scores in a chain, and sums of values weighted by them.

A chain `soft(before, scores, addends...)` stands for all blocks so far. Its states are `maximum`, `total` and, between
two links, `factor`; `weights` are those of its last block. A sum over blocks is `weighted(chain, values, before)`, to
which `total * factor + weights . values` adds one, and `scaled(sum, scale, zero)` is `sum * scale + total * zero`,
which applies a scale and a zero to the values of all blocks so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vacc_opt.backends.vacc.expressions import Expressions, Node, Shape


def softmax_step(
    make: Expressions,
    ins: Sequence[Node],
    state: Sequence[Node],
    attributes: Mapping[str, float],
    shapes: Sequence[Shape],
) -> list[Node]:
    """Weights, maximum, total and factor after one more block; `state` are maximum and total before it."""
    before = _chain(state)
    data = tuple(item for item in sorted(attributes.items()) if item[0] != "diagonal")
    parts = (*([before] if before else state if before is None else ()), *ins)
    first = "first" if not before and before is not None else "next"
    link = make.make("soft", (first, attributes["diagonal"], *data), tuple(parts), shapes[0])
    return [make.make(name, (), (link,), shape) for name, shape in zip(STATES, shapes, strict=True)]


STATES = ("weights", "maximum", "total", "factor")


def _chain(state: Sequence[Node]) -> Node | tuple[()] | None:
    """The chain that a maximum and a total stand for: () at its beginning, None where they do not belong together."""
    maximum, total = state
    if maximum.kind == total.kind == "constant":
        return () if maximum.data[0] == float("-inf") and total.data[0] == 0 else None
    if maximum.kind == "maximum" and total.kind == "total" and maximum.parts == total.parts:
        return maximum.parts[0]
    return None


def weighted(make: Expressions, kind: str, ins: Sequence[Node]) -> Node | None:
    """`x * y + z` or `x / y` where it belongs to a softmax; None where it is plain arithmetic."""
    if kind == "div" and ins[0].kind in {"weighted", "scaled"} and ins[1].kind == "total":
        if chain_of(ins[0]) is ins[1].parts[0]:
            return make.make("attention", (), (ins[0],), ins[0].shape)
        return None
    if kind != "mul_add":
        return None
    x, y, z = ins
    for before, factor in ((x, y), (y, x)):
        found = _one_more(make, before, factor, z) or _scaled(make, before, factor, z)
        if found:
            return found
    return None


def _one_more(make: Expressions, before: Node, factor: Node, product: Node) -> Node | None:
    if factor.kind != "factor" or product.kind != "dot" or product.data[0]:
        return None
    weights, values = product.parts
    rounding = weights.dtype
    if weights.kind == "round":
        weights = weights.parts[0]
    link = factor.parts[0]
    if weights.kind != "weights" or weights.parts[0] is not link:
        return None
    if link.data[0] == "first":
        if before.kind != "constant" or before.data[0] != 0:
            return None
        return make.make("weighted", (rounding,), (link, values), product.shape)
    if chain_of(before) is not link.parts[0]:
        return None
    return make.make("weighted", (rounding,), (link, values, before), product.shape)


def _scaled(make: Expressions, before: Node, scale: Node, added: Node) -> Node | None:
    if before.kind not in {"weighted", "scaled"} or added.kind != "mul" or len(added.parts) != 2:
        return None
    total = next((one for one in added.parts if one.kind == "total"), None)
    zero = next((one for one in added.parts if one is not total), None)
    if total is None or zero is None or chain_of(before) is not total.parts[0]:
        return None
    return make.make("scaled", (), (before, scale, zero), before.shape)


def chain_of(node: Node) -> Node | None:
    """The chain of blocks that a sum of weighted values is over."""
    while node.kind == "scaled":
        node = node.parts[0]
    return node.parts[0] if node.kind == "weighted" else None

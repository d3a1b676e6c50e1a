"""A feed-forward as split-tp sees it: linears whose outputs meet channel by channel, and one that sums over them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.errors import CheckError
from vacc_opt.passes.infra.base import where
from vacc_opt.passes.infra.model.linear import Linear, as_linear
from vacc_opt.passes.infra.patterns.values import scalar
from vacc_opt.passes.shard.block import downstream

_GATED = ("Vastai::SwiGLU", "Vastai::GeGLU")
_ACTIVATIONS = frozenset(
    [*_GATED, "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Relu", "Selu", "Sigmoid",
     "Softplus", "Softsign", "Swish", "Tanh"]
)  # fmt: skip
# finite for finite operands, so that a channel of padding, whose column of the last linear is zero, adds nothing
_CHANNELWISE = frozenset([*_ACTIVATIONS, "Abs", "Add", "Cast", "Identity", "Mul", "Neg", "Sub"])
_BY_SCALAR = frozenset(["Clip", "Div", "Pow"])


@dataclass(frozen=True)
class FeedForward:
    """``down`` sums over channels that ``inputs`` make; ``vectors`` have an entry for each, ``inside`` lies between."""

    inputs: tuple[Linear, ...]
    vectors: tuple[Value, ...]
    inside: tuple[Node, ...]
    down: Linear

    @property
    def channels(self) -> int:
        """Width of the block."""
        return self.inputs[0].out_features


def feed_forward_blocks(graph: Graph, attention: Collection[Node]) -> Iterator[FeedForward]:
    """Every linear that sums over an activation of linears, with or without a gate; ``attention`` are others' linears.

    Raises:
        CheckError: a gated activation that is not fed by two linears, or not read by one.
    """
    taken = set(attention)
    for node in graph.nodes():
        if node.op in _GATED:
            _check_gated(node)
    for node in graph.nodes():
        down = as_linear(node) if node not in taken else None
        block = _block(graph, down) if down is not None else None
        if block is not None and taken.isdisjoint(linear.node for linear in block.inputs):
            taken |= {block.down.node, *(linear.node for linear in block.inputs)}
            yield block


def _check_gated(node: Node) -> None:
    down = downstream(node.output)[0]
    if _walk(down) is None:
        raise CheckError(f"{where(node)} is not fed by two linear layers")


def _block(graph: Graph, down: Linear) -> FeedForward | None:
    found = _walk(down)
    if found is None or not any(node.op in _ACTIVATIONS for node in found.inside):
        return None
    gated = any(node.op in _GATED for node in found.inside)  # whose other readers are an error, not a reason
    readers = {down.node, *found.inside}
    parts = [linear.node.output for linear in found.inputs] + [node.output for node in found.inside]
    closed = all(readers.issuperset(v.users()) and not graph.is_output(v) for v in parts)
    return found if gated or closed else None


def _walk(down: Linear) -> FeedForward | None:
    """From the last linear up to those that make its channels; None where one is no linear."""
    inputs: dict[Node, Linear] = {}
    inside: dict[Node, None] = {}
    vectors: dict[Value, None] = {}
    pending = [down.x]
    while pending:
        node = pending.pop().producer
        if node is None:
            return None
        if node in inputs or node in inside:
            continue
        linear = as_linear(node)
        if linear is not None:
            inputs[node] = linear
            continue
        operands = _operands(node, down.in_features, vectors)
        if operands is None:
            return None
        inside[node] = None
        pending += reversed(operands)
    if any(linear.out_features != down.in_features for linear in inputs.values()):
        return None
    return FeedForward(tuple(inputs.values()), tuple(vectors), tuple(inside), down)


def _operands(node: Node, channels: int, vectors: dict[Value, None]) -> list[Value] | None:
    """What a channelwise node reads that depends on its channel and token; None for any other node."""
    given = [v for v in node.inputs if v is not None]
    if node.op not in _CHANNELWISE and node.op not in _BY_SCALAR:
        return None
    for value in (v for v in given if v.is_const):
        vector = node.op in ("Add", "Sub", "Mul") and value.shape == (channels,)
        if not vector and set(value.shape or ()) - {1}:
            return None
        if vector:
            vectors[value] = None
    rest = [v for v in given if not v.is_const]
    if node.op in _BY_SCALAR and rest != given[:1]:
        return None
    exponent = scalar(node.input(1)) if node.op == "Pow" else 0
    if exponent is None or exponent < 0:  # a channel of padding may be zero
        return None
    return rest or None

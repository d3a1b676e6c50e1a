"""The blocks of a decoder as split-tp sees them: which linears feed an attention or a feed-forward, which follow."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.errors import CheckError
from vacc_opt.ir.ops.attention import SLOPES
from vacc_opt.passes.infra.base import where
from vacc_opt.passes.infra.model.linear import Linear, as_linear

# operators between a projection and its attention, and the operand that carries the heads
_UPSTREAM = {
    "RotaryEmbedding": 0,
    "Transpose": 0,
    "Reshape": 0,
    "Cast": 0,
    "RMSNormalization": 0,
    "LayerNormalization": 0,
    "TensorScatter": 1,
    "Concat": 1,
    "Vastai::QuantizeKV": 0,
    "Vastai::DequantizeKV": 0,
}
_DOWNSTREAM = frozenset({"Transpose", "Reshape", "Cast"})
_GATED = ("Vastai::SwiGLU", "Vastai::GeGLU")
# activations between the two linears of a feed-forward block without a gate
_PLAIN = ("Gelu", "Relu", "Swish", "Mish", "LeakyRelu", "Elu")
_PASSED_ON = frozenset({*_UPSTREAM, *_DOWNSTREAM, "Add", "Attention", "Vastai::Attention", *_GATED, *_PLAIN})
_CACHE_WRITES = ("TensorScatter", "Concat")


@dataclass(frozen=True)
class Attention:
    """An attention with its four projections; ``heads`` is (query, KV), ``width`` channels a head."""

    node: Node
    heads: tuple[int, int]
    width: int
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    query_bias: tuple[Value, ...]
    key_bias: tuple[Value, ...]
    value_bias: tuple[Value, ...]
    caches: tuple[Value, ...]
    kv_constants: tuple[Value, ...]
    slopes: Value | None  # ALiBi, one a query head
    reshapes: tuple[tuple[Node, int], ...]  # and the axis of the result that holds heads
    adds: tuple[Node, ...]  # of the biases, and products with the weights of heads
    query_weights: tuple[Value, ...]  # [heads, 1, width]: a weight of its own for each head
    key_weights: tuple[Value, ...]


@dataclass(frozen=True)
class FeedForward:
    """Linears side by side (gate and up, or one), each with the biases added to it, and the one that joins them."""

    ups: tuple[tuple[Linear, tuple[Value, ...]], ...]
    adds: tuple[Node, ...]  # of those biases
    down: Linear


@dataclass
class _Path:
    """What lies between a projection and the attention."""

    linear: Linear
    reshapes: list[Node]
    adds: list[Node]
    biases: list[Value]
    constants: list[Value]
    caches: list[Value]
    weights: list[Value]


def attention_block(node: Node) -> Attention:
    """The block around an Attention node; raises CheckError that names the first node not understood."""
    q, k, v = node.inputs[:3]
    assert q is not None
    assert k is not None
    assert v is not None
    if q.shape is None or k.shape is None or len(q.shape) != 4:
        raise CheckError(f"{where(node)} is not in [batch, heads, seq, channels] layout")
    heads, kv, width = q.shape[1], k.shape[1], q.shape[3]
    if not isinstance(heads, int) or not isinstance(kv, int) or not isinstance(width, int):
        raise CheckError(f"{where(node)} has a symbolic number of heads")
    mask = node.input(3)
    if mask is not None and mask.shape is not None and len(mask.shape) > 2 and mask.shape[-3] != 1:
        raise CheckError(f"the mask of {where(node)} is {mask.type}: one a head, which is not split")
    query, key, value = (_upstream(x, width) for x in (q, k, v))
    out, joins = _downstream(node.output)
    return Attention(
        node,
        (heads, kv),
        width,
        query.linear,
        key.linear,
        value.linear,
        out,
        tuple(query.biases),
        tuple(key.biases),
        tuple(value.biases),
        tuple(dict.fromkeys(key.caches + value.caches)),
        tuple(dict.fromkeys(key.constants + value.constants)),
        node.input(SLOPES) if node.domain else None,
        (*((n, -2) for path in (query, key, value) for n in path.reshapes), *((n, -1) for n in joins)),
        tuple(node for path in (query, key, value) for node in path.adds),
        tuple(query.weights),
        (*key.weights, *value.weights),
    )


def _upstream(value: Value, width: int) -> _Path:
    biases: list[Value] = []
    constants: list[Value] = []
    caches: list[Value] = []
    reshapes: list[Node] = []
    adds: list[Node] = []
    weights: list[Value] = []
    while value.producer is not None:
        node = value.producer
        linear = as_linear(node)
        if linear is not None:
            return _Path(linear, reshapes, adds, biases, constants, caches, weights)
        if node.op == "Reshape":
            reshapes.append(node)
        if node.op == "Add":
            sides = [v for v in node.inputs if v is not None and not v.is_const]
            vectors = [v for v in node.inputs if v is not None and v.is_const]
            biases += vectors
            adds.append(node)
            if len(sides) != 1 or any(v.rank != 1 or v.shape != value.shape[-1:] for v in vectors if value.shape):
                break
            value = sides[0]
            continue
        scaled = _weighted_heads(node, width)
        if scaled is not None:
            weights.append(scaled[1])
            adds.append(node)
            value = scaled[0]
            continue
        if node.op in ("Vastai::QuantizeKV", "Vastai::DequantizeKV"):
            constants += [v for v in node.inputs[1:] if v is not None]
        if node.op in ("TensorScatter", "Concat"):
            caches += _caches(node.inputs[0], constants)
        across = node.op.endswith("Normalization") and value.shape is not None and value.shape[-1] != width
        if node.op not in _UPSTREAM or across:  # a norm over all heads needs the other ranks
            break
        following = node.inputs[_UPSTREAM[node.op]]
        assert following is not None
        value = following
    at = where(value.producer) if value.producer is not None else value.name
    raise CheckError(f"no linear layer is found upstream of an attention: stopped at {at}")


def _weighted_heads(node: Node, width: int) -> tuple[Value, Value] | None:
    """The heads [batch, heads, seq, width] and the constant [heads, 1, width] that a Mul multiplies."""
    shape = node.output.shape
    if node.op != "Mul" or shape is None or len(shape) != 4:
        return None
    for heads, weight in (node.inputs, node.inputs[::-1]):
        if heads is not None and weight is not None and weight.const is not None and heads.const is None:
            return (heads, weight) if weight.shape == (shape[1], 1, width) else None
    return None


def _caches(value: Value | None, constants: list[Value]) -> list[Value]:
    """The graph input that a cache write starts from, directly or dequantized."""
    while value is not None and value.producer is not None:
        node = value.producer
        if node.op == "Vastai::DequantizeKV":
            constants += [v for v in node.inputs[1:] if v is not None]
        value = node.inputs[0]
    return [value] if value is not None else []


def _downstream(value: Value) -> tuple[Linear, list[Node]]:
    """The linear that reads a value, and the Reshapes on the way."""
    reshapes: list[Node] = []
    while True:
        users = value.users()
        if len(users) != 1:
            raise CheckError(f"{value.name} has {len(users)} users; one output projection is expected")
        linear = as_linear(users[0])
        if linear is not None and linear.x is value:
            return linear, reshapes
        if users[0].op not in _DOWNSTREAM:
            raise CheckError(f"no linear layer follows the attention: stopped at {where(users[0])}")
        if users[0].op == "Reshape":
            reshapes.append(users[0])
        value = users[0].output


def feed_forward_blocks(graph: Graph) -> list[FeedForward]:
    """Every gated activation with its linears, and every plain activation that stands between two linears.

    Raises:
        CheckError: a gated activation is not fed by two linears; a plain one may stand anywhere, and is left alone.
    """
    blocks: list[FeedForward] = []
    for node in (node for node in graph.nodes() if node.op in _GATED):
        fed = [_biased(v) for v in node.inputs]
        ups = [found for found in fed if found is not None]
        if len(ups) != 2:
            raise CheckError(f"{where(node)} is not fed by two linear layers")
        blocks.append(_feed_forward(ups, _downstream(node.output)[0]))
    for node in (node for node in graph.nodes() if node.op in _PLAIN):
        up, users = _biased(node.inputs[0]), node.output.users()
        down = as_linear(users[0]) if len(users) == 1 else None
        if up is not None and down is not None and down.x is node.output and not graph.is_output(node.output):
            blocks.append(_feed_forward([up], down))
    return blocks


def _feed_forward(ups: list[tuple[Linear, list[Node], list[Value]]], down: Linear) -> FeedForward:
    sides = tuple((linear, tuple(biases)) for linear, _, biases in ups)
    return FeedForward(sides, tuple(node for _, adds, _ in ups for node in adds), down)


def _biased(value: Value | None) -> tuple[Linear, list[Node], list[Value]] | None:
    """The linear that makes a value, directly or under one bias vector."""
    node = value.producer if value is not None else None
    if node is None:
        return None
    linear = as_linear(node)
    if linear is not None:
        return linear, [], []
    if node.op != "Add":
        return None
    vectors = [v for v in node.inputs if v is not None and v.const is not None]
    sums = [v for v in node.inputs if v is not None and v.const is None]
    inner = as_linear(sums[0].producer) if len(sums) == 1 and sums[0].producer is not None else None
    if inner is None or len(vectors) != 1 or vectors[0].shape != (inner.out_features,):
        return None
    return inner, [node], vectors


def check_read_inside(
    graph: Graph, linears: Iterable[Linear], last: Collection[Node], known: Collection[Node] = ()
) -> None:
    """What a rank will hold a part of goes to the linears ``last``, where ranks meet, and nowhere else but to caches.

    ``known`` are nodes on that way of which the operator alone would not say so.

    Raises:
        CheckError: naming another reader.
    """
    pending = [linear.node.output for linear in linears]
    seen = set(pending)
    while pending:
        value = pending.pop()
        producer = value.producer
        if graph.is_output(value) and (producer is None or producer.op not in _CACHE_WRITES):
            raise CheckError(f"{value.name!r} is an output, and every rank would hold a part of it")
        for user in value.users():
            if user in last or user.op == "Shape":
                continue
            if user.op not in _PASSED_ON and user not in known:
                raise CheckError(f"{where(user)} reads {value.name!r}, of which every rank would hold a part")
            fresh = [v for v in user.outputs if v not in seen]
            seen.update(fresh)
            pending += fresh

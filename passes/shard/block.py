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
    "TensorScatter": 1,
    "Concat": 1,
    "Vastai::QuantizeKV": 0,
    "Vastai::DequantizeKV": 0,
}
_DOWNSTREAM = frozenset({"Transpose", "Reshape", "Cast"})
_GATED = ("Vastai::SwiGLU", "Vastai::GeGLU")
_PASSED_ON = frozenset({*_UPSTREAM, *_DOWNSTREAM, "Add", "Attention", "Vastai::Attention", *_GATED})
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
    adds: tuple[Node, ...]  # of the biases


@dataclass
class _Path:
    """What lies between a projection and the attention."""

    linear: Linear
    reshapes: list[Node]
    adds: list[Node]
    biases: list[Value]
    constants: list[Value]
    caches: list[Value]


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
    )


def _upstream(value: Value, width: int) -> _Path:
    biases: list[Value] = []
    constants: list[Value] = []
    caches: list[Value] = []
    reshapes: list[Node] = []
    adds: list[Node] = []
    while value.producer is not None:
        node = value.producer
        linear = as_linear(node)
        if linear is not None:
            return _Path(linear, reshapes, adds, biases, constants, caches)
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
        if node.op in ("Vastai::QuantizeKV", "Vastai::DequantizeKV"):
            constants += [v for v in node.inputs[1:] if v is not None]
        if node.op in ("TensorScatter", "Concat"):
            caches += _caches(node.inputs[0], constants)
        across = node.op == "RMSNormalization" and value.shape is not None and value.shape[-1] != width
        if node.op not in _UPSTREAM or across:  # a norm over all heads needs the other ranks
            break
        following = node.inputs[_UPSTREAM[node.op]]
        assert following is not None
        value = following
    at = where(value.producer) if value.producer is not None else value.name
    raise CheckError(f"no linear layer is found upstream of an attention: stopped at {at}")


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


def feed_forward_blocks(graph: Graph) -> list[tuple[Linear, Linear, Linear]]:
    """(gate, up, down) of every gated activation whose operands come from linears and whose result goes into one."""
    blocks: list[tuple[Linear, Linear, Linear]] = []
    for node in (node for node in graph.nodes() if node.op in _GATED):
        gate, up = (as_linear(v.producer) if v is not None and v.producer is not None else None for v in node.inputs)
        if gate is None or up is None:
            raise CheckError(f"{where(node)} is not fed by two linear layers")
        blocks.append((gate, up, _downstream(node.output)[0]))
    return blocks


def check_read_inside(graph: Graph, linears: Iterable[Linear], last: Collection[Node]) -> None:
    """What a rank will hold a part of goes to the linears ``last``, where ranks meet, and nowhere else but to caches.

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
            if user.op not in _PASSED_ON:
                raise CheckError(f"{where(user)} reads {value.name!r}, of which every rank would hold a part")
            fresh = [v for v in user.outputs if v not in seen]
            seen.update(fresh)
            pending += fresh

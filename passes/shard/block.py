"""An attention as split-tp sees it: which linears feed it, which follows, and what lies between."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

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
_PASSED_ON = frozenset({*_UPSTREAM, *_DOWNSTREAM, "Attention", "Vastai::Attention"})
_CACHE_WRITES = ("TensorScatter", "Concat")
_NORMS = ("RMSNormalization", "LayerNormalization")
_Axes = tuple[int, int]  # of the heads, and of the channels of each
_BY_HEAD: _Axes = (1, 3)  # of what an attention reads and gives


@dataclass(frozen=True)
class Headwise:
    """A constant with one entry a head along ``axis``, and the node that adds it or multiplies by it."""

    node: Node
    value: Value
    axis: int


@dataclass(frozen=True)
class Attention:
    """An attention with its four projections; ``heads`` is (query, KV), ``width`` channels a head.

    Heads of values, and so of the result, have ``value_width``.
    """

    node: Node
    heads: tuple[int, int]
    width: int
    value_width: int
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
    query_headwise: tuple[Headwise, ...]
    kv_headwise: tuple[Headwise, ...]

    @property
    def inside(self) -> tuple[Node, ...]:
        """The nodes between a projection and the attention that read a vector or a row of it for each head."""
        return (*self.adds, *(h.node for h in self.query_headwise + self.kv_headwise))


@dataclass
class _Path:
    """What lies between a projection and the attention."""

    reshapes: list[Node] = field(default_factory=list)
    adds: list[Node] = field(default_factory=list)
    biases: list[Value] = field(default_factory=list)
    constants: list[Value] = field(default_factory=list)
    caches: list[Value] = field(default_factory=list)
    headwise: list[Headwise] = field(default_factory=list)


def attention_block(node: Node) -> Attention:
    """The block around an Attention node; raises CheckError that names the first node not understood."""
    q, k, v = node.inputs[:3]
    assert q is not None
    assert k is not None
    assert v is not None
    if q.shape is None or k.shape is None or len(q.shape) != 4:
        raise CheckError(f"{where(node)} is not in [batch, heads, seq, channels] layout")
    heads, kv, width, value_width = q.shape[1], k.shape[1], q.shape[3], (v.shape or q.shape)[-1]
    if not (isinstance(heads, int) and isinstance(kv, int) and isinstance(width, int) and isinstance(value_width, int)):
        raise CheckError(f"{where(node)} has a symbolic number of heads")
    mask = node.input(3)
    if mask is not None and mask.shape is not None and len(mask.shape) > 2 and mask.shape[-3] != 1:
        raise CheckError(f"the mask of {where(node)} is {mask.type}: one a head, which is not split")
    (query_linear, query), (key_linear, key) = (_upstream(x, width) for x in (q, k))
    value_linear, value = _upstream(v, value_width)
    out, joins = downstream(node.output, _BY_HEAD)
    return Attention(
        node,
        (heads, kv),
        width,
        value_width,
        query_linear,
        key_linear,
        value_linear,
        out,
        tuple(query.biases),
        tuple(key.biases),
        tuple(value.biases),
        tuple(dict.fromkeys(key.caches + value.caches)),
        tuple(dict.fromkeys(key.constants + value.constants)),
        node.input(SLOPES) if node.domain else None,
        (*((n, -2) for path in (query, key, value) for n in path.reshapes), *((n, -1) for n in joins)),
        tuple(node for path in (query, key, value) for node in path.adds),
        tuple(query.headwise),
        tuple(key.headwise + value.headwise),
    )


def _upstream(value: Value, width: int) -> tuple[Linear, _Path]:
    path = _Path()
    axes: _Axes | None = _BY_HEAD  # None where heads and channels are one axis: vectors there are biases
    while value.producer is not None:
        node = value.producer
        linear = as_linear(node)
        if linear is not None:
            return linear, path
        following = _before(node, value, -1 if axes is None else axes[0], width, path)
        if following is None:
            break
        if node.op == "Transpose":
            perm = _permutation(node, axes)
            axes = axes and (perm[axes[0]], perm[axes[1]])
        if node.op == "Reshape":
            path.reshapes.append(node)
            axes = _reshaped(node, value, following, axes)
        value = following
    at = where(value.producer) if value.producer is not None else value.name
    raise CheckError(f"no linear layer is found upstream of an attention: stopped at {at}")


def _permutation(node: Node, axes: _Axes | None) -> tuple[int, ...]:
    """The permutation of a Transpose, which leaves heads and channels together where they are one axis."""
    rank = node.output.rank or 0
    perm = tuple(node.attributes.get("perm") or reversed(range(rank)))
    if axes is None and (rank > 3 or perm[-1] != rank - 1):
        raise CheckError(f"{where(node)} turns heads and channels that are one axis")
    return perm


def _reshaped(node: Node, near: Value, far: Value, axes: _Axes | None) -> _Axes | None:
    """Where heads and channels are on the far side of a Reshape: where they were, or in one axis.

    A rank holds whole heads, one after another; so they are joined heads first, each with its channels behind.
    """
    if axes is None or near.shape is None:
        return None
    sizes = [near.shape[axis] for axis in axes]
    if far.shape is not None and len(far.shape) == 4 and [far.shape[axis] for axis in axes] == sizes:
        return axes
    if axes != (len(near.shape) - 2, len(near.shape) - 1) and sizes[0] != 1:
        raise CheckError(f"{where(node)} joins {near.type}, whose heads are axis {axes[0]} and channels axis {axes[1]}")
    return None


def _before(node: Node, value: Value, axis: int, width: int, path: _Path) -> Value | None:
    """The operand of ``node`` that carries the heads, what else it reads noted in ``path``; None where it has none."""
    if node.op in ("Add", "Mul"):
        return _beside_constant(node, value, axis, path)
    if node.op in ("Vastai::QuantizeKV", "Vastai::DequantizeKV"):
        path.constants += [v for v in node.inputs[1:] if v is not None]
    if node.op in _CACHE_WRITES:
        cache = _cache(node, path.constants)
        if cache is None:
            return None
        path.caches.append(cache)
    if node.op == "RotaryEmbedding" and value.rank != 4:
        return None  # it counts the heads of all ranks, in an attribute
    # a norm over all heads needs the other ranks
    across = node.op in _NORMS and value.shape is not None and value.shape[-1] != width
    return node.inputs[_UPSTREAM[node.op]] if node.op in _UPSTREAM and not across else None


def _beside_constant(node: Node, value: Value, axis: int, path: _Path) -> Value | None:
    """The operand of an Add or Mul that is no constant; the constant is a bias, or has an entry for each head."""
    sides = [v for v in node.inputs if v is not None and not v.is_const]
    vectors = [v for v in node.inputs if v is not None and v.is_const]
    if len(sides) != 1 or len(vectors) != 1 or value.shape is None or sides[0].shape != value.shape:
        return None
    vector, shape = vectors[0], vectors[0].shape
    own = axis - value.rank + len(shape) if shape is not None and value.rank is not None and axis >= 0 else None
    if axis < 0 and node.op == "Add" and shape == value.shape[-1:] and len(value.shape) <= 3:
        path.adds.append(node)
        path.biases.append(vector)
    elif own is not None and own >= 0 and shape is not None and shape[own] != 1:
        path.headwise.append(Headwise(node, vector, own))
    elif own is not None or (node.op == "Mul" and set(shape or ()) <= {1}):  # the same for all heads
        path.adds.append(node)
    else:
        return None
    return sides[0]


def _cache(write: Node, constants: list[Value]) -> Value | None:
    """The graph input [batch, heads, seq, channels] to which a node adds tokens, directly or dequantized."""
    value, shape = write.inputs[0], write.output.shape
    if write.attributes.get("axis", -2) not in (2, -2) or shape is None or len(shape) != 4:
        return None
    while value is not None and value.const is None and value.rank == 4 and (value.shape or ())[1::2] == shape[1::2]:
        node = value.producer
        if node is None:
            return value
        if node.op == "Vastai::DequantizeKV":
            constants += [v for v in node.inputs[1:] if v is not None]
        value = node.input(0)
    return None


def downstream(value: Value, axes: _Axes | None = None) -> tuple[Linear, list[Node]]:
    """The linear that reads a value, and the Reshapes on the way; ``axes`` hold its heads and their channels."""
    reshapes: list[Node] = []
    while True:
        users = value.users()
        if len(users) != 1:
            raise CheckError(f"{value.name} has {len(users)} users; one output projection is expected")
        user = users[0]
        linear = as_linear(user)
        if linear is not None and linear.x is value:
            return linear, reshapes
        if user.op not in _DOWNSTREAM:
            raise CheckError(f"no linear layer follows the attention: stopped at {where(user)}")
        if user.op == "Transpose":
            perm = _permutation(user, axes)
            axes = axes and (perm.index(axes[0]), perm.index(axes[1]))
        if user.op == "Reshape":
            reshapes.append(user)
            axes = _reshaped(user, value, user.output, axes)
        value = user.output


def check_read_inside(
    graph: Graph, linears: Iterable[Linear], inside: Collection[Node], last: Collection[Node]
) -> None:
    """What a rank will hold a part of goes to the linears ``last``, where ranks meet, and nowhere else but to caches.

    ``inside`` are nodes on the way there whose operators may stand elsewhere too.

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
            if user.op not in _PASSED_ON and user not in inside:
                raise CheckError(f"{where(user)} reads {value.name!r}, of which every rank would hold a part")
            fresh = [v for v in user.outputs if v not in seen]
            seen.update(fresh)
            pending += fresh

"""Islands of fp32 in a model that will run in fp16: nodes that make or read a value which fp16 cannot hold.

Before ``cast-float`` an island is drawn by casts of float to float, which change nothing: one where a value enters, one
where it leaves. ``cast-float`` keeps what is between them in float and lets those that leave give fp16.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from vacc_opt.ir import DType, Graph, Node, Value
from vacc_opt.ir.rewriter import Rewriter

SELECTIONS = frozenset(
    ["GatherND", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"]
)  # what they give is no larger than what they read
_COMPUTING = frozenset(
    [
        "Add",
        "Div",
        "Gelu",
        "LayerNormalization",
        "MatMul",
        "Mul",
        "RMSNormalization",
        "Sub",
        "Tanh",
        "Vastai::GeGLU",
        "Vastai::QuantizedLinearPerChannel",
        "Vastai::SwiGLU",
    ]
)


_CACHED = frozenset(
    ["Attention", "Concat", "RotaryEmbedding", "TensorScatter", "Vastai::Attention", "Vastai::QuantizeKV"]
)


@dataclass(frozen=True)
class Island:
    """Values that fp16 cannot hold, the nodes that make and read them, and why these cannot run in fp32 (or empty)."""

    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    obstacle: str


def _is_border(node: Node) -> bool:
    """A cast that changes nothing as long as the model runs in float."""
    source = node.inputs[0] if node.op == "Cast" else None
    return source is not None and source.type.dtype is DType.FLOAT and node.output.type.dtype is DType.FLOAT


def islands_of(graph: Graph, beyond: Collection[Value]) -> Iterator[Island]:
    """The islands around these values: those that a node reads or makes together are of one."""
    pending = dict.fromkeys(beyond)
    while pending:
        values: dict[Value, None] = {}
        nodes: dict[Node, None] = {}
        reached = [next(iter(pending))]
        while reached:
            value = reached.pop()
            if value not in pending:
                continue
            del pending[value]
            values[value] = None
            for node in (None if is_weight_side(value) else value.producer, *value.users()):
                if node is not None:
                    nodes[node] = None
                    reached += [v for v in (*node.inputs, *node.outputs) if v is not None]
        yield Island(tuple(values), tuple(nodes), next(_obstacles(graph, values, nodes), ""))


def _obstacles(graph: Graph, values: Collection[Value], nodes: Collection[Node]) -> Iterator[str]:
    for value in values:
        if value.producer is None:
            yield "it is an input of the model"
    for node in nodes:
        if node.op in _CACHED:
            yield f"{node.op} ({node.output.name}) works on what the fp16 KV cache holds"
        elif node.op not in _COMPUTING | SELECTIONS:
            yield f"{node.op} ({node.output.name}) has no fp32 form in an fp16 model"


def is_weight_side(value: Value) -> bool:
    """A constant, or one that is turned."""
    node = value.producer
    if node is None:
        return value.is_const
    return node.op in SELECTIONS and all(v is None or v.is_const for v in node.inputs)


def draw(graph: Graph, rw: Rewriter, island: Island) -> None:
    """Put casts at the borders; an output of the model that fp16 cannot hold stays float."""
    inside = set(island.nodes)
    entered: dict[Value, Value] = {}
    for node in island.nodes:
        for position, value in enumerate(node.inputs):
            if value is None or not _is_float(value) or is_weight_side(value) or value.producer in inside:
                continue
            if value not in entered:
                entered[value] = _cast(rw, value, node)
            rw.set_input(node, position, entered[value])
    for value in (v for node in island.nodes for v in node.outputs if _is_float(v)):
        outside = [(node, position) for node, position in value.uses if node not in inside]
        names = [] if value in island.values else list(graph.output_names(value))
        if outside or names:
            assert value.producer is not None
            left = _cast(rw, value, value.producer)
            for node, position in outside:
                rw.set_input(node, position, left)
            for name in names:
                rw.set_output(name, left)


def _cast(rw: Rewriter, value: Value, of: Node) -> Value:
    with rw.on_behalf_of(of):
        return rw.op.Cast(value, to=DType.FLOAT.onnx)


def _is_float(value: Value) -> bool:
    return value.type.dtype is DType.FLOAT


@dataclass(frozen=True)
class Drawn:
    """What ``cast-float`` finds: the nodes of islands, and the casts by which values enter and leave them."""

    nodes: Mapping[Node, None]
    entries: tuple[Node, ...]
    exits: tuple[Node, ...]


def drawn_islands(graph: Graph) -> Drawn:
    """Read the borders back: from a cast that enters to those that leave, all nodes between are of an island."""
    wide: set[Value] = set()
    nodes: dict[Node, None] = {}
    entries: list[Node] = []
    exits: list[Node] = []
    for node in graph.nodes():
        if _is_border(node):
            if node.inputs[0] in wide:
                exits.append(node)
            else:
                entries.append(node)
                wide.add(node.output)
        elif any(v in wide for v in node.inputs):
            nodes[node] = None
            wide.update(v for v in node.outputs if _is_float(v))
    return Drawn(nodes, tuple(entries), tuple(exits))


def own_constants(graph: Graph, rw: Rewriter, drawn: Drawn) -> Collection[Value]:
    """The float constants that islands read, and that stay float; of one that others read too they get a copy."""
    found: dict[Value, None] = {}
    made: dict[Value, Value] = {}

    def own(value: Value, readers: Collection[Node]) -> Value:
        if value in made:
            return made[value]
        alone = all(user in readers for user in value.users()) and not graph.is_output(value)
        node, mine = value.producer, value
        if node is not None:  # a weight that is turned
            assert node.inputs[0] is not None
            source = own(node.inputs[0], [node] if alone else [])
            if not alone:
                mine = rw.add(node.op_type, (source, *node.inputs[1:]), node.attributes).output
            elif source is not node.inputs[0]:
                rw.set_input(node, 0, source)
        else:
            if not alone:
                assert value.const is not None
                mine = rw.const(value.const, f"{value.name}.float", of=value.provenance)
            found[mine] = None
        made[value] = made[mine] = mine
        return mine

    for node in drawn.nodes:
        for position, value in enumerate(node.inputs):
            if value is not None and _is_float(value) and is_weight_side(value):
                mine = own(value, drawn.nodes)
                if mine is not value:
                    rw.set_input(node, position, mine)
    return found

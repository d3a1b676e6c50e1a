"""Lowers a legalized graph with static shapes to a program: one rule an operator chooses kernels and binds tensors.

Reshapes, transposes and slices become strides. Index arithmetic on `pos` and `valid` disappears into runtime scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

from vacc_opt.backends.vacc.assemble import Operand
from vacc_opt.backends.vacc.kernels.collectives import all_gather, all_reduce
from vacc_opt.backends.vacc.kernels.elementwise import elementwise
from vacc_opt.backends.vacc.kernels.embedding import embedding
from vacc_opt.backends.vacc.kernels.move import select_row
from vacc_opt.backends.vacc.kernels.rms_norm import rms_norm
from vacc_opt.backends.vacc.lower_attention import lower_attention, lower_quantization, lower_rotary, lower_scatter
from vacc_opt.backends.vacc.lowering import Known, Lowering, is_cache
from vacc_opt.backends.vacc.refs import Ref
from vacc_opt.backends.vacc.schedule import Kernel, Param, Program
from vacc_opt.backends.vacc.search import fastest_linear
from vacc_opt.backends.vacc.target import Target
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.types import DType

_INDICES = (DType.INT64, DType.INT32, DType.BOOL)


def lower(graph: Graph, target: Target, *, phase: str) -> Program:
    """The program of `graph` on `target`; `phase` is `prefill` or `decode`.

    The graph is legalized and all its shapes are numbers. UserError names a node that no kernel covers.
    """
    low = Lowering(graph, target)
    for node in graph.nodes():
        if all(one.type.dtype in _INDICES for one in node.outputs):
            continue  # evaluated where an index is understood
        rule = RULES.get(node.op)
        if rule is None:
            raise UserError(f"no kernel for {node.op} (`{node.name}`)", "is the graph legalized?")
        low.begin(node)
        found = rule(low, node)
        low.end(node, found if isinstance(found, tuple) else (found,))
    outputs = {name: low.ref(value) for name, value in graph.outputs.items()}
    for name, ref in outputs.items():
        if name.startswith("present.") and not is_cache(ref.tensor):
            raise UserError(f"output `{name}` is not written in place into its cache", "run the pass `kv-cache`")
    return low.out.program(graph.name or phase, phase, graph.ranks, outputs)


def _gather(low: Lowering, node: Node) -> Ref:
    table, ids = node.inputs[0], node.inputs[1]
    if table is not None and table.const is not None and int(node.attributes.get("axis", 0)) == 0:
        return _embed(low, node, [])
    if int(node.attributes.get("axis", 0)) == 1 and low.ref(table).shape[0] == 1 and ids is not None:
        return _select(low, node, ids)
    raise UserError(f"no kernel for Gather of this form (`{node.name}`)")


def _embedding_shard(low: Lowering, node: Node) -> Ref:
    return _embed(low, node, [Operand("FIRST", "in", low.ref(node.inputs[2]))])


def _embed(low: Lowering, node: Node, first: list[Operand]) -> Ref:
    table, ids = low.ref(node.inputs[0]), low.ref(node.inputs[1])
    flat = low.view(ids, (prod(ids.shape),))
    y = low.out.temp(table.dtype, (*flat.shape, table.shape[1]))
    operands = [Operand("T", "in", table), Operand("IDS", "in", flat), *first, Operand("Y", "out", y)]

    def build(t: Param, rows: Param, *rest: Param) -> Kernel:
        return embedding(t, rows, rest[0] if first else None, rest[-1], low.target)

    low.emit("embedding", build, operands)
    return low.view(y, (*ids.shape, table.shape[1]))


def _gather_nd(low: Lowering, node: Node) -> Ref:
    if int(node.attributes.get("batch_dims", 0)) != 1 or node.inputs[1] is None:
        raise UserError(f"no kernel for GatherND with batch_dims other than 1 (`{node.name}`)")
    return _select(low, node, node.inputs[1])


def _select(low: Lowering, node: Node, index: Value) -> Ref:
    """Row `valid - 1` of every batch row."""
    x = low.ref(node.inputs[0])
    low.expect(node, index, "valid", -1, "the row")
    y = low.out.temp(x.dtype, (x.shape[0], x.shape[2]))
    for row in range(x.shape[0]):
        operands = [Operand("X", "in", x.at(row)), Operand("Y", "out", y.sliced(0, row, row + 1))]
        low.emit("select", lambda a, b: select_row(a, b, low.target), operands, valid=("valid", row))
    return low.view(y, low.type(node.outputs[0])[1])


def _rms_norm(low: Lowering, node: Node) -> Ref:
    source = low.ref(node.inputs[0])
    if int(node.attributes.get("axis", -1)) not in (-1, len(source.shape) - 1):
        raise UserError(f"no kernel for a norm over several axes (`{node.name}`)")
    x, eps = low.rows(source), float(node.attributes.get("epsilon", 1e-5))
    y = low.out.temp(x.dtype, x.shape)
    operands = [Operand("X", "in", x), Operand("W", "in", low.ref(node.inputs[1])), Operand("Y", "out", y)]
    low.emit(("norm", eps), lambda a, w, b: rms_norm(a, w, b, eps, low.target), operands)
    return low.view(y, source.shape)


def _matmul(low: Lowering, node: Node) -> Ref:
    weight = low.ref(node.inputs[1])
    if len(weight.shape) != 2:
        raise UserError(f"no kernel for a product of two activations (`{node.name}`)", "fuse-gqa covers attention")
    return _linear(low, node, weight.transposed((1, 0)), [])


def _quantized_linear(low: Lowering, node: Node) -> Ref:
    return _linear(low, node, low.ref(node.inputs[1]), [Operand("S", "in", low.ref(node.inputs[2]))])


def _linear(low: Lowering, node: Node, weight: Ref, scale: list[Operand]) -> Ref:
    source = low.ref(node.inputs[0])
    x = low.rows(source)
    y = low.out.temp(x.dtype, (x.shape[0], weight.shape[0]))
    operands = [Operand("X", "in", x), Operand("W", "in", weight), *scale, Operand("Y", "out", y)]

    def build(a: Param, w: Param, *rest: Param) -> Kernel:
        return fastest_linear(a, w, rest[0] if scale else None, rest[-1], low.target)

    low.emit("linear", build, operands)
    return low.view(y, (*source.shape[:-1], weight.shape[0]))


def _row(b: Ref, size: int) -> Ref | None:
    """`b` as the vector of `size` elements that every row meets; None when `b` differs from row to row."""
    if any(one != 1 for one in b.shape[:-1]):
        return None
    return replace(b, shape=b.shape[-1:], strides=b.strides[-1:]).broadcast((size,))


def _elementwise(low: Lowering, node: Node) -> Ref:
    kind = {"Add": "add", "Mul": "mul", "Vastai::SwiGLU": "silu_mul"}[node.op]
    shape = low.type(node.outputs[0])[1]
    a, b = low.ref(node.inputs[0]), low.ref(node.inputs[1])
    if a.shape != shape and kind in ("add", "mul"):
        a, b = b, a
    row = _row(b, shape[-1]) if shape and b.shape != shape else None
    if not shape or a.shape != shape or (row is None and b.shape != shape):
        raise UserError(f"no kernel for {node.op} of {list(a.shape)} and {list(b.shape)} (`{node.name}`)")
    left = low.rows(a)
    right = low.rows(b) if row is None else row
    y = low.out.temp(left.dtype, left.shape)
    operands = [Operand("A", "in", left), Operand("B", "in", right), Operand("Y", "out", y)]
    low.emit(kind, lambda p, q, r: elementwise(kind, p, q, r, low.target), operands)
    return low.view(y, shape)


def _all_reduce(low: Lowering, node: Node) -> Ref:
    source = low.ref(node.inputs[0])
    x = low.view(source, (prod(source.shape),))
    y = low.out.temp(x.dtype, x.shape)
    low.emit("all_reduce", all_reduce, [Operand("X", "in", x), Operand("Y", "out", y)])
    return low.view(y, source.shape)


def _all_gather(low: Lowering, node: Node) -> Ref:
    source = low.ref(node.inputs[0])
    if int(node.attributes["axis"]) not in (-1, len(source.shape) - 1):
        raise UserError(f"no kernel for an AllGather along axis {node.attributes['axis']} (`{node.name}`)")
    x = low.rows(source)
    ranks = low.graph.ranks
    y = low.out.temp(x.dtype, (x.shape[0], ranks, x.shape[1]))
    low.emit("all_gather", all_gather, [Operand("X", "in", x), Operand("Y", "out", y)])
    return low.view(y, (*source.shape[:-1], ranks * source.shape[-1]))


def _reshape(low: Lowering, node: Node) -> Ref:
    return low.view(low.ref(node.inputs[0]), low.type(node.outputs[0])[1])


def _transpose(low: Lowering, node: Node) -> Ref:
    ref = low.ref(node.inputs[0])
    return ref.transposed(node.attributes.get("perm") or tuple(reversed(range(len(ref.shape)))))


def _slice(low: Lowering, node: Node) -> Ref:
    ref = low.ref(node.inputs[0])
    starts, ends, axes, steps = (low.integers(node, index) for index in (1, 2, 3, 4))
    for index, (start, end) in enumerate(zip(starts or (), ends or (), strict=True)):
        axis = axes[index] if axes else index
        step = steps[index] if steps else 1
        if step < 1:
            raise UserError(f"no kernel for a Slice with step {step} (`{node.name}`)")
        first, last, _ = slice(start, end).indices(ref.shape[axis])
        ref = ref.sliced(axis % len(ref.shape), first, last, step)
    return ref


def _split(low: Lowering, node: Node) -> tuple[Ref, ...]:
    ref, axis = low.ref(node.inputs[0]), int(node.attributes.get("axis", 0))
    axis %= len(ref.shape)
    found, at = [], 0
    for value in node.outputs:
        size = low.type(value)[1][axis]
        found.append(ref.sliced(axis, at, at + size))
        at += size
    return tuple(found)


RULES: dict[str, Callable[[Lowering, Node], Known | tuple[Ref, ...]]] = {
    "Add": _elementwise,
    "Attention": lower_attention,
    "Flatten": _reshape,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Identity": lambda low, node: low.ref(node.inputs[0]),
    "MatMul": _matmul,
    "Mul": _elementwise,
    "RMSNormalization": _rms_norm,
    "Reshape": _reshape,
    "RotaryEmbedding": lower_rotary,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _reshape,
    "TensorScatter": lower_scatter,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
    "Vastai::AllGather": _all_gather,
    "Vastai::AllReduce": _all_reduce,
    "Vastai::DequantizeKV": lower_quantization,
    "Vastai::EmbeddingShard": _embedding_shard,
    "Vastai::QuantizeKV": lower_quantization,
    "Vastai::QuantizedLinearPerChannel": _quantized_linear,
    "Vastai::SwiGLU": _elementwise,
}

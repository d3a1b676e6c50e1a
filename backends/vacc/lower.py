"""Lowers a legalized graph with static shapes to a program: one rule an operator chooses kernels and binds tensors.

Reshapes, transposes and slices become strides. Index arithmetic on `pos` and `valid` disappears into runtime scalars.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from math import prod

from vacc_opt.backends.vacc.assemble import Operand
from vacc_opt.backends.vacc.fusion import (
    EVERY,
    Fusion,
    Normed,
    added,
    gated,
    pending,
    reduced,
    reshaped,
    scales_rows,
    store,
    sums_of,
    with_bias,
)
from vacc_opt.backends.vacc.kernels.add_rms_norm import add_rms_norm
from vacc_opt.backends.vacc.kernels.builder import param
from vacc_opt.backends.vacc.kernels.collectives import all_gather, all_reduce, reduce_scatter
from vacc_opt.backends.vacc.kernels.elementwise import elementwise
from vacc_opt.backends.vacc.kernels.embedding import embedding
from vacc_opt.backends.vacc.kernels.layer_norm import layer_norm
from vacc_opt.backends.vacc.kernels.move import select_row
from vacc_opt.backends.vacc.kernels.rms_norm import rms_norm
from vacc_opt.backends.vacc.kernels.row_scale import row_scale
from vacc_opt.backends.vacc.lower_attention import lower_attention, lower_quantization, lower_rotary, lower_scatter
from vacc_opt.backends.vacc.lowering import Known, Lowering, is_cache
from vacc_opt.backends.vacc.refs import Ref, inverse
from vacc_opt.backends.vacc.schedule import Kernel, Param, Program
from vacc_opt.backends.vacc.target import Target
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.types import DType

_INDICES = (DType.INT64, DType.INT32, DType.BOOL)


def lower(graph: Graph, target: Target, *, phase: str, fusions: Collection[Fusion] = EVERY) -> Program:
    """The program of `graph` on `target`; `phase` is `prefill` or `decode`, or begins so.

    The graph is legalized and all its shapes are numbers. `fusions`: what may be fused into linears. UserError names a
    node that no kernel covers.
    """
    low = Lowering(graph, target, fusions)
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
    if (
        ids is not None
        and ids.const is None
        and int(node.attributes.get("axis", 0)) == 1
        and low.ref(table).shape[0] == 1
    ):
        return _select(low, node, ids)
    view = _strided_rows(low, node) if ids is not None and ids.const is not None else None
    if view is None:
        raise UserError(f"no kernel for Gather of this form (`{node.name}`)")
    return view


def _strided_rows(low: Lowering, node: Node) -> Ref | None:
    """Rows at constant, evenly spaced places as a view; None for other places."""
    ref, rows = low.ref(node.inputs[0]), low.integers(node, 1)
    axis = int(node.attributes.get("axis", 0)) % len(ref.shape)
    places = [one % ref.shape[axis] for one in rows or ()]
    step = places[1] - places[0] if len(places) > 1 else 1
    if not places or step < 1 or places != list(range(places[0], places[-1] + 1, step)):
        return None
    return low.view(ref.sliced(axis, places[0], places[-1] + 1, step), low.type(node.outputs[0])[1])


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


def _norm(low: Lowering, node: Node) -> Ref | Normed:
    """RMSNormalization or LayerNormalization over the last axis."""
    source = low.ref(node.inputs[0])
    if int(node.attributes.get("axis", -1)) not in (-1, len(source.shape) - 1) or len(node.outputs) != 1:
        raise UserError(f"no kernel for a norm over several axes, or one that gives its statistics (`{node.name}`)")
    return _normed(low, node, source, node.inputs[1:])


def _normed(low: Lowering, node: Node, source: Ref, values: Sequence[Value | None]) -> Ref | Normed:
    """The norm of `node` with tables `values`, of rows in the order in which they lie in memory."""
    eps, order = _epsilon(node), low.by_layout(source)
    moved = source.transposed(order)
    x = low.rows(moved)
    if node.op != "LayerNormalization" and scales_rows(low, node):
        y = low.out.temp("f32", (x.shape[0], 1))
        operands = [Operand("X", "in", x), Operand("Y", "out", y)]
        low.emit(("row_scale", eps), lambda a, b: row_scale(a, b, eps, low.target), operands)
        return Normed(source, low.view(y, (*moved.shape[:-1], 1)).transposed(inverse(order)))
    y = low.out.temp(low.dtype(node), x.shape)
    tables = [Operand(name, "in", low.ref(v)) for name, v in zip("WC", values, strict=False) if v is not None]

    def build(a: Param, w: Param, *rest: Param) -> Kernel:
        if node.op == "LayerNormalization":
            return layer_norm(a, w, rest[0] if len(rest) > 1 else None, rest[-1], eps, low.target)
        return rms_norm(a, w, rest[-1], eps, low.target)

    low.emit(
        ("norm", node.op == "LayerNormalization", eps), build, [Operand("X", "in", x), *tables, Operand("Y", "out", y)]
    )
    return low.view(y, moved.shape).transposed(inverse(order))


def _epsilon(node: Node) -> float:
    return float(node.attributes.get("epsilon", 1e-5))


def _add_norm(low: Lowering, node: Node) -> tuple[Ref | Normed, Ref]:
    """A sum and its norm: one kernel, or the norm of what the linear before it has added up."""
    dtype, eps, gain = low.dtype(node), _epsilon(node), node.inputs[2]
    assert gain is not None
    w = param("W", "in", *low.type(gain))

    def apart(x: Ref, r: Ref) -> Kernel:
        y, s = (replace(x, dtype=dtype).param(name, "out") for name in "YS")
        return add_rms_norm(x.param("X", "in"), r.param("R", "in"), w, y, s, eps, low.target)

    def rest(x: Ref) -> Kernel:
        y = replace(x, dtype=dtype).param("Y", "out")
        return rms_norm(x.param("X", "in"), w, y, eps, low.target)

    sums = added(low, node, apart, rest)
    if sums:
        total = store(low, sums)
        low.taken()
        return _normed(low, node, total, node.inputs[2:]), total
    if Fusion.NORM not in low.fusions:
        total = _combined(low, node, "add", [low.ref(v) for v in node.inputs[:2]])
        return _normed(low, node, total, node.inputs[2:]), total
    first, second = (low.ref(v) for v in node.inputs[:2])
    order = low.by_layout(first)
    moved = first.transposed(order)
    x, r = low.rows(moved), low.rows(second.transposed(order))
    y, s = (low.out.temp(dtype, x.shape) for _ in range(2))
    given = [Operand(name, "in", ref) for name, ref in zip("XRW", (x, r, low.ref(gain)), strict=True)]

    def build(a: Param, b: Param, w: Param, c: Param, d: Param) -> Kernel:
        return add_rms_norm(a, b, w, c, d, eps, low.target)

    low.emit((node.op, eps), build, [*given, Operand("Y", "out", y), Operand("S", "out", s)])
    back = inverse(order)
    return low.view(y, moved.shape).transposed(back), low.view(s, moved.shape).transposed(back)


def _matmul(low: Lowering, node: Node) -> Known:
    weight = low.ref(node.inputs[1])
    if len(weight.shape) != 2:
        raise UserError(f"no kernel for a product of two activations (`{node.name}`)", "fuse-gqa covers attention")
    return low.waiting(node.output, sums_of(low, node, weight.transposed((1, 0)), None))


def _quantized_linear(low: Lowering, node: Node) -> Known:
    weight, scale = low.ref(node.inputs[1]), low.ref(node.inputs[2])
    return low.waiting(node.output, sums_of(low, node, weight, scale))


def _cast(low: Lowering, node: Node) -> Ref:
    """Kernels read any float type and compute in f32: only a cast to fewer bits, or of an output, moves anything."""
    free = low.dtype(node) == "f32" and not low.graph.is_output(node.output)
    return low.ref(node.inputs[0]) if free else _elementwise(low, node)


_ELEMENTWISE = {
    "Add": "add",
    "Cast": "cast",
    "Div": "div",
    "Gelu": "gelu",
    "Mul": "mul",
    "Sub": "sub",
    "Tanh": "tanh",
    "Vastai::GeGLU": "gelu_mul",
    "Vastai::SwiGLU": "silu_mul",
}


def _add(low: Lowering, node: Node) -> Known:
    def apart(x: Ref, r: Ref) -> Kernel:
        y = replace(x, dtype=low.dtype(node)).param("Y", "out")
        return elementwise("add", x.param("A", "in"), r.param("B", "in"), y, low.target)

    sums = with_bias(low, node) or added(low, node, apart)
    return low.waiting(node.output, sums) if sums else _elementwise(low, node)


def _gated(low: Lowering, node: Node) -> Known:
    sums = gated(low, node)
    return low.waiting(node.output, sums) if sums else _elementwise(low, node)


def _elementwise(low: Lowering, node: Node) -> Ref:
    return _combined(low, node, _ELEMENTWISE[node.op], [low.ref(one) for one in node.inputs])


def _combined(low: Lowering, node: Node, kind: str, refs: list[Ref], shape: tuple[int, ...] | None = None) -> Ref:
    """An operation of one or two tensors, rows in the order in which the first lies in memory.

    `shape`: of the result, if it is not what `node` gives.
    """
    shape = low.type(node.outputs[0])[1] if shape is None else shape
    if kind in ("add", "mul"):
        refs.sort(key=lambda one: one.shape != shape)  # either way round
    if not shape or refs[0].shape != shape:
        shapes = " and ".join(str(list(one.shape)) for one in refs)
        raise UserError(f"no kernel for {node.op} of {shapes} (`{node.name}`)")
    order = low.by_layout(refs[0])
    moved, *others = (one.transposed(order) for one in [refs[0], *(_broadcast(one, shape) for one in refs[1:])])
    alike = all(one.shape == shape for one in refs)
    repeated = len(shape) - 1 if alike else _repeated(others[0])
    left = low.view(moved, (prod(moved.shape[:repeated]), prod(moved.shape[repeated:])))
    operands = [Operand("A", "in", left)]
    for one in others:
        right = low.rows(one) if alike else low.view(_first(one, repeated), left.shape[1:])
        operands.append(Operand("B", "in", right))
    y = low.out.temp(low.dtype(node), left.shape)
    attributes = {"tanh": int(node.attributes.get("approximate") == "tanh")} if kind.startswith("gelu") else {}

    def build(a: Param, *rest: Param) -> Kernel:
        return elementwise(kind, a, rest[0] if others else None, rest[-1], low.target, **attributes)

    low.emit((kind, *attributes.values()), build, [*operands, Operand("Y", "out", y)])
    return low.view(y, moved.shape).transposed(inverse(order))


def _broadcast(ref: Ref, shape: tuple[int, ...]) -> Ref:
    found = ref.broadcast(shape)
    if found is None:
        raise UserError(f"a tensor {list(ref.shape)} does not broadcast to {list(shape)}")
    return found


def _repeated(ref: Ref) -> int:
    """Leading axes, but for the last axis, along which all elements are the same: what is left meets every row."""
    count = 0
    while count < len(ref.shape) - 1 and (ref.shape[count] == 1 or not ref.strides[count]):
        count += 1
    return count


def _first(ref: Ref, axes: int) -> Ref:
    """The first element along that many axes."""
    for _ in range(axes):
        ref = ref.at(0)
    return ref


def _all_reduce(low: Lowering, node: Node) -> Known:
    sums = reduced(low, node)
    if sums:
        return low.waiting(node.output, sums)
    source = _given(low, node)
    x = low.view(source, (prod(source.shape),))
    y = low.out.temp(x.dtype, x.shape)
    low.emit("all_reduce", all_reduce, [Operand("X", "in", x), Operand("Y", "out", y)])
    return low.view(y, source.shape)


def _given(low: Lowering, node: Node) -> Ref:
    """What ranks add up, in the type of the sum: a transfer does not convert what a cast left as it was."""
    source = low.ref(node.inputs[0])
    return source if source.dtype == low.dtype(node) else _combined(low, node, "cast", [source], source.shape)


def _reduce_scatter(low: Lowering, node: Node) -> Ref:
    source, ranks = _given(low, node), low.graph.ranks
    axis = int(node.attributes["axis"]) % len(source.shape)
    if prod(source.shape[:axis]) != 1:
        raise UserError(f"no kernel for a ReduceScatter behind {list(source.shape[:axis])} (`{node.name}`)")
    x = low.view(source, (ranks, prod(source.shape) // ranks))
    y = low.out.temp(x.dtype, x.shape[1:])
    low.emit("reduce_scatter", reduce_scatter, [Operand("X", "in", x), Operand("Y", "out", y)])
    return low.view(y, low.type(node.outputs[0])[1])


def _all_gather(low: Lowering, node: Node) -> Ref:
    source, ranks = low.ref(node.inputs[0]), low.graph.ranks
    axis = int(node.attributes["axis"]) % len(source.shape)
    x = low.view(source, (prod(source.shape[:axis]), prod(source.shape[axis:])))
    y = low.out.temp(x.dtype, (x.shape[0], ranks, x.shape[1]))
    low.emit("all_gather", all_gather, [Operand("X", "in", x), Operand("Y", "out", y)])
    return low.view(y, low.type(node.outputs[0])[1])


def _reshape(low: Lowering, node: Node) -> Known:
    shape, sums = low.type(node.outputs[0])[1], pending(low, node.inputs[0])
    seen = reshaped(sums, shape) if sums else None
    return low.waiting(node.output, seen) if seen else low.view(low.ref(node.inputs[0]), shape)


def _transpose(low: Lowering, node: Node) -> Known:
    sums = pending(low, node.inputs[0])
    ref = sums.view if sums else low.ref(node.inputs[0])
    found = ref.transposed(node.attributes.get("perm") or tuple(reversed(range(len(ref.shape)))))
    return low.waiting(node.output, replace(sums, view=found)) if sums else found


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


RULES: dict[str, Callable[[Lowering, Node], Known | tuple[Known, ...]]] = {
    "Add": _add,
    "Attention": lower_attention,
    "Cast": _cast,
    "Div": _elementwise,
    "Flatten": _reshape,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gelu": _elementwise,
    "Identity": lambda low, node: low.ref(node.inputs[0]),
    "LayerNormalization": _norm,
    "MatMul": _matmul,
    "Mul": _elementwise,
    "RMSNormalization": _norm,
    "Reshape": _reshape,
    "RotaryEmbedding": lower_rotary,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _reshape,
    "Sub": _elementwise,
    "Tanh": _elementwise,
    "TensorScatter": lower_scatter,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
    "Vastai::AddRMSNormalization": _add_norm,
    "Vastai::AllGather": _all_gather,
    "Vastai::AllReduce": _all_reduce,
    "Vastai::Attention": lower_attention,
    "Vastai::DequantizeKV": lower_quantization,
    "Vastai::EmbeddingShard": _embedding_shard,
    "Vastai::GeGLU": _gated,
    "Vastai::QuantizeKV": lower_quantization,
    "Vastai::QuantizedLinearPerChannel": _quantized_linear,
    "Vastai::ReduceScatter": _reduce_scatter,
    "Vastai::SwiGLU": _gated,
}

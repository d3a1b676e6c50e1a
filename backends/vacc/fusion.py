"""Which operators become the epilogue of the linear before them, and the linears that wait for it.

A linear that one node alone reads is not lowered at once: its sums wait for that node, which takes them (a bias, an
activation, a rotary embedding, a write into a cache) or lets them be stored: every fusion is one rule about one node.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from vacc_opt.backends.vacc.assemble import Operand
from vacc_opt.backends.vacc.epilogue import GATES, Epilogue, Gate, Turn
from vacc_opt.backends.vacc.kernels.collectives import all_reduce
from vacc_opt.backends.vacc.kernels.elementwise import elementwise
from vacc_opt.backends.vacc.kernels.rotary import rotary
from vacc_opt.backends.vacc.refs import Ref
from vacc_opt.backends.vacc.schedule import Kernel, Param, row_major
from vacc_opt.backends.vacc.search import Found, Searched, estimate_linear, search_linear
from vacc_opt.backends.vacc.simulate_time import time_kernel
from vacc_opt.ir.graph import Node, Value
from vacc_opt.ir.tensor import Casted, Literal, TensorExpr

if TYPE_CHECKING:
    from vacc_opt.backends.vacc.lowering import Lowering


class Fusion(Enum):
    """A kind of operator that can be fused into the linear before it, or (`NORM`) into the norm behind it."""

    GATE = "gate"  # SwiGLU, GeGLU: gate and other linear are one kernel
    BIAS = "bias"
    ROTARY = "rotary"
    RESIDUAL = "residual"  # the residual stream that the sums are added to
    ROW_SCALE = "row-scale"  # of an RMS norm whose weight is all ones, by the linears that read it
    NORM = "norm"  # a sum with the residual stream and the norm of it, where no linear adds the sum
    APPEND = "append"  # new rows of a KV cache, quantized on the way when it is int8
    ALL_REDUCE = "all-reduce"  # of the ranks' parts of a product


EVERY: Collection[Fusion] = tuple(Fusion)
_READERS = {
    "Add": {Fusion.BIAS, Fusion.RESIDUAL},
    "Vastai::AddRMSNormalization": {Fusion.RESIDUAL},
    "Vastai::SwiGLU": {Fusion.GATE},
    "Vastai::GeGLU": {Fusion.GATE},
    "RotaryEmbedding": {Fusion.ROTARY},
    "Vastai::QuantizeKV": {Fusion.APPEND},
    "TensorScatter": {Fusion.APPEND},
    "Vastai::AllReduce": {Fusion.ALL_REDUCE},
}
UNSURE = 0.01  # of the cycles: what the closed form is off by, so that less is searched
_LINEARS = ("MatMul", "Vastai::QuantizedLinearPerChannel")
_VIEWS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")


@dataclass(frozen=True, slots=True)
class Normed:
    """`source` [..., K] times `factor` [..., 1], which the linears that read it multiply their sums with."""

    source: Ref
    factor: Ref | None


@dataclass(frozen=True, slots=True)
class Sums:
    """`x` [M, K] times `w` [N, K]^T with what is fused so far, not lowered yet.

    `view` is the value as it would lie in a row-major tensor [M, N] without a name; `node` computes it.
    """

    x: Ref
    w: Ref
    scale: Ref | None
    view: Ref
    node: Node
    bias: Ref | None = None
    gate: tuple[str, int, Sums] | None = None  # kind, form of the GELU, the other sums
    factor: Ref | None = None  # [M, 1]
    residual: Ref | None = None  # [M, N]
    turn: tuple[Ref, Ref, bool] | None = None
    codes: tuple[Ref, Ref] | None = None  # scale and zero [H, D]
    ranks: int = 0  # that add up their parts

    @property
    def plain(self) -> bool:
        """Whether these are still sums of columns, to which more may be added."""
        return not (self.gate or self.residual or self.turn or self.codes or self.ranks)

    @property
    def heads(self) -> tuple[int, int] | None:
        """(heads, channels of each) where the value is [1, heads, S, channels] of S rows; None otherwise."""
        if len(self.view.shape) != 4 or self.view.shape[0] != 1:
            return None
        _, heads, length, width = self.view.shape
        one = replace(self.view, shape=self.view.shape[1:], strides=self.view.strides[1:])
        due = Ref("", one.dtype, (length, heads, width), row_major((length, heads, width))).transposed((1, 0, 2))
        fits = length == self.x.shape[0] and one.param("Y", "in") == due.param("Y", "in")
        return (heads, width) if fits else None


def waits(low: Lowering, value: Value) -> bool:
    """Whether one node alone reads a value and may take the sums of a linear behind it."""
    if low.graph.is_output(value) or len(value.uses) != 1:
        return False
    (reader,) = value.users()
    return (reader.op in _VIEWS and bool(low.fusions)) or bool(_READERS.get(reader.op, set()) & set(low.fusions))


def pending(low: Lowering, value: Value | None) -> Sums | None:
    """The sums that wait for the reader of a value."""
    found = low.known.get(value) if value is not None else None
    return found if isinstance(found, Sums) else None


def with_bias(low: Lowering, node: Node) -> Sums | None:
    """Sums to which `node` (Add) adds a number a column; None where it does something else."""
    for sums, other in (node.inputs, node.inputs[::-1]):
        found = pending(low, sums)
        if not found or not found.plain or found.bias or Fusion.BIAS not in low.fusions or pending(low, other):
            continue
        columns, bias = found.w.shape[0], low.ref(other)
        shape = low.type(node.outputs[0])[1]
        wide = (1,) * (len(bias.shape) - 1) + (columns,) == bias.shape
        if wide and shape == found.view.shape and shape[-1] == columns:
            view = replace(found.view, dtype=low.dtype(node))
            return replace(found, bias=replace(bias, shape=(columns,), strides=bias.strides[-1:]), view=view, node=node)
    return None


def gated(low: Lowering, node: Node) -> Sums | None:
    """The sums of two linears of one input that `node` (SwiGLU, GeGLU) multiplies; None where they are not that."""
    gate, other = pending(low, node.inputs[0]), pending(low, node.inputs[1])
    if not gate or not other or Fusion.GATE not in low.fusions:
        return None
    alike = gate.x == other.x and gate.view == other.view and gate.plain and other.plain
    alike &= (gate.w.shape, gate.w.dtype) == (other.w.shape, other.w.dtype)
    if not alike or (gate.bias is None) != (other.bias is None):
        return None
    kind = "swiglu" if node.op == "Vastai::SwiGLU" else "geglu"
    tanh = int(kind == "geglu" and node.attributes.get("approximate") == "tanh")
    dtype, shape = low.dtype(node), (gate.x.shape[0], gate.w.shape[0])
    fused = replace(gate, gate=(kind, tanh, other), view=replace(gate.view, dtype=dtype), node=node)
    sides = [Ref("", one, shape, row_major(shape)) for one in (gate.view.dtype, other.view.dtype, dtype)]

    def apart() -> Kernel:
        a, b, y = (one.param(name, mode) for one, name, mode in zip(sides, "ABY", ("in", "in", "out"), strict=True))
        return elementwise(GATES[kind], a, b, y, low.target, **({"tanh": tanh} if kind == "geglu" else {}))

    return fused if _pays(low, fused, [gate, other], [apart]) else None


def added(
    low: Lowering, node: Node, apart: Callable[[Ref, Ref], Kernel], rest: Callable[[Ref], Kernel] | None = None
) -> Sums | None:
    """Sums, of one rank or of all, to which `node` adds a stream of their shape; None where it does something else.

    `apart` makes the kernel of `node` for both as rows; `rest` that of what it does besides with what was added up.
    """
    for value, other in (node.inputs[:2], node.inputs[1::-1]):
        found = pending(low, value)
        if not found or other is None or Fusion.RESIDUAL not in low.fusions or not replace(found, ranks=0).plain:
            continue
        shape, order = (found.x.shape[0], found.w.shape[0]), low.by_layout(found.view)
        rows = found.view.transposed(order).reshaped(shape)
        if low.type(other)[1] != found.view.shape or not rows or rows.strides != row_major(shape):
            continue
        stream = low.ref(other).transposed(order).reshaped(shape)
        if not stream:
            continue
        view = replace(found.view, dtype=low.type(node.outputs[-1])[0])
        fused, total = replace(found, residual=stream, view=view, node=node), replace(rows, dtype=view.dtype)
        kernels = [partial(apart, rows, stream)], [partial(rest, total)] if rest else []
        return fused if _pays(low, fused, [found], *kernels) else None
    return None


def turned(low: Lowering, node: Node, cos: Ref, sin: Ref, interleaved: bool) -> Sums | None:
    """Sums of one row of a batch whose heads `node` turns; None where they are not that."""
    found = pending(low, node.inputs[0])
    if not found or not found.plain or not found.heads or Fusion.ROTARY not in low.fusions:
        return None
    fused = replace(found, turn=(cos, sin, interleaved), node=node)
    x = found.view.at(0)

    def apart() -> Kernel:
        return rotary(
            x.param("X", "in"), cos.param("COS", "in"), sin.param("SIN", "in"), x.param("Y", "out"), interleaved,
            low.target,
        )  # fmt: skip

    return fused if _pays(low, fused, [found], [apart]) else None


def reduced(low: Lowering, node: Node) -> Sums | None:
    """The sums of a linear of which `node` (AllReduce) adds up those of all ranks; None where it reads others."""
    found = pending(low, node.inputs[0])
    if not found or not found.plain or Fusion.ALL_REDUCE not in low.fusions:
        return None
    size = (found.x.shape[0] * found.w.shape[0],)

    def apart() -> Kernel:
        x, y = (Param(name, found.view.dtype, size, (1,), mode) for name, mode in (("X", "in"), ("Y", "out")))
        return all_reduce(x, y)

    fused = replace(found, ranks=low.graph.ranks, node=node)
    return fused if _pays(low, fused, [found], [apart]) else None


def _pays(
    low: Lowering,
    fused: Sums,
    parts: list[Sums],
    apart: Sequence[Callable[[], Kernel]],
    rest: Sequence[Callable[[], Kernel]] = (),
) -> bool:
    """Whether a fusion that narrows the choice of tiles, and the `rest`, take no longer than its parts and `apart`."""
    made = fused.node.op, [one.view.dtype for one in parts], fused.gate[:2] if fused.gate else fused.turn, fused.ranks
    key = repr((_params(fused), made))
    if key not in low.pays:
        before, after = (
            sum(time_kernel(one(), low.target, {"pos": 0}, low.graph.ranks).cycles for one in kernels)
            for kernels in (apart, rest)
        )

        def both(of: Callable[[Lowering, Sums], float]) -> tuple[float, float]:
            return of(low, fused) + after, sum(of(low, one) for one in parts) + before

        together, separate = both(estimate)
        if abs(together - separate) <= UNSURE * separate:
            together, separate = both(cycles)
        low.pays[key] = together <= separate
    return low.pays[key]


def appended(low: Lowering, node: Node, sums: Sums | None) -> bool:
    """Whether `node` (TensorScatter) can have the sums stored straight into a cache of one row."""
    into = low.known.get(node.inputs[0]) if node.inputs[0] is not None else None
    if not isinstance(into, Ref) or len(into.shape) != 4 or Fusion.APPEND not in low.fusions:
        return False
    return sums is not None and sums.gate is None and sums.heads == (into.shape[1], into.shape[3])


def quantized(low: Lowering, node: Node, scale: Ref, zero: Ref) -> Sums | None:
    """Sums that `node` (QuantizeKV) turns into codes for the cache that its reader writes; None where it cannot."""
    found = pending(low, node.inputs[0])
    reader = node.outputs[0].users()[0] if len(node.outputs[0].uses) == 1 else None
    if not found or not reader or reader.op != "TensorScatter" or not appended(low, reader, found):
        return None
    tables = [one.reshaped((-1,)) for one in (scale, zero)]
    if tables[0] is None or tables[1] is None:
        return None
    return replace(found, codes=(tables[0], tables[1]), view=replace(found.view, dtype="i8"), node=node)


def store(low: Lowering, sums: Sums, cache: Ref | None = None) -> Ref:
    """Call the kernel of a linear and what is fused into it: into a new tensor, or a cache [H, C, D] from `pos` on."""
    y = cache or low.out.temp(sums.view.dtype, (sums.x.shape[0], sums.w.shape[0]))
    operands = _operands(sums, y)
    key = "linear", sums.gate[:2] if sums.gate else None, sums.turn[2] if sums.turn else None, sums.ranks
    scalars = {"pos": ("pos", 0)} if sums.turn or cache else {}
    low.emit(key, lambda *params: _found(low, sums, params).kernel, operands, first=sums.node, **scalars)
    return y if cache else replace(sums.view, tensor=y.tensor)


def cycles(low: Lowering, sums: Sums) -> int:
    """What storing the sums into a new tensor takes, on an idle die."""
    return _found(low, sums, _params(sums)).cycles


def estimate(low: Lowering, sums: Sums) -> float:
    """What the closed form says of :func:`cycles`, which takes a tenth of the time of a search."""
    return estimate_linear(*_searched(low, sums, _params(sums)))


def _params(sums: Sums) -> list[Param]:
    """The parameters of a kernel that stores into a new tensor."""
    shape = sums.x.shape[0], sums.w.shape[0]
    return [one.param for one in _operands(sums, Ref("", sums.view.dtype, shape, row_major(shape)))]


def _found(low: Lowering, sums: Sums, params: Sequence[Param]) -> Found:
    """The fastest kernel for parameters that :func:`_operands` lists."""
    return search_linear(*_searched(low, sums, params))


def _searched(low: Lowering, sums: Sums, params: Sequence[Param]) -> Searched:
    """What is given to a search of tiles."""
    given, y = {one.name: one for one in params}, params[-1]
    gate = None
    if sums.gate:
        gate = Gate(sums.gate[0], given["U"], given.get("SU"), given.get("BU"), sums.gate[1])
    turn = Turn(given["COS"], given["SIN"], sums.turn[2]) if sums.turn else None
    codes = (given["SCALE"], given["ZERO"]) if sums.codes else None
    head = y.shape[2] if len(y.shape) == 3 else 0
    adds, append = (given.get("RES"), given.get("RS")), y.name == "CACHE"
    after = Epilogue(given.get("B"), gate, *adds, turn, codes, append, head, sums.ranks)
    return given["X"], given["W"], given.get("S"), y, low.target, after


def _operands(sums: Sums, y: Ref) -> list[Operand]:
    """Everything that the kernel touches, by the names of its parameters; `y` is a tensor [M, N] or a cache [H, C, D].

    Heads that are turned, or that lie apart in a cache, are a tile each: Y is [H, rows, D] then.
    """
    other = sums.gate[2] if sums.gate else None
    listed = [("X", sums.x), ("W", sums.w), ("U", other.w if other else None), ("S", sums.scale), ("B", sums.bias)]
    listed += [("RS", sums.factor), ("RES", sums.residual)]
    listed += [("SU", other.scale), ("BU", other.bias)] if other else []
    listed += [("COS", sums.turn[0]), ("SIN", sums.turn[1])] if sums.turn else []
    listed += [("SCALE", sums.codes[0]), ("ZERO", sums.codes[1])] if sums.codes else []
    cache, heads = len(y.shape) == 3, sums.heads
    if cache and y.shape[0] == 1 and not sums.turn:
        y = y.at(0)
    elif sums.turn and heads and not cache:
        shape = y.shape[0], *heads
        y = Ref(y.tensor, y.dtype, shape, row_major(shape)).transposed((1, 0, 2))
    written = Operand("CACHE", "inout", y) if cache else Operand("Y", "out", y)
    return [*(Operand(name, "in", ref) for name, ref in listed if ref), written]


def sums_of(low: Lowering, node: Node, weight: Ref, scale: Ref | None) -> Sums:
    """The sums of a linear node over the rows of its input, which a norm may still have to scale."""
    found = low.known.get(node.inputs[0]) if node.inputs[0] is not None else None
    normed = found if isinstance(found, Normed) else Normed(low.ref(node.inputs[0]), None)
    shape, factor = (*normed.source.shape[:-1], weight.shape[0]), normed.factor
    view, rows = Ref("", low.dtype(node), shape, row_major(shape)), low.rows(normed.source)
    return Sums(rows, weight, scale, view, node, factor=low.rows(factor) if factor else None)


def scales_rows(low: Lowering, node: Node) -> bool:
    """Whether `node` (an RMS norm) does no more than scale rows, for linears alone: they can do it."""
    y, weight = node.outputs[0], node.inputs[-1]
    plain = weight is not None and weight.const is not None and _uniform(weight.const) == 1
    if not plain or Fusion.ROW_SCALE not in low.fusions or low.graph.is_output(y) or not y.uses:
        return False
    return all(user.op in _LINEARS and position == 0 for user, position in y.uses)


def _uniform(expr: TensorExpr) -> float | None:
    """The number that all elements are, where no file is read to know it."""
    while isinstance(expr, Casted):
        expr = expr.base
    return expr.uniform if isinstance(expr, Literal) else None


def reshaped(sums: Sums, shape: tuple[int, ...]) -> Sums | None:
    """The sums seen in another shape; None where that takes a copy."""
    view = sums.view.reshaped(shape) if prod(sums.view.shape) else None
    return replace(sums, view=view) if view else None

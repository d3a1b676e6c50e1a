"""Checks of the types of tiles: transfers do not convert, the array sums in f32, only a quantization makes codes."""

from __future__ import annotations

from collections.abc import Iterator

from vacc_opt.backends.vacc.ops import PRIMITIVES
from vacc_opt.backends.vacc.schedule import Kernel, Op
from vacc_opt.backends.vacc.text import print_op

Problem = tuple[str, str]  # (kind, message)
_FLOATS = {"f32", "f16"}
_NUMBERS = {*_FLOATS, "i8"}


def type_problems(kernel: Kernel) -> Iterator[Problem]:
    """Operations of the text on types that their engine does not take.

    Unknown names and operations without their operands are left to other checks.
    """
    types = {one.name: one.dtype for one in kernel.params} | {one.name: one.dtype for one in kernel.buffers}
    for engine, op in kernel.operations():
        if _complete(op) and all(view.ref in types for view in (*op.outs, *op.ins)):
            message = _wrong(engine, op, [types[one.ref] for one in op.outs], [types[one.ref] for one in op.ins])
            if message:
                yield "dtype", f"`{print_op(op)}`: {message}"


def _complete(op: Op) -> bool:
    primitive = PRIMITIVES.get(op.kind)
    if primitive is None or len(op.outs) != primitive.outputs:
        return False
    fewest, most = primitive.inputs
    return fewest <= len(op.ins) <= most


def _wrong(engine: str, op: Op, outs: list[str], ins: list[str]) -> str | None:
    if op.kind == "gather" and ins[1:] != ["i64"] * (len(ins) - 1):
        return f"rows are chosen by {', '.join(ins[1:])}, not i64"
    if engine in {"dma_in", "dma_out", "link"}:
        return f"a transfer of {ins[0]} does not make {outs[0]}" if outs[0] != ins[0] else None
    if engine == "matrix":
        return f"the array sums in f32, not {outs[0]}" if outs[0] != "f32" else _operands(ins)
    wanted = {"i8"} if op.kind == "quantize" else _FLOATS
    if not wanted.issuperset(outs):
        return f"the result is {', '.join(outs)}, not {' or '.join(sorted(wanted))}"
    return _operands(ins)


def _operands(ins: list[str]) -> str | None:
    return None if _NUMBERS.issuperset(ins) else f"operands {', '.join(ins)}"

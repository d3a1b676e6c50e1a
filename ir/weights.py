"""What a constant is made of: the tensors of weight files behind it, and the formula over them, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import PurePath

from vacc_opt.ir.infer import shape_text
from vacc_opt.ir.provenance import Origin
from vacc_opt.ir.tensor import (
    Casted,
    Concatenated,
    Gguf,
    Literal,
    Padded,
    Sliced,
    Source,
    Taken,
    TensorExpr,
    Transposed,
)
from vacc_opt.ir.types import DType

_RUNS_SHOWN = 4  # runs of rows in a formula; a rotary un-permutation has thousands


def stored_parts(expr: TensorExpr) -> tuple[Source | Gguf, ...]:
    """The tensors of files that ``expr`` reads, each once."""
    return tuple(dict.fromkeys(_stored(expr)))


def _stored(expr: TensorExpr) -> Iterator[Source | Gguf]:
    if isinstance(expr, Source | Gguf):
        yield expr
    for part in operands(expr):
        yield from _stored(part)


def operands(expr: TensorExpr) -> Iterator[TensorExpr]:
    """The expressions that ``expr`` is made from."""
    for one in fields(expr):  # type: ignore[arg-type]
        value = getattr(expr, one.name)
        yield from (part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, TensorExpr))


_WIDER = {
    DType.FLOAT16: (DType.FLOAT, DType.DOUBLE),
    DType.BFLOAT16: (DType.FLOAT, DType.DOUBLE),
    DType.FLOAT: (DType.DOUBLE,),
}


def without_round_trips(expr: TensorExpr) -> TensorExpr:
    """The same values without casts to a wider type and back, however rows were picked between them.

    The bits are the same too, but for those by which one NaN differs from another.

    >>> half = Source("m.safetensors", 0, "float16", (8, 4), "w")
    >>> formula(without_round_trips(Casted(Sliced(Casted(half, "float"), (0, 0), (2, 4)), "float16")))
    'w[0:2]'
    """
    if isinstance(expr, Casted):
        inner = _narrow(expr.base, expr.dtype)
        if inner is not None:
            return without_round_trips(inner)
    changed: dict[str, TensorExpr | tuple[TensorExpr, ...]] = {}
    for one in fields(expr):  # type: ignore[arg-type]
        value = getattr(expr, one.name)
        if isinstance(value, TensorExpr):
            changed[one.name] = without_round_trips(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], TensorExpr):
            changed[one.name] = tuple(map(without_round_trips, value))
    return replace(expr, **changed) if changed else expr  # type: ignore[type-var]


def _narrow(expr: TensorExpr, to: DType) -> TensorExpr | None:
    """The values of ``expr`` as they were before a cast made them wider than ``to``; None if nothing did."""
    match expr:
        case Casted(base, _):
            return base if base.dtype is to and expr.dtype in _WIDER.get(to, ()) else None
        case Sliced(base) | Taken(base) | Transposed(base) | Padded(base):
            inner = _narrow(base, to)
            return None if inner is None else replace(expr, base=inner)
        case Concatenated(parts):
            found = [one for one in (_narrow(part, to) for part in parts) if one is not None]
            return replace(expr, parts=tuple(found)) if len(found) == len(parts) else None
    return None


def weight_origins(name: str, expr: TensorExpr) -> tuple[Origin, ...]:
    """Where the constant ``name`` comes from: (name, ``file:tensor``, stored type) for each tensor that it reads."""
    found = [
        Origin(name, f"{PurePath(one.file).name}:{one.name or one.offset}", f"{_type(one)}{shape_text(one.dims)}")
        for one in stored_parts(expr)
    ]
    return tuple(found) or (Origin(name, "", f"{expr.dtype.value}{shape_text(expr.shape)}"),)


def _type(one: Source | Gguf) -> str:
    return one.quantization if isinstance(one, Gguf) else one.stored


def formula(expr: TensorExpr) -> str:
    """The expression in the notation of numpy, over the names that tensors have in their files.

    >>> from vacc_opt.ir.tensor import Codes
    >>> formula(Sliced(Codes(Source("m.safetensors", 0, "float", (8, 4), "fc.weight")), (0, 0), (2, 4)))
    'codes(fc.weight)[0:2]'
    """
    match expr:
        case Source() | Gguf():
            return expr.name or f"{PurePath(expr.file).name}@{expr.offset}"
        case Literal():
            return f"{expr.dtype.value}{shape_text(expr.shape)}"
        case Sliced():
            return f"{formula(expr.base)}[{_box(expr)}]"
        case Taken():
            return f"{formula(expr.base)}[{_runs(expr.rows)}]"
        case Transposed():
            flip = expr.perm == (1, 0)
            return f"{formula(expr.base)}.T" if flip else f"transpose({formula(expr.base)}, {list(expr.perm)})"
        case Concatenated():
            return f"concat({', '.join(map(formula, expr.parts))}, axis={expr.axis})"
        case Padded():
            return f"pad({formula(expr.base)}, {list(expr.dims)})"
        case Casted():
            return f"{expr.to}({formula(expr.base)})"
    return f"{type(expr).__name__.lower()}({', '.join(map(formula, operands(expr)))})"


def _box(expr: Sliced) -> str:
    sizes = zip(expr.starts, expr.stops, expr.base.shape, strict=True)
    spans = [":" if (a, b) == (0, size) else f"{a}:{b}" for a, b, size in sizes]
    while len(spans) > 1 and spans[-1] == ":":
        spans.pop()
    return ", ".join(spans)


def _runs(rows: Sequence[int]) -> str:
    """Rows as runs ``a:b``, with ``n zeros`` for padding."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        start, count = runs[-1] if runs else (row, 0)
        if runs and (row == start + count if start >= 0 else row < 0):
            runs[-1] = start, count + 1
        else:
            runs.append((row, 1))
    shown = [f"{start}:{start + count}" if start >= 0 else f"{count} zeros" for start, count in runs]
    if len(shown) > _RUNS_SHOWN:
        return f"{len(rows)} rows reordered"
    return ", ".join(shown)

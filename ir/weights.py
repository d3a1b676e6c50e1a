"""What a constant is made of: the tensors of weight files behind it, and the formula over them, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
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

_RUNS_SHOWN = 4  # runs of rows in a formula; a rotary un-permutation has thousands


def stored_parts(expr: TensorExpr) -> tuple[Source | Gguf, ...]:
    """The tensors of files that ``expr`` reads, each once."""
    return tuple(dict.fromkeys(_stored(expr)))


def _stored(expr: TensorExpr) -> Iterator[Source | Gguf]:
    if isinstance(expr, Source | Gguf):
        yield expr
    for part in _operands(expr):
        yield from _stored(part)


def _operands(expr: TensorExpr) -> Iterator[TensorExpr]:
    for one in fields(expr):  # type: ignore[arg-type]
        value = getattr(expr, one.name)
        yield from (part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, TensorExpr))


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
    return f"{type(expr).__name__.lower()}({', '.join(map(formula, _operands(expr)))})"


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

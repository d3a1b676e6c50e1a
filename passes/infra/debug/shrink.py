"""The same small graph with smaller shapes, and without weight files: what makes a reduced graph a test case."""

from __future__ import annotations

import numpy as np

from vacc_opt.ir import Graph, Literal, PerRank, TensorExpr, TensorType
from vacc_opt.ir.copy import copy
from vacc_opt.ir.errors import VaccError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.seeded import Seeded, stand_in, with_leaves
from vacc_opt.ir.tensor import Sliced
from vacc_opt.ir.weights import stored_parts

SMALLEST = 4


def sizes(graph: Graph) -> list[int]:
    """The numbers in shapes of inputs and weights that could be smaller, largest first."""
    shapes = [v.shape or () for v in graph.inputs] + [v.shape or () for v in graph.constants() if v.type.dtype.is_float]
    return sorted({d for shape in shapes for d in shape if isinstance(d, int) and d > SMALLEST}, reverse=True)


def resized(graph: Graph, old: int, new: int) -> Graph | None:
    """``graph`` with ``new`` for every size ``old``, also in the numbers of small integer constants, or None."""
    result = copy(graph)
    rw = Rewriter(result)
    try:
        for value in result.inputs:
            if value.shape is not None:
                dims = tuple(new if d == old else d for d in value.shape)
                rw.set_type(value, TensorType(value.type.dtype, dims))
        for value in result.constants():
            assert value.const is not None
            rw.set_const(value, _smaller(value.const, old, new))
        rw.infer_again()
    except (VaccError, ValueError):
        return None
    return result


def _smaller(expr: TensorExpr, old: int, new: int) -> TensorExpr:
    if isinstance(expr, PerRank):
        return PerRank(tuple(_smaller(part, old, new) for part in expr.parts))
    dims = tuple(new if d == old else d for d in expr.shape)
    if isinstance(expr, Literal):
        array = expr.array[tuple(slice(d) for d in dims)]
        return Literal(np.where(array == old, np.array(new, array.dtype), array) if array.dtype.kind == "i" else array)
    if dims == expr.shape:
        return expr
    if isinstance(expr, Seeded):
        return Seeded(expr.seed, expr.stored, dims)
    return Sliced(expr, tuple(0 for _ in dims), dims)


def without_files(graph: Graph) -> Graph | None:
    """``graph`` with seeded numbers for all that is read from files; None where nothing is."""
    if not any(stored_parts(v.const) for v in graph.constants() if v.const is not None):
        return None
    result = copy(graph)
    for value in result.constants():
        assert value.const is not None
        value.const = with_leaves(value.const, stand_in)
    return result

"""Rows and columns of a weight expression, rank by rank."""

from __future__ import annotations

from collections.abc import Sequence

from vacc_opt.ir import PerRank, TensorExpr
from vacc_opt.ir.tensor import Sliced, Taken, Transposed, transposed

Rows = tuple[int, ...]


def take_rows(expr: TensorExpr, rows: Rows) -> TensorExpr:
    """Those rows in order; a negative row is zeros. A contiguous run stays a plain slice of the file."""
    if rows == tuple(range(rows[0], rows[0] + len(rows))) and rows[0] >= 0:
        if len(rows) == expr.shape[0]:
            return expr
        rest = expr.shape[1:]
        return Sliced(expr, (rows[0], *(0 for _ in rest)), (rows[-1] + 1, *rest))
    return Taken(expr, rows)


def take_columns(expr: TensorExpr, columns: Rows) -> TensorExpr:
    """Those columns of a matrix, in order; a negative column is zeros."""
    if columns == tuple(range(columns[0], columns[0] + len(columns))) and columns[0] >= 0:
        if len(columns) == expr.shape[1]:
            return expr
        return Sliced(expr, (0, columns[0]), (expr.shape[0], columns[-1] + 1))
    return Transposed(Taken(transposed(expr, (1, 0)), columns), (1, 0))


def rows_per_rank(expr: TensorExpr, rows: Sequence[Rows]) -> PerRank:
    """Column-parallel: each rank computes some of the outputs."""
    return PerRank(tuple(take_rows(expr, r) for r in rows))


def columns_per_rank(expr: TensorExpr, columns: Sequence[Rows]) -> PerRank:
    """Row-parallel: each rank sums over some of the inputs."""
    return PerRank(tuple(take_columns(expr, c) for c in columns))


def even_shares(size: int, tp: int, multiple: int = 1) -> tuple[Rows, ...]:
    """``size`` rows in ``tp`` equal runs, each a multiple of ``multiple``, padded at the end.

    >>> even_shares(5, 2)
    ((0, 1, 2), (3, 4, -1))
    """
    share = -(-size // (tp * multiple)) * multiple
    return tuple(tuple(i if i < size else -1 for i in range(r * share, (r + 1) * share)) for r in range(tp))

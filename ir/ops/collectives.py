"""AllReduce, ReduceScatter and AllGather: exchanges between tensor-parallel ranks, summed or joined in rank order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

from vacc_opt.ir.infer import Context, Result
from vacc_opt.ir.ops.base import Array, OpDef, define
from vacc_opt.ir.types import TensorType


def _all_reduce(ctx: Context) -> Result:
    return Result(ctx.type(0))


def _all_gather(ctx: Context) -> Result:
    shape = ctx.shape(0)
    if shape is None:
        return Result(ctx.type(0))
    axis, ranks = int(ctx.attributes["axis"]) % len(shape), int(ctx.attributes["ranks"])
    return Result(TensorType(ctx.dtype(0), (*shape[:axis], shape[axis] * ranks, *shape[axis + 1 :])))


def _reduce_scatter(ctx: Context) -> Result:
    shape = ctx.shape(0)
    if shape is None:
        return Result(ctx.type(0))
    axis, ranks = int(ctx.attributes["axis"]) % len(shape), int(ctx.attributes["ranks"])
    size = shape[axis]
    if not isinstance(size, int) or size % ranks:
        raise ctx.error(f"axis {axis} of {ctx.type(0)} is not in {ranks} equal parts")
    return Result(TensorType(ctx.dtype(0), (*shape[:axis], size // ranks, *shape[axis + 1 :])))


def _sum(parts: Sequence[Array], attributes: Mapping[str, Any]) -> list[Array]:
    return [reduce(np.add, parts)] * len(parts)


def _parts_of_sum(parts: Sequence[Array], attributes: Mapping[str, Any]) -> list[Array]:
    return np.split(reduce(np.add, parts), len(parts), axis=int(attributes["axis"]))


def _join(parts: Sequence[Array], attributes: Mapping[str, Any]) -> list[Array]:
    return [np.concatenate(parts, axis=int(attributes["axis"]))] * len(parts)


ALL_REDUCE = define(
    OpDef(
        name="AllReduce",
        doc="y = sum of x over the ranks, added in rank order; every rank gets it.",
        inputs=("x",),
        outputs=("y",),
        attributes=(("ranks", "number of ranks"),),
        infer=_all_reduce,
        combine=_sum,
    )
)

REDUCE_SCATTER = define(
    OpDef(
        name="ReduceScatter",
        doc="y = part r, along `axis`, of the sum of x over the ranks, added in rank order, for rank r.",
        inputs=("x",),
        outputs=("y",),
        attributes=(("ranks", "number of ranks"), ("axis", "axis along which the sum is cut into equal parts")),
        infer=_reduce_scatter,
        combine=_parts_of_sum,
    )
)

ALL_GATHER = define(
    OpDef(
        name="AllGather",
        doc="y = the x of all ranks joined along `axis` in rank order; every rank gets it.",
        inputs=("x",),
        outputs=("y",),
        attributes=(("ranks", "number of ranks"), ("axis", "axis along which the parts are joined")),
        infer=_all_gather,
        combine=_join,
    )
)

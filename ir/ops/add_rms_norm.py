"""AddRMSNormalization: the residual stream grows by a block's output and is normalized for the next block."""

from __future__ import annotations

from vacc_opt.ir.infer import Context, Result
from vacc_opt.ir.ops.base import OpDef, define


def _infer(ctx: Context) -> list[Result]:
    x, residual, weight = ctx.type(0), ctx.type(1), ctx.type(2)
    if x != residual:
        raise ctx.error(f"x {x} and residual {residual} differ")
    if x.shape is not None and weight.shape is not None and weight.shape != x.shape[-1:]:
        raise ctx.error(f"weight {weight} does not fit the channels of x {x}")
    return [Result(x), Result(x)]


ADD_RMS_NORM = define(
    OpDef(
        name="AddRMSNormalization",
        doc="sum = x + residual; y = RMSNormalization(sum, weight) over the last axis (Zhang & Sennrich 2019, eq. 4). "
        "The sum is rounded to its type before it is normalized, as two operators would.",
        inputs=("x", "residual", "weight"),
        outputs=("y", "sum"),
        attributes=(("epsilon", "added to the mean of squares; 1e-5 when left out"),),
        infer=_infer,
        body="""
            sum = Add (x, residual)
            y = RMSNormalization <axis = -1, epsilon : float = @epsilon> (sum, weight)""",
    )
)

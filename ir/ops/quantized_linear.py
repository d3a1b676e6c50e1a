"""QuantizedLinearPerChannel: a linear layer with int8 weights and one scale an output channel (W8A16)."""

from __future__ import annotations

from vacc_opt.ir.infer import Context, Result, shape_text
from vacc_opt.ir.ops.base import OpDef, define
from vacc_opt.ir.types import DType, TensorType


def _infer(ctx: Context) -> Result:
    x, weight, scale = ctx.shape(0), ctx.shape(1), ctx.shape(2)
    if ctx.dtype(1) is not DType.INT8:
        raise ctx.error(f"qweight has type {ctx.type(1)}, int8[N,K] is expected")
    if x is None or weight is None or scale is None:
        return Result(TensorType(ctx.dtype(0)))
    if ctx.dtype(2) is not DType.FLOAT:
        raise ctx.error(f"scale has type {ctx.type(2)}, float[N] is expected")
    another_k = isinstance(x[-1], int) and x[-1] != weight[-1]
    if len(weight) != 2 or another_k or scale != (weight[0],):
        raise ctx.error(f"x {shape_text(x)}, qweight {shape_text(weight)} and scale {shape_text(scale)} do not fit")
    return Result(TensorType(ctx.dtype(0), (*x[:-1], weight[0])))


QUANTIZED_LINEAR = define(
    OpDef(
        name="QuantizedLinearPerChannel",
        doc="y[..., n] = cast((sum_k x[..., k] * qweight[n, k]) * scale[n]), product and scaling in fp32; "
        "x [..., K], qweight int8 [N, K], scale fp32 [N].",
        inputs=("x", "qweight", "scale"),
        outputs=("y",),
        infer=_infer,
        # fp32 before the scale: an fp16 product overflows on real activations
        body="""
            wide = Cast <to = 1> (x)
            codes = Cast <to = 1> (qweight)
            matrix = Transpose <perm = [1, 0]> (codes)
            product = MatMul (wide, matrix)
            scaled = Mul (product, scale)
            y = CastLike (scaled, x)""",
    )
)

"""QuantizeKV and DequantizeKV: static int8 of the KV cache, one (scale, zero) a KV head and channel."""

from __future__ import annotations

from vacc_opt.ir.infer import Context, Result, shape_text
from vacc_opt.ir.ops.base import OpDef, define
from vacc_opt.ir.types import DType, TensorType


def _check(ctx: Context) -> None:
    x, scale, zero = ctx.shape(0), ctx.shape(1), ctx.shape(2)
    if {ctx.dtype(1), ctx.dtype(2)} != {DType.FLOAT}:
        raise ctx.error(f"scale and zero have types {ctx.type(1)} and {ctx.type(2)}, float[H,D] is expected")
    if x is None or scale is None or zero is None:
        return
    if len(x) != 4 or scale != zero or scale != (x[1], x[3]):
        raise ctx.error(f"x {shape_text(x)}, scale {shape_text(scale)} and zero {shape_text(zero)} do not fit")


def _quantize(ctx: Context) -> Result:
    _check(ctx)
    return Result(TensorType(DType.INT8, ctx.shape(0)))


def _dequantize(ctx: Context) -> Result:
    _check(ctx)
    if ctx.dtype(0) is not DType.INT8:
        raise ctx.error(f"x has type {ctx.type(0)}, int8 is expected")
    to = DType.from_onnx(int(ctx.attributes.get("to", DType.FLOAT.onnx)))
    return Result(TensorType(to, ctx.shape(0)))


QUANTIZE_KV = define(
    OpDef(
        name="QuantizeKV",
        doc="q = clip(rint((x - zero) / scale), -127, 127) in fp32; x [B, H, S, D], scale and zero fp32 [H, D], zero a "
        "float offset.",
        inputs=("x", "scale", "zero"),
        outputs=("q",),
        infer=_quantize,
        body="""
            one = Constant <value_ints = [1]> ()
            low = Constant <value_float = -127.0> ()
            high = Constant <value_float = 127.0> ()
            steps = Unsqueeze (scale, one)
            offset = Unsqueeze (zero, one)
            wide = Cast <to = 1> (x)
            shifted = Sub (wide, offset)
            ratio = Div (shifted, steps)
            rounded = Round (ratio)
            clipped = Clip (rounded, low, high)
            q = Cast <to = 3> (clipped)""",
    )
)

DEQUANTIZE_KV = define(
    OpDef(
        name="DequantizeKV",
        doc="x = q * scale + zero in fp32, cast to `to`; q int8 [B, H, S, D], scale and zero fp32 [H, D].",
        inputs=("q", "scale", "zero"),
        outputs=("x",),
        attributes=(("to", "element type of x, as TensorProto.DataType"),),
        infer=_dequantize,
        body="""
            one = Constant <value_ints = [1]> ()
            steps = Unsqueeze (scale, one)
            offset = Unsqueeze (zero, one)
            wide = Cast <to = 1> (q)
            scaled = Mul (wide, steps)
            shifted = Add (scaled, offset)
            x = Cast <to : int = @to> (shifted)""",
    )
)

"""SwiGLU: the gated activation ``silu(gate) * up`` of Llama-like feed-forward blocks."""

from __future__ import annotations

from vacc_opt.ir.infer import Context, Result
from vacc_opt.ir.ops.base import OpDef, define


def _infer(ctx: Context) -> Result:
    if ctx.type(0) != ctx.type(1):
        raise ctx.error(f"gate {ctx.type(0)} and up {ctx.type(1)} differ")
    return Result(ctx.type(0))


SWIGLU = define(
    OpDef(
        name="SwiGLU",
        doc="y = gate * sigmoid(gate) * up, elementwise (Shazeer 2020, GLU Variants Improve Transformer).",
        inputs=("gate", "up"),
        outputs=("y",),
        infer=_infer,
        body="""
            gated = Sigmoid (gate)
            silu = Mul (gate, gated)
            y = Mul (silu, up)""",
    )
)

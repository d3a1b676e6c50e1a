"""GeGLU: the gated activation ``gelu(gate) * up`` of Gemma's feed-forward blocks."""

from __future__ import annotations

from vacc_opt.ir.infer import Context, Result
from vacc_opt.ir.ops.base import OpDef, define

APPROXIMATE = ("none", "tanh")


def _infer(ctx: Context) -> Result:
    if ctx.type(0) != ctx.type(1):
        raise ctx.error(f"gate {ctx.type(0)} and up {ctx.type(1)} differ")
    form = ctx.attributes.get("approximate", "none")
    if form not in APPROXIMATE:
        raise ctx.error(f"approximate is {form!r}, not one of {', '.join(APPROXIMATE)}")
    return Result(ctx.type(0))


GEGLU = define(
    OpDef(
        name="GeGLU",
        doc="y = gelu(gate) * up, elementwise, gelu in fp32 (Shazeer 2020, GLU Variants Improve Transformer; the two "
        "forms of gelu as in ONNX Gelu-20).",
        inputs=("gate", "up"),
        outputs=("y",),
        attributes=(("approximate", "none: x * Phi(x) by erf; tanh: its tanh approximation; none when left out"),),
        infer=_infer,
        body="""
            wide = Cast <to = 1> (gate)
            gelu = Gelu <approximate : string = @approximate> (wide)
            factor = CastLike (gelu, up)
            y = Mul (factor, up)""",
    )
)

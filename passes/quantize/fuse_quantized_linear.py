"""(x @ float(codes)) * scale  ->  Vastai::QuantizedLinearPerChannel(x, codes, scale)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vacc_opt.ir import DType, Node, TensorExpr, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.tensor import ROWS_PER_TILE, Casted, transposed
from vacc_opt.passes.infra.base import Kind
from vacc_opt.passes.infra.patterns.match import Match, Reason
from vacc_opt.passes.infra.patterns.pattern import Pattern, op
from vacc_opt.passes.infra.patterns.pattern_pass import Capture, Const, PatternPass
from vacc_opt.passes.infra.registry import register

LIMIT = 127


@register
@dataclass(frozen=True)
class FuseQuantizedLinear(PatternPass):
    """Recognize a linear layer that is int8 already, as ``torch.onnx.export(dynamo=True)`` writes it.

    The exporter may have folded the codes to floats: a weight is taken for codes when all of it is whole numbers from
    -127 to 127, which reads it once. Codes and scales stay as they are.

    Before:
        g (float[B,8] x) => (float[B,3] y) {
            wide = Cast <to = 1> (codes)
            rows = Transpose <perm = [1, 0]> (wide)
            product = MatMul (x, rows)
            y = Mul (product, scale)
        }
        # const "codes" = Seeded('codes', 'int8', (3, 8))
        # const "scale" = Seeded('scale', 'float', (3,))
    After:
        g (float[B,8] x) => (float[B,3] y) {
            y = Vastai.QuantizedLinearPerChannel (x, codes, scale)
        }
        # const "codes" = Seeded('codes', 'int8', (3, 8))
        # const "scale" = Seeded('scale', 'float', (3,))
    """

    name: ClassVar[str] = "fuse-quantized-linear"
    kind: ClassVar[Kind] = Kind.REASSOCIATING
    noun: ClassVar[str] = "int8 linear"

    def pattern(self, x: Capture, w: Const, q: Const, scale: Const) -> Pattern:
        """The product by a weight or by the cast of codes; then the casts of a half precision model around it."""
        rows = op.Transpose(op.Cast(q), perm=[1, 0])
        narrow = op.Cast(op.Vastai__QuantizedLinearPerChannel(op.Cast(x), q, scale)).named("narrow")
        return op.MatMul(x, rows) * scale | op.MatMul(x, w) * scale | narrow

    def check(self, m: Match) -> Iterator[Reason]:
        """Decline scales that are not one a channel, and weights that are no codes."""
        if m.get("narrow") is not None:
            if m.x.type.dtype is not m.root.output.type.dtype:
                yield m.reason("x is {x}, the result {y}", x=m.x.type, y=m.root.output.type)
            return
        weight = m.get("q") or m.w
        rows = 0 if m.get("q") is not None else 1
        if weight.rank != 2 or m.scale.shape != (weight.shape[rows],) or m.x.type.dtype is not DType.FLOAT:
            yield m.reason("x is {x}, the weight {w}, the scale {s}", x=m.x.type, w=weight.type, s=m.scale.type)
        elif m.scale.type.dtype is not DType.FLOAT:
            yield m.reason("the scale is {s}, float is expected", s=m.scale.type)
        elif m.get("q") is not None and weight.type.dtype is not DType.INT8:
            yield m.reason("the codes are {w}, int8 is expected", w=weight.type)
        elif m.get("q") is None and not _whole(weight.const):
            yield m.reason("{w} holds other numbers than whole ones from -127 to 127", w=weight)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        """The operator on the same codes and scales."""
        if m.get("narrow") is not None or m.get("q") is not None:
            return rw.vastai.QuantizedLinearPerChannel(m.x, m.q, m.scale)
        stem = m.w.name.removesuffix(".weight")
        codes = Casted(transposed(m.w.const, (1, 0)), DType.INT8.value)
        return rw.vastai.QuantizedLinearPerChannel(m.x, rw.const(codes, f"{stem}.qweight", of=m.w.provenance), m.scale)

    def done(self, node: Node) -> bool:
        """Nothing is left over: a Mul by a vector is something else as a rule."""
        return True


def _whole(expr: TensorExpr) -> bool:
    for low in range(0, expr.shape[0], ROWS_PER_TILE):
        tile = expr.read((slice(low, min(low + ROWS_PER_TILE, expr.shape[0])),))
        if not ((tile == np.rint(tile)) & (np.abs(tile) <= LIMIT)).all():
            return False
    return True

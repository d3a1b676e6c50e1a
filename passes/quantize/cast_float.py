"""Float values and weights  ->  another float type, fp16 as a rule; scales of quantization stay fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vacc_opt.ir import DType, Graph, PerRank, TensorExpr, TensorType, Value
from vacc_opt.ir.errors import CheckError, UserError, did_you_mean
from vacc_opt.ir.functions import called_functions
from vacc_opt.ir.infer import InferenceError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.schema import schema_problem
from vacc_opt.ir.tensor import Casted
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, option, where
from vacc_opt.passes.infra.check.adapters import Adapter, Casts
from vacc_opt.passes.infra.registry import register
from vacc_opt.passes.quantize.fp32_islands import drawn_islands, own_constants

TYPES = {"float16": DType.FLOAT16, "bfloat16": DType.BFLOAT16, "float": DType.FLOAT}
# operands that the operators define as fp32: W8A16 scales, KV scales and zeros
FP32_OPERANDS: dict[str, tuple[int, ...]] = {
    "Vastai::QuantizedLinearPerChannel": (2,),
    "Vastai::QuantizeKV": (1, 2),
    "Vastai::DequantizeKV": (1, 2),
}


@register
@dataclass(frozen=True)
class CastFloat(Pass):
    """Run the model in another float type: weights, activations, float KV buffers and logits.

    Weights are cast as they are written, by rounding to nearest even. Put it after w8a16, whose codes come from the
    unrounded weights. What `guard-fp16-range` put between casts of float to float stays float, with its weights.

    Before:
        g (float[B,3] x) => (float[B,3] y) {
            y = Mul (x, w)
        }
        # const "w" = Seeded('w', 'float', (3,))
    After:
        g (float16[B,3] x) => (float16[B,3] y) {
            y = Mul (x, w)
        }
        # const "w" = Casted(Seeded('w', 'float', (3,)), 'float16')
    """

    name: ClassVar[str] = "cast-float"
    kind: ClassVar[Kind] = Kind.LOSSY
    runs_after: ClassVar[tuple[str, ...]] = ("w8a16", "kv8")

    to: str = option("float16", "float16, float, or bfloat16 (for which onnxruntime has no CPU kernels)")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Retype constants and inputs, then infer again; raises CheckError when an operator refuses the type."""
        if self.to not in TYPES:
            raise UserError(f"cannot cast to {self.to!r}", did_you_mean(self.to, TYPES))
        to = TYPES[self.to]
        if to is DType.FLOAT:
            return Outcome("float is what the model runs in")
        for name in called_functions(graph):
            raise CheckError(f"the body of {name} stays in float", "run inline-functions before cast-float")
        drawn = drawn_islands(graph)
        with rw.applying():
            kept = self._fp32(graph) | set(own_constants(graph, rw, drawn))
            weights = 0
            for value in graph.constants():
                if value.const is not None and value.type.dtype is DType.FLOAT and value not in kept:
                    rw.set_const(value, _cast(value.const, to))
                    weights += 1
            for value in graph.inputs:
                if value.type.dtype is DType.FLOAT:
                    rw.set_type(value, TensorType(to, value.shape))
            for node in graph.by_op("DequantizeKV", "Vastai"):
                if node.attributes.get("to", DType.FLOAT.onnx) == DType.FLOAT.onnx:
                    rw.set_attribute(node, "to", to.onnx)
            for node in graph.by_op("ConstantOfShape"):
                fill = np.asarray(node.attributes.get("value", np.zeros(1, np.float32)))
                if fill.dtype == np.float32:
                    rw.set_attribute(node, "value", fill.astype(to.numpy))
            inside = set(graph.by_op("Cast")) - {*drawn.entries, *drawn.exits}
            if any(n.attributes.get("to") == DType.FLOAT.onnx for n in inside):
                raise CheckError("the graph casts to float inside; put cast-float after the recognizers")
            for node in drawn.exits:
                rw.set_attribute(node, "to", to.onnx)
            try:
                rw.infer_again()
            except InferenceError as error:
                raise CheckError(f"an operator refuses {self.to}: {error.message}") from error
            for node in graph.nodes():
                problem = schema_problem(node, len(node.outputs), graph.opset)
                if problem is not None:
                    raise CheckError(f"an operator refuses {self.to}: {where(node)}: {problem[0]}", problem[1])
        kind = f"activations but those of {len(drawn.nodes)} nodes" if drawn.nodes else "all activations"
        return Outcome(f"{weights} weights and {kind} {self.to}")

    def adapter(self, before: Graph) -> Adapter:
        """Inputs are rounded as weights are."""
        return Casts(DType.FLOAT, TYPES.get(self.to, DType.FLOAT))

    def _fp32(self, graph: Graph) -> set[Value]:
        kept: set[Value] = set()
        for node in graph.nodes():
            kept.update(v for i in FP32_OPERANDS.get(node.op, ()) if (v := node.inputs[i]) is not None)
        return kept


def _cast(expr: TensorExpr, to: DType) -> TensorExpr:
    if isinstance(expr, PerRank):
        return PerRank(tuple(_cast(part, to) for part in expr.parts))
    return Casted(expr, to.value)

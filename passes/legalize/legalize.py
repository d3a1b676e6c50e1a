"""The last pass: opset 24, canonical weights, and only operators that the backend has kernels for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Graph
from vacc_opt.ir.errors import CheckError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.tensor import Transposed
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option, where
from vacc_opt.passes.infra.model.linear import as_linear
from vacc_opt.passes.infra.registry import register
from vacc_opt.passes.simplify.eliminate_common_subexpressions import EliminateCommonSubexpressions
from vacc_opt.passes.simplify.eliminate_dead_code import EliminateDeadCode
from vacc_opt.passes.simplify.simplify import Simplify

OPSET = 24
SUPPORTED = frozenset(
    [
        "Add",
        "Attention",
        "Cast",
        "Concat",
        "Div",
        "Gather",
        "GatherND",
        "Gelu",
        "LayerNormalization",
        "MatMul",
        "Mul",
        "RMSNormalization",
        "Range",
        "Reshape",
        "RotaryEmbedding",
        "Shape",
        "Slice",
        "Squeeze",
        "Sub",
        "Tanh",
        "TensorScatter",
        "Transpose",
        "Unsqueeze",
        "Vastai::AddRMSNormalization",
        "Vastai::AllGather",
        "Vastai::AllReduce",
        "Vastai::Attention",
        "Vastai::DequantizeKV",
        "Vastai::EmbeddingShard",
        "Vastai::GeGLU",
        "Vastai::QuantizeKV",
        "Vastai::QuantizedLinearPerChannel",
        "Vastai::ReduceScatter",
        "Vastai::SwiGLU",
    ]
)


@register
@dataclass(frozen=True)
class Legalize(Pass):
    """Raise the graph to opset 24, store weights as [N, K], and check that every operator has a kernel.

    A weight that several layers read is turned, and stored, once.

    Before:
        g (float[B,3] x) => (float[B,8] y) {
            y = MatMul (x, w)
        }
        # const "w" = Seeded('w', 'float', (3, 8))
    After:
        g (float[B,3] x) => (float[B,8] y) {
            t = Transpose <perm = [1, 0]> (rows)
            y = MatMul (x, t)
        }
        # const "rows" = Transposed(Seeded('w', 'float', (3, 8)), (1, 0))
    """

    name: ClassVar[str] = "legalize"
    kind: ClassVar[Kind] = Kind.EXACT

    strict: bool = option(True, "fail on an operator without a kernel; false: only remark on it")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Raises CheckError that names the first operators without a kernel and where they come from."""
        rw.raise_opset(OPSET)
        Simplify().run(graph, rw)
        flipped = self._canonical_weights(graph, rw)
        # what was turned may now be equal, or unread
        for tidy in (EliminateCommonSubexpressions(), EliminateDeadCode()):
            tidy.run(graph, rw)
        foreign = [n for n in graph.nodes() if n.op not in SUPPORTED]
        remarks = [Remark("missed", self.name, f"no kernel for {n.op}", where(n)) for n in foreign]
        if foreign and self.strict:
            kinds = ", ".join(sorted({n.op for n in foreign}))
            raise CheckError(f"no kernel for {kinds}", f"first: {where(foreign[0])}; legalize{{strict=false}} goes on")
        return Outcome(f"opset {graph.opset}, {len(graph)} nodes, {flipped} weights turned to [N,K]", remarks)

    def _canonical_weights(self, graph: Graph, rw: Rewriter) -> int:
        flipped = 0
        for node in graph.by_op("MatMul") + graph.by_op("Gemm"):
            linear = as_linear(node)
            if linear is None or (node.op == "MatMul" and linear.rows is linear.weight.const):
                continue
            with rw.applying([node]):
                stored = linear.weight.name if not isinstance(linear.rows, Transposed) else f"{linear.weight.name}.rows"
                weight = rw.const(linear.rows, stored, of=linear.weight.provenance)
                rw.replace(node.output, rw.op.MatMul(linear.x, rw.op.Transpose(weight, perm=(1, 0))))
            flipped += 1
        return flipped

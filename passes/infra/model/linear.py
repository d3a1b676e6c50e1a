"""Linear layers in all their forms: MatMul with a weight or its transpose, Gemm, and the quantized operator."""

from __future__ import annotations

from dataclasses import dataclass

from vacc_opt.ir import Graph, Node, PerRank, TensorExpr, Value
from vacc_opt.ir.tensor import transposed
from vacc_opt.passes.infra.analysis import Analysis


@dataclass(frozen=True)
class Linear:
    """``y = x @ weight^T``; ``weight`` is the constant as it stands, ``rows`` its canonical [N, K] expression."""

    node: Node
    x: Value
    weight: Value
    rows: TensorExpr
    scale: Value | None = None

    @property
    def out_features(self) -> int:
        """N."""
        return self.rows.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.rows.shape[1]


def as_linear(node: Node) -> Linear | None:
    """The linear layer that a node is, or None."""
    if node.op == "Vastai::QuantizedLinearPerChannel":
        x, weight, scale = node.inputs
        if x is None or weight is None or weight.const is None:
            return None
        return Linear(node, x, weight, weight.const, scale)
    if node.op == "Gemm":
        return _gemm(node)
    if node.op != "MatMul":
        return None
    x, matrix = node.inputs
    if x is None or matrix is None or matrix.rank != 2:
        return None
    if matrix.const is not None:
        return Linear(node, x, matrix, flipped(matrix.const))
    producer = matrix.producer
    if producer is not None and producer.op == "Transpose" and producer.attributes.get("perm") in ((1, 0), None):
        source = producer.inputs[0]
        if source is not None and source.const is not None:
            return Linear(node, x, source, source.const)
    return None


def _all_linears(graph: Graph) -> list[Linear]:
    return [linear for node in graph.nodes() if (linear := as_linear(node)) is not None]


linears = Analysis("linears", _all_linears)


def _gemm(node: Node) -> Linear | None:
    x, matrix = node.inputs[:2]
    plain = node.attributes.get("alpha", 1.0) == 1.0 and not node.attributes.get("transA", 0) and len(node.inputs) == 2
    if x is None or matrix is None or matrix.const is None or not plain:
        return None
    const = matrix.const
    return Linear(node, x, matrix, const if node.attributes.get("transB", 0) else flipped(const))


def flipped(expr: TensorExpr) -> TensorExpr:
    """The transpose of a matrix, rank by rank."""
    if isinstance(expr, PerRank):
        return PerRank(tuple(flipped(part) for part in expr.parts))
    return transposed(expr, (1, 0))

"""Evaluate what depends on small constants alone; weights stay expressions and are never read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vacc_opt.ir import DType, Graph, Literal, Node, Value
from vacc_opt.ir.copy import extract
from vacc_opt.ir.evaluate import evaluate
from vacc_opt.ir.infer import elements_of
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, option
from vacc_opt.passes.infra.registry import register

RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
)


@register
@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace nodes over small constants, and integer tensors whose entries are known, by constants.

    Before: ``y = Reshape(x, Concat(Shape<end=1>(x), [64]))``, x ``float[2,8,8]``; after: ``y = Reshape(x, [2, 64])``.
    Floats are computed by onnxruntime, in one session for the whole graph, so that the values stay the same bits.
    """

    name: ClassVar[str] = "fold-constants"
    kind: ClassVar[Kind] = Kind.EXACT
    max_elements: int = option(1 << 16, "largest result that is kept as a constant, in elements")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Fold integers by inference, the rest by onnxruntime."""
        known = 0
        for node in graph.nodes():
            if node in graph and all(_entries(v) is not None for v in node.outputs):
                for value in node.outputs:
                    self._replace(rw, node, value, _entries(value))
                known += 1
        folded = self._fold_region(graph, rw)
        return Outcome(f"folded {known + folded} nodes")

    def _replace(self, rw: Rewriter, node: Node, value: Value, array: np.ndarray | None) -> None:
        with rw.applying([node]):
            rw.replace(value, rw.const(array if array is not None else 0, value.name + "_const"))

    def _fold_region(self, graph: Graph, rw: Rewriter) -> int:
        region = self._foldable(graph)
        inside = set(region)
        edge = [v for n in region for v in n.outputs if any(u not in inside for u, _ in v.uses) or graph.is_output(v)]
        if not edge:
            return 0
        values = evaluate(extract(graph, region, "fold", keep=edge), {})
        for value in edge:
            if value.producer is not None and value.producer in graph:
                self._replace(rw, value.producer, value, values[value.name])
        return len(region)

    def _foldable(self, graph: Graph) -> list[Node]:
        region: dict[Node, None] = {}
        for node in graph.nodes():
            ready = all(v is None or isinstance(v.const, Literal) or v.producer in region for v in node.inputs)
            if ready and not node.domain and node.op_type not in RANDOM and self._small(node):
                region[node] = None
        return list(region)

    def _small(self, node: Node) -> bool:
        shapes = [v.type.static_shape for v in node.outputs]
        return all(s is not None and math.prod(s) <= self.max_elements for s in shapes)


def _entries(value: Value) -> np.ndarray | None:
    """The value of an integer tensor whose entries inference knows."""
    elements, shape = elements_of(value), value.type.static_shape
    if value.producer is None or elements is None or shape is None or value.type.dtype is DType.BOOL:
        return None
    if any(not isinstance(e, int) for e in elements) or math.prod(shape) != len(elements):
        return None
    return np.array(elements, value.type.dtype.numpy).reshape(shape)

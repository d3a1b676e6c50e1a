"""Evaluate what depends on small constants alone; weights stay expressions and are never read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vacc_opt.ir import DType, Graph, Literal, Node, Value
from vacc_opt.ir.attributes import nodes_within
from vacc_opt.ir.copy import extract
from vacc_opt.ir.errors import CheckError
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

    Floats are computed by onnxruntime, in one session for the whole graph, so that the values stay the same bits.

    Before:
        g (float[2,8,8] x) => (float[2,64] y) <int64[1] rest = {64}> {
            batch = Shape <end = 1> (x)
            shape = Concat <axis = 0> (batch, rest)
            y = Reshape (x, shape)
        }
    After:
        g (float[2,8,8] x) => (float[2,64] y) <int64[2] shape = {2, 64}> {
            y = Reshape (x, shape)
        }
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
        values = self._evaluate(graph, region, edge)
        if not values and len(region) > 1:
            return sum(self._fold_one(graph, rw, node) for node in region if node in graph)
        for value in edge:
            if value.name in values and value.producer is not None and value.producer in graph:
                self._replace(rw, value.producer, value, values[value.name])
        return len(region) if values else 0

    def _fold_one(self, graph: Graph, rw: Rewriter, node: Node) -> bool:
        if not all(v is None or isinstance(v.const, Literal) for v in node.inputs):
            return False
        values = self._evaluate(graph, [node], list(node.outputs))
        for value in node.outputs:
            if value.name in values and node in graph:
                self._replace(rw, node, value, values[value.name])
        return bool(values)

    def _evaluate(self, graph: Graph, region: list[Node], edge: list[Value]) -> dict[str, np.ndarray]:
        """The values of ``edge``; empty when onnxruntime lacks one of the operators."""
        try:
            return evaluate(extract(graph, region, "fold", keep=edge), {})
        except CheckError:
            return {}

    def _foldable(self, graph: Graph) -> list[Node]:
        region: dict[Node, None] = {}
        for node in graph.nodes():
            ready = all(v is None or isinstance(v.const, Literal) or v.producer in region for v in node.inputs)
            if ready and not node.domain and not is_random(node, graph) and self._small(node):
                region[node] = None
        return list(region)

    def _small(self, node: Node) -> bool:
        shapes = [v.type.static_shape for v in node.outputs]
        return all(s is not None and math.prod(s) <= self.max_elements for s in shapes)


def is_random(node: Node, graph: Graph) -> bool:
    """True when two runs of a node may differ, because of itself, a subgraph or the function that it calls."""
    if node.op_type in RANDOM or any(n.op_type in RANDOM for n in nodes_within(node)):
        return True
    body = graph.functions.get(node.op) if node.domain else None
    return body is not None and any(is_random(inner, graph) for inner in body.nodes())


def _entries(value: Value) -> np.ndarray | None:
    """The value of an integer tensor whose entries inference knows."""
    elements, shape = elements_of(value), value.type.static_shape
    if value.producer is None or elements is None or shape is None or value.type.dtype is DType.BOOL:
        return None
    if any(not isinstance(e, int) for e in elements) or math.prod(shape) != len(elements):
        return None
    return np.array(elements, value.type.dtype.numpy).reshape(shape)

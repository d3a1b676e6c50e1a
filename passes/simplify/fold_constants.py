"""Evaluate what depends on small constants alone; weights stay expressions and are never read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from vacc_opt.ir import DType, Graph, Literal, Node, Value
from vacc_opt.ir.attributes import nodes_within
from vacc_opt.ir.copy import extract
from vacc_opt.ir.errors import CheckError
from vacc_opt.ir.evaluate import evaluate
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, option
from vacc_opt.passes.infra.driver import ANY, Rule, run_rules
from vacc_opt.passes.infra.patterns.values import scalar
from vacc_opt.passes.infra.registry import register

Array = npt.NDArray[Any]
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
        folded = 0

        def fold(graph: Graph, rw: Rewriter) -> int:
            nonlocal folded
            now = self.fold(graph, rw)
            folded += now
            return now

        known = run_rules(graph, rw, [FOLD_KNOWN], fold=fold)
        return Outcome(f"folded {known.total() + folded} nodes")

    def fold(self, graph: Graph, rw: Rewriter) -> int:
        """Fold all nodes that depend on small constants alone; gives their number."""
        region = self._foldable(graph)
        inside = set(region)
        edge = [v for n in region for v in n.outputs if any(u not in inside for u, _ in v.uses) or graph.is_output(v)]
        if not edge:
            return 0
        before = len(graph)
        values = self._evaluate(graph, region, edge)
        if not values and len(region) > 1:
            for node in region:
                self._fold_one(graph, rw, node)
        for node in dict.fromkeys(v.producer for v in edge if v.producer is not None):
            self._replace(rw, node, values)
        return before - len(graph)

    def _replace(self, rw: Rewriter, node: Node, values: Mapping[str, Array]) -> None:
        with rw.applying([node], self.name):
            for value in [v for v in node.outputs if v.name in values]:
                rw.replace(value, rw.const(values[value.name], f"{value.name}_const"))

    def _fold_one(self, graph: Graph, rw: Rewriter, node: Node) -> None:
        if node in graph and all(v is None or isinstance(v.const, Literal) for v in node.inputs):
            self._replace(rw, node, self._evaluate(graph, [node], list(node.outputs)))

    def _evaluate(self, graph: Graph, region: list[Node], edge: list[Value]) -> dict[str, Array]:
        """The values of ``edge``; empty when onnxruntime lacks one of the operators."""
        try:
            return evaluate(extract(graph, region, "fold", keep=edge), {})
        except CheckError:
            return {}

    def _foldable(self, graph: Graph) -> list[Node]:
        region: dict[Node, None] = {}
        for node in graph.nodes():
            ready = all(v is None or isinstance(v.const, Literal) or v.producer in region for v in node.inputs)
            if (
                ready
                and not node.domain
                and not is_random(node, graph)
                and self._small(node)
                and not _turns_weight(node)
            ):
                region[node] = None
        return list(region)

    def _small(self, node: Node) -> bool:
        shapes = [v.type.static_shape for v in node.outputs]
        return all(s is not None and math.prod(s) <= self.max_elements for s in shapes)


def _turns_weight(node: Node) -> bool:
    """True for the transpose of a matrix that linear layers alone read: weights are stored by rows, and once."""
    x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
    if node.op != "Transpose" or x is None or not isinstance(x.const, Literal) or x.rank != 2 or not y.uses:
        return False
    return all(user.op == "MatMul" and position == 1 for user, position in y.uses)


def is_random(node: Node, graph: Graph) -> bool:
    """True when two runs of a node may differ, because of itself, a subgraph or the function that it calls."""
    # a Dropout draws in training mode, which its third operand asks for
    drops = node.op == "Dropout" and node.input(2) is not None and scalar(node.input(2)) != 0
    if drops or node.op_type in RANDOM or any(map(_may_draw, nodes_within(node))):
        return True
    body = graph.functions.get(node.op) if node.domain else None
    return body is not None and any(is_random(inner, graph) for inner in body.nodes())


def _may_draw(node: NodeProto) -> bool:
    """True for a node in a subgraph whose results may differ; what its operands hold is not looked up there."""
    return node.op_type in RANDOM or (node.op_type == "Dropout" and any(node.input[2:3]))


def _fold_known(node: Node, rw: Rewriter) -> bool:
    entries = [_entries(value) for value in node.outputs]
    known = [array for array in entries if array is not None]
    if len(known) < len(entries):
        return False
    with rw.applying([node], FOLD_KNOWN.name):
        for value, array in zip(node.outputs, known, strict=True):
            rw.replace(value, rw.const(array, f"{value.name}_const"))
    return True


FOLD_KNOWN = Rule("fold-known-entries", frozenset({ANY}), _fold_known)


def _entries(value: Value) -> Array | None:
    """The value of an integer tensor whose entries inference knows."""
    elements, shape = value.elements, value.type.static_shape
    if elements is None or shape is None or value.type.dtype is DType.BOOL:
        return None
    if any(not isinstance(e, int) for e in elements) or math.prod(shape) != len(elements):
        return None
    return np.array(elements, value.type.dtype.numpy).reshape(shape)

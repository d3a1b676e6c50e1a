"""Let equal computations be one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind, Outcome, Pass
from vacc_opt.passes.infra.registry import register
from vacc_opt.passes.simplify.fold_constants import is_random


@register
@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Merge nodes with the same operator, attributes and inputs, and constants with the same value.

    Before:
        g (float[B,8] x) => (float[B,8] y) {
            a = Neg (x)
            b = Neg (x)
            y = Add (a, b)
        }
    After:
        g (float[B,8] x) => (float[B,8] y) {
            a = Neg (x)
            y = Add (a, a)
        }
    """

    name: ClassVar[str] = "eliminate-common-subexpressions"
    kind: ClassVar[Kind] = Kind.EXACT

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """One sweep in topological order, so that merged inputs make their users equal."""
        constants: dict[object, Value] = {}
        for value in graph.constants():
            assert value.const is not None
            first = constants.setdefault(value.const.key, value)
            if first is not value:
                with rw.applying():
                    rw.replace(value, first)
        merged = 0
        seen: dict[object, Node] = {}
        for node in list(graph.nodes()):
            if is_random(node, graph):
                continue
            twin = seen.setdefault(_key(node), node)
            if twin is not node:
                with rw.applying([twin, node]):
                    for old, new in zip(node.outputs, twin.outputs, strict=True):
                        rw.replace(old, new)
                merged += 1
        return Outcome(f"merged {merged} nodes")


def _key(node: Node) -> object:
    attributes = tuple(sorted((k, _hashable(v)) for k, v in node.attributes.items()))
    return node.op, node.inputs, attributes, len(node.outputs)


def _hashable(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.tobytes()
    return type(value).__name__, value

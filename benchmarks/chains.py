"""One rewriting task for three engines: ``x + 0 -> x`` on a chain of binary operations, half of them additions of 0.

The zero is one constant that all additions share. Further rules look for subtractions, which the chain has not.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx
import onnx_ir
from onnx import helper
from onnxscript.rewriter import pattern
from xdsl.dialects import arith, builtin, func
from xdsl.ir import Block, Region
from xdsl.pattern_rewriter import (
    GreedyRewritePatternApplier,
    PatternRewriter,
    PatternRewriteWalker,
    RewritePattern,
    op_type_rewrite_pattern,
)

from vacc_opt.ir import Graph, Origin, Provenance, Value, from_onnx
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind, Outcome, Pass
from vacc_opt.passes.infra.driver import Rule, run_rules
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.patterns.match import Match
from vacc_opt.passes.infra.patterns.pattern import Pattern, op
from vacc_opt.passes.infra.patterns.pattern_pass import Capture, Matching, PatternPass

Job = tuple[Callable[[], object], Callable[[], int]]  # what is timed, and the number of operations that it leaves


def chain(length: int) -> onnx.ModelProto:
    """The chain as ONNX."""
    nodes = []
    for index in range(length):
        kind, operand = ("Add", "zero") if index % 2 == 0 else ("Mul", "two")
        nodes.append(helper.make_node(kind, [f"v{index}", operand], [f"v{index + 1}"]))
    scalars = [helper.make_tensor(name, 1, [], [number]) for name, number in (("zero", 0.0), ("two", 2.0))]
    ends = [helper.make_tensor_value_info(name, 1, [4]) for name in ("v0", f"v{length}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], scalars)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


@dataclass(frozen=True)
class AddZero(PatternPass):
    """``x + 0 -> x``."""

    name: ClassVar[str] = "add-zero"
    kind: ClassVar[Kind] = Kind.EXACT

    def pattern(self, x: Capture) -> Pattern:
        return x + 0.0

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        value: Value = m.x
        return value


@dataclass(frozen=True)
class SubtractZero(AddZero):
    """``x - 0 -> x``, of which the chain has none."""

    def pattern(self, x: Capture) -> Pattern:
        return op.Sub(x, 0.0)


@dataclass(frozen=True)
class Rewrites(Pass):
    """Rules that were registered before, all offered to one driver."""

    name: ClassVar[str] = "rewrites"
    kind: ClassVar[Kind] = Kind.EXACT
    rules: tuple[Rule, ...] = ()

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Apply them until none applies."""
        return Outcome(str(run_rules(graph, rw, self.rules)))


def ours(length: int, rules: int) -> Job:
    """The pass manager with patterns in one driver, every node with an origin, the whole graph verified afterwards."""
    lines = {f"v{i + 1}": Provenance((Origin(f"layers.{i}", f"model.py:{i}", "add"),)) for i in range(length)}
    graph = from_onnx(chain(length), provenance=lines)
    matchings = [Matching(AddZero() if i == 0 else SubtractZero(), graph) for i in range(rules)]
    item = Rewrites(tuple(Rule(f"{m.item.name} {i}", m.roots, m.visit) for i, m in enumerate(matchings)))
    return lambda: run_pipeline(graph, [item], verify_each=True), lambda: len(graph)


class XdslAddZero(RewritePattern):
    """``x + 0 -> x``."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: arith.AddfOp, rewriter: PatternRewriter, /) -> None:
        owner: Any = op.rhs.owner
        if isinstance(owner, arith.ConstantOp) and owner.value.value.data == 0.0:
            rewriter.replace(op, [], [op.lhs])


class XdslSubtractZero(RewritePattern):
    """``x - 0 -> x``."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: arith.SubfOp, rewriter: PatternRewriter, /) -> None:
        rewriter.replace(op, [], [op.lhs])


def xdsl(length: int, rules: int) -> Job:
    """The walker of xDSL with one pattern class for each rule; nothing is verified."""
    block = Block(arg_types=[builtin.f32])
    zero, two = (arith.ConstantOp(builtin.FloatAttr(number, builtin.f32)) for number in (0.0, 2.0))
    block.add_ops([zero, two])
    value: Any = block.args[0]
    for index in range(length):
        made = arith.AddfOp(value, zero.result) if index % 2 == 0 else arith.MulfOp(value, two.result)
        block.add_op(made)
        value = made.result
    block.add_op(func.ReturnOp(value))
    module = builtin.ModuleOp([func.FuncOp("f", ((builtin.f32,), (builtin.f32,)), Region(block))])
    walker = PatternRewriteWalker(
        GreedyRewritePatternApplier([XdslAddZero(), *(XdslSubtractZero() for _ in range(rules - 1))])
    )
    # the constant 2 and the return are no part of the chain; the zero is dead and gone
    return lambda: walker.rewrite_module(module), lambda: len(list(block.ops)) - 2


def onnxscript(length: int, rules: int) -> Job:
    """The rewriter of onnxscript with one rule for each; nothing is verified."""

    def add(op: Any, x: Any) -> Any:
        return op.Add(x, 0.0)

    def subtract(op: Any, x: Any) -> Any:
        return op.Sub(x, 0.0)

    def replacement(op: Any, x: Any) -> Any:
        return x

    model = onnx_ir.serde.deserialize_model(chain(length))
    listed = [pattern.RewriteRule(subtract if i else add, replacement, name=f"rule {i}") for i in range(rules)]
    every = pattern.RewriteRuleSet(listed)
    return lambda: every.apply_to_model(model), lambda: len(list(model.graph))


ENGINES: dict[str, Callable[[int, int], Job]] = {"vacc-opt": ours, "xdsl": xdsl, "onnxscript": onnxscript}


def rate(engine: str, length: int, rules: int = 1) -> float:
    """Nodes of the chain per second of this process; what builds the chain and the rules is not timed."""
    run, left = ENGINES[engine](length, rules)
    gc.collect()
    started = time.process_time()
    run()
    seconds = time.process_time() - started
    assert left() == length // 2, f"{engine} left {left()} of {length} nodes"
    return length / seconds

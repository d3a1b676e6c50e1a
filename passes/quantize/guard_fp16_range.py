"""Values beyond the range of fp16  ->  powers of two moved into the weights before and behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vacc_opt.ir import Graph, Multiplied, Node, Value
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.storage import read_safetensors_header
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option, where
from vacc_opt.passes.infra.model.layers import layer_ends
from vacc_opt.passes.infra.model.linear import as_linear
from vacc_opt.passes.infra.registry import register

NORMS = ("RMSNormalization",)
GATES = ("Vastai::SwiGLU", "Vastai::GeGLU")


@register
@dataclass(frozen=True)
class GuardFp16Range(Pass):
    """Keep gated products and the residual stream inside the range of fp16, by scales folded into the weights.

    ``ranges`` is a file of the largest magnitude of each value on calibration text. A gated product is made smaller in
    the linear before it and larger in the one behind; the residual stream in everything that is added to it, and its
    norms, which do not see a factor, take its square into their epsilon. Factors are powers of two, so that nothing is
    rounded anew. Other values beyond the limit are reported.

    Before:
        g (float[B,4] gate, float[B,8] x) => (float[B,6] y) {
            ut = Transpose <perm = [1, 0]> (u)
            up = MatMul (x, ut)
            product = Vastai.SwiGLU (gate, up)
            dt = Transpose <perm = [1, 0]> (d)
            y = MatMul (product, dt)
        }
        # const "u" = Seeded('u', 'float', (4, 8))
        # const "d" = Seeded('d', 'float', (6, 4))
    After guard-fp16-range{ranges=ranges.safetensors}:
        g (float[B,4] gate, float[B,8] x) => (float[B,6] y) {
            ut = Transpose <perm = [1, 0]> (u)
            up = MatMul (x, ut)
            product = Vastai.SwiGLU (gate, up)
            dt = Transpose <perm = [1, 0]> (d)
            y = MatMul (product, dt)
        }
        # const "u" = Multiplied(Seeded('u', 'float', (4, 8)), 0.25)
        # const "d" = Multiplied(Seeded('d', 'float', (6, 4)), 4.0)
    """

    name: ClassVar[str] = "guard-fp16-range"
    kind: ClassVar[Kind] = Kind.REASSOCIATING
    runs_after: ClassVar[tuple[str, ...]] = ("w8a16", "fuse-swiglu")
    runs_before: ClassVar[tuple[str, ...]] = ("cast-float", "split-tp")
    idempotent: ClassVar[bool] = False

    ranges: str = option("", "safetensors file of the largest magnitude of each value")
    limit: float = option(3e4, "largest magnitude that is left alone; fp16 ends at 65504")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Fold what can be folded; raises UserError without a file, CheckError after split-tp."""
        if not self.ranges:
            raise UserError("guard-fp16-range needs a file of ranges", "`backend.guard_fp16_range: true` makes it")
        if graph.ranks > 1:
            raise CheckError("the graph is split over ranks already", "put guard-fp16-range before split-tp")
        stored = read_safetensors_header(Path(self.ranges))
        seen = {name: float(one.read()[0]) for name, one in stored.items() if name in graph.values}
        beyond = {name for name, largest in seen.items() if largest > self.limit}
        scaled: dict[Value, float] = {}
        with rw.applying():
            for node in graph.nodes():
                if node.op in GATES and node.output.name in beyond:
                    scaled |= self._gate(rw, node, seen)
            scaled |= self._residual(graph, rw, seen)
        remarks = [Remark("passed", self.name, f"times {factor:g}", _where(value)) for value, factor in scaled.items()]
        now = {name: seen[name] * scaled.get(graph.values[name], 1.0) for name in sorted(beyond)}
        left = {name: largest for name, largest in now.items() if largest > self.limit}
        for name, largest in left.items():
            message = f"reaches {largest:.3g}, beyond {self.limit:g}"
            remarks.append(Remark("missed", self.name, message, _where(graph.values[name])))
        text = f"{len(beyond)} values beyond {self.limit:g}, {len(left)} of them still" if beyond else "all in range"
        return Outcome(text, remarks, fused=len(beyond) - len(left), candidates=len(beyond))

    def _factor(self, largest: float) -> float:
        return 2.0 ** -math.ceil(math.log2(largest / self.limit))

    def _gate(self, rw: Rewriter, node: Node, seen: dict[str, float]) -> dict[Value, float]:
        """Fold a gated product; gives what became smaller, and by how much."""
        up, readers = node.inputs[1], node.output.users()
        shared = rw.graph.is_output(node.output) or not all(_own(rw.graph, reader) for reader in readers)
        if up is None or shared or not _foldable(rw.graph, up):
            return {}
        factor = self._factor(seen[node.output.name])
        _fold(rw, up, factor)
        for reader in readers:
            _fold(rw, reader.output, 1 / factor)
        return dict.fromkeys([node.output, up, _bias_apart(up)[0]], factor)

    def _residual(self, graph: Graph, rw: Rewriter, seen: dict[str, float]) -> dict[Value, float]:
        """Fold the residual stream, if all that is added to it and all that reads it allow that."""
        ends = layer_ends(graph)
        stream, sources = _stream(ends[-1]) if ends else ([], [])
        largest = max((seen.get(value.name, 0.0) for value in stream), default=0.0)
        rows = [value for value in sources if _embeds(value)]
        norms = [user for value in [*stream, *rows] for user in value.users() if user.output not in stream]
        if largest <= self.limit or any(norm.op not in NORMS for norm in norms):
            return {}
        if any(map(graph.is_output, [*stream, *rows])) or not all(_foldable(graph, v) or _embeds(v) for v in sources):
            return {}
        factor = self._factor(largest)
        for value in sources:
            (_scale_rows if _embeds(value) else _fold)(rw, value, factor)
        for norm in dict.fromkeys(norms):
            rw.set_attribute(norm, "epsilon", float(norm.attributes.get("epsilon", 1e-5)) * factor**2)
        inner = [_bias_apart(value)[0] for value in sources if not _embeds(value)]
        return dict.fromkeys([*stream, *sources, *inner], factor)


def _where(value: Value) -> str:
    return where(value.producer) if value.producer is not None else value.name


def _bias_apart(value: Value) -> tuple[Value, Node | None]:
    """A value without the bias that was added to it, and the node that added it."""
    node = value.producer
    if node is not None and node.op == "Add":
        computed = [v for v in node.inputs if v is not None and not v.is_const]
        if len(computed) == 1:
            return computed[0], node
    return value, None


def _foldable(graph: Graph, value: Value) -> bool:
    """Made by a linear, perhaps with a bias, whose result nothing else reads and whose constants are its own."""
    inner, _ = _bias_apart(value)
    linear = as_linear(inner.producer) if inner.producer is not None else None
    if linear is None:
        return False
    constant = linear.scale if linear.scale is not None else linear.weight
    matrix = linear.node.inputs[1]
    return all(graph.use_count(v) == 1 for v in (value, inner, constant, matrix) if v is not None)


def _own(graph: Graph, node: Node) -> bool:
    """A linear whose constants are its own."""
    linear = as_linear(node)
    if linear is None:
        return False
    constant = linear.scale if linear.scale is not None else linear.weight
    return all(graph.use_count(v) == 1 for v in (constant, node.inputs[1]) if v is not None)


def _fold(rw: Rewriter, value: Value, factor: float) -> None:
    """Multiply what a linear gives; of the value itself a bias is a part, and so it takes the factor too."""
    inner, added = _bias_apart(value)
    assert inner.producer is not None
    linear = as_linear(inner.producer)
    assert linear is not None
    constant = linear.scale if linear.scale is not None else linear.weight
    assert constant.const is not None
    rw.set_const(constant, Multiplied(constant.const, factor))
    if added is not None:
        position = 0 if added.inputs[0] is not inner else 1
        given = added.inputs[position]
        assert given is not None
        assert given.const is not None
        rw.set_input(added, position, rw.const(Multiplied(given.const, factor), given.name, of=given.provenance))


def _embeds(value: Value) -> bool:
    """Rows of a constant table."""
    node = value.producer
    return node is not None and node.op == "Gather" and node.inputs[0] is not None and node.inputs[0].is_const


def _stream(end: Value | None) -> tuple[list[Value], list[Value]]:
    """The values of the residual stream up to ``end``, and what is added up in them."""
    stream: list[Value] = []
    sources: list[Value] = []
    pending = [end]
    while pending:
        value = pending.pop()
        if value is None or value in stream or value in sources:
            continue
        node = value.producer
        if node is not None and node.op == "Add" and all(v is not None and not v.is_const for v in node.inputs):
            stream.append(value)
            pending += node.inputs
        else:
            sources.append(value)
    return stream, sources


def _scale_rows(rw: Rewriter, value: Value, factor: float) -> None:
    """The table may be lm_head's too, so its rows are multiplied after they are taken."""
    users = list(value.uses)
    assert value.producer is not None
    with rw.on_behalf_of(value.producer):
        scaled = rw.op.Mul(value, rw.const(factor, f"{value.name}.factor", "float32"))
    for node, position in users:
        rw.set_input(node, position, scaled)

"""Values beyond the range of fp16  ->  powers of two moved into the weights around them, or islands of fp32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.storage import read_safetensors_header
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option, where
from vacc_opt.passes.infra.model.factors import (
    fold,
    has_own_constants,
    is_embedding,
    is_foldable,
    residual_stream,
    scale_rows,
    without_bias,
)
from vacc_opt.passes.infra.model.layers import layer_ends
from vacc_opt.passes.infra.registry import register
from vacc_opt.passes.quantize.fp32_islands import SELECTIONS, draw, islands_of

NORMS = ("RMSNormalization",)
QUANTIZED = "_QuantizedLinearPerChannel"
GATES = ("Vastai::SwiGLU", "Vastai::GeGLU")


@register
@dataclass(frozen=True)
class GuardFp16Range(Pass):
    """Keep values inside the range of fp16 by scales folded into the weights, or in fp32 where that cannot be.

    ``ranges`` is a file of the largest magnitude of each value on calibration text. A gated product is made smaller in
    the linear before it and larger in the one behind; the residual stream in everything that is added to it, and its
    norms, which do not see a factor, take its square into their epsilon. Factors are powers of two, so that nothing is
    rounded anew. Other values stay in fp32, with the nodes that make and read them: casts of float to float, which
    `cast-float` understands, say where. A value that attention, a rotary embedding or the KV cache reads is reported.

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
        # w8a16 names its result after what it replaces
        names = {name: name if name in stored else name.removesuffix(QUANTIZED) for name in graph.values}
        seen = {name: float(stored[old].read()[0]) for name, old in names.items() if old in stored}
        for node in graph.nodes():  # later passes take parts of values that were profiled
            if node.op in SELECTIONS and node.inputs[0] is not None and node.inputs[0].name in seen:
                for part in node.outputs:
                    seen.setdefault(part.name, seen[node.inputs[0].name])
        beyond = {name for name, largest in seen.items() if largest > self.limit}
        scaled: dict[Value, float] = {}
        with rw.applying():
            for node in graph.nodes():
                if node.op in GATES and node.output.name in beyond:
                    scaled |= self._gate(rw, node, seen)
            scaled |= self._residual(graph, rw, seen)
        remarks = [Remark("passed", self.name, f"times {factor:g}", _where(value)) for value, factor in scaled.items()]
        now = {name: seen[name] * scaled.get(graph.values[name], 1.0) for name in sorted(beyond)}
        left = {graph.values[name]: largest for name, largest in now.items() if largest > self.limit}
        kept, missed = self._islands(graph, rw, left)
        remarks += [*kept, *missed]
        if not beyond:
            return Outcome("all in range", remarks, fused=0, candidates=0)
        wide = f"{len(kept)} stay in fp32, " if kept else ""
        text = f"{len(beyond)} values beyond {self.limit:g}, {wide}{len(missed)} of them still"
        return Outcome(text, remarks, fused=len(beyond) - len(missed), candidates=len(beyond))

    def _islands(self, graph: Graph, rw: Rewriter, left: dict[Value, float]) -> tuple[list[Remark], list[Remark]]:
        """Keep what is left in fp32 with its makers and readers; gives remarks on that, and on what cannot be."""
        kept: list[Remark] = []
        missed: list[Remark] = []
        with rw.applying():
            for island in list(islands_of(graph, left)):
                if not island.obstacle:
                    draw(graph, rw, island)
                for value in island.values:
                    message = f"reaches {left[value]:.3g}, beyond {self.limit:g}: {island.obstacle or 'stays in fp32'}"
                    place = _where(value)
                    (missed if island.obstacle else kept).append(
                        Remark("missed" if island.obstacle else "passed", self.name, message, place)
                    )
        return kept, missed

    def _factor(self, largest: float) -> float:
        return 2.0 ** -math.ceil(math.log2(largest / self.limit))

    def _gate(self, rw: Rewriter, node: Node, seen: dict[str, float]) -> dict[Value, float]:
        """Fold a gated product; gives what became smaller, and by how much."""
        up, readers = node.inputs[1], node.output.users()
        shared = rw.graph.is_output(node.output) or not all(has_own_constants(rw.graph, reader) for reader in readers)
        if up is None or shared or not is_foldable(rw.graph, up):
            return {}
        factor = self._factor(seen[node.output.name])
        fold(rw, up, factor)
        for reader in readers:
            fold(rw, reader.output, 1 / factor)
        return dict.fromkeys([node.output, up, without_bias(up)[0]], factor)

    def _residual(self, graph: Graph, rw: Rewriter, seen: dict[str, float]) -> dict[Value, float]:
        """Fold the residual stream, if all that is added to it and all that reads it allow that."""
        ends = layer_ends(graph)
        stream, sources = residual_stream(ends[-1]) if ends else ([], [])
        largest = max((seen.get(value.name, 0.0) for value in stream), default=0.0)
        rows = [value for value in sources if is_embedding(value)]
        norms = [user for value in [*stream, *rows] for user in value.users() if user.output not in stream]
        if largest <= self.limit or any(norm.op not in NORMS for norm in norms):
            return {}
        foldable = all(is_foldable(graph, value) for value in sources if value not in rows)
        if not foldable or any(map(graph.is_output, [*stream, *rows])):
            return {}
        factor = self._factor(largest)
        for value in sources:
            (scale_rows if value in rows else fold)(rw, value, factor)
        for norm in dict.fromkeys(norms):
            rw.set_attribute(norm, "epsilon", float(norm.attributes.get("epsilon", 1e-5)) * factor**2)
        inner = [without_bias(value)[0] for value in sources if value not in rows]
        return dict.fromkeys([*stream, *sources, *inner], factor)


def _where(value: Value) -> str:
    return where(value.producer) if value.producer is not None else value.name

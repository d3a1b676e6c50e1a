"""parts(Linear(x, W))  ->  Linear(x, rows of W) for each part: packed QKV, packed gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Dim, Graph, PerRank, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.fuse.gather_channels import GatherChannels
from vacc_opt.passes.fuse.unfold_gemm import UnfoldGemm
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option, where
from vacc_opt.passes.infra.model.linear import Linear, as_linear
from vacc_opt.passes.infra.model.packed import Packed, Part, unpack
from vacc_opt.passes.infra.model.slices import take_columns, take_rows
from vacc_opt.passes.infra.registry import register


@register
@dataclass(frozen=True)
class SplitPackedLinear(Pass):
    """Give each part of a packed projection a linear layer of its own, over its rows of the weight.

    Split, Slice, Gather and Reshape behind the layer are followed back to weight rows, so groups such as
    ``[kv, (q.., k, v), D]`` are taken apart as well as plain halves. Weights stay expressions; the bias is split too.
    Layers over joined axes are written out before (``unfold-gemm``), and so are lists of rows (``gather-channels``).

    Before:
        g (float[B,8] x) => (gate, up) {
            packed = MatMul (x, w)
            gate, up = Split <axis = -1, num_outputs = 2> (packed)
        }
        # const "w" = Seeded('w', 'float', (8, 6))
    After:
        g (float[B,8] x) => (gate, up) {
            gate = MatMul (x, w0)
            up = MatMul (x, w1)
        }
        # const "w0" = Sliced(Seeded('w', 'float', (8, 6)), (0, 0), (8, 3))
        # const "w1" = Sliced(Seeded('w', 'float', (8, 6)), (0, 3), (8, 6))
    """

    name: ClassVar[str] = "split-packed-linear"
    kind: ClassVar[Kind] = Kind.REASSOCIATING
    runs_before: ClassVar[tuple[str, ...]] = ("w8a16", "split-tp")

    expect: int | None = option(None, "fail unless exactly this many are split")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Split each layer that is read in parts only; one that is also read whole is remarked on."""
        UnfoldGemm().run(graph, rw)
        GatherChannels().run(graph, rw)
        fused, outcome = 0, Outcome()
        for node in list(graph.nodes()):
            linear = as_linear(node) if node in graph else None
            packed = unpack(graph, linear) if linear is not None else None
            if linear is None or packed is None:
                continue
            name, count = linear.weight.name, len(packed.parts)
            why = packed.why or _why_not(linear)
            if why:
                outcome.remarks.append(Remark("missed", self.name, f"{name}: {why}", where(node)))
                continue
            outcome.remarks.append(Remark("passed", self.name, f"{name} in {count} parts", where(node)))
            with rw.applying([node, *(part.node for part in packed.parts)]):
                for index, part in enumerate(packed.parts):
                    with rw.on_behalf_of(node, part.node):
                        _place(part, _linear(linear, packed, part, index, rw), rw)
            fused += 1
        outcome.fused, outcome.candidates = fused, len(outcome.remarks)
        outcome.summary = f"split {fused} of {outcome.candidates} packed linears"
        return outcome


def _why_not(linear: Linear) -> str:
    if linear.scale is not None:
        return "the weight is quantized already: put split-packed-linear before w8a16"
    return "the weight is split over ranks already" if isinstance(linear.rows, PerRank) else ""


def _place(part: Part, y: Value, rw: Rewriter) -> None:
    """Give readers of the part the new layer's output: a Reshape of the part becomes one of the output itself."""
    tokens = (y.shape or ())[:-1]
    for user in part.value.users():
        shape = user.output.shape or ()
        own = shape[len(tokens) :]
        if user.op == "Reshape" and shape[: len(tokens)] == tokens and all(isinstance(d, int) for d in own):
            rw.replace(user.output, _shaped(y, own, rw))
    if rw.graph.use_count(part.value):
        rw.replace(part.value, _shaped(y, part.shape, rw))


def _shaped(y: Value, own: Sequence[Dim], rw: Rewriter) -> Value:
    """``y`` with its last dimension cut into those."""
    sizes = [d for d in own if isinstance(d, int)]
    return y if len(sizes) == 1 else rw.op.Reshape(y, rw.ints(*(0 for _ in (y.shape or ())[:-1]), *sizes))


def _linear(linear: Linear, packed: Packed, part: Part, index: int, rw: Rewriter) -> Value:
    weight, rows = linear.weight.const, part.rows
    assert weight is not None
    stored = linear.rows is weight  # [N, K]
    taken = take_rows(weight, rows) if stored else take_columns(weight, rows)
    matrix = rw.const(taken, _named(linear.weight, index), of=linear.weight.provenance)
    y = rw.op.MatMul(linear.x, rw.op.Transpose(matrix, perm=(1, 0)) if stored else matrix)
    if packed.bias is not None and packed.bias.const is not None:
        bias = take_rows(packed.bias.const, rows)
        y = rw.op.Add(y, rw.const(bias, _named(packed.bias, index), of=packed.bias.provenance))
    return y


def _named(value: Value, index: int) -> str:
    """``qkv.weight`` -> ``qkv.0.weight``."""
    stem, dot, last = value.name.rpartition(".")
    return f"{stem}.{index}.{last}" if dot and last in ("weight", "bias") else f"{value.name}.{index}"

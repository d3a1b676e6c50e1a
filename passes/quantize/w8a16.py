"""Linear(x, W)  ->  Vastai::QuantizedLinearPerChannel(x, codes(W), scales(W)): int8 weights, one scale a row."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vacc_opt.ir import Coded, DType, Graph, PerRank, TensorExpr, Value
from vacc_opt.ir.coded import coded_parts
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.tensor import Array, Codes, Index, Scales
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option, where
from vacc_opt.passes.infra.model.linear import Linear, as_linear, linears
from vacc_opt.passes.infra.registry import register
from vacc_opt.passes.quantize.codes_file import CodesFile


@dataclass(frozen=True)
class RoundedRows(TensorExpr):
    """The numbers that W8A16 computes with, from its definition: ``clip(rint(w / scale), -127, 127) * scale``."""

    base: TensorExpr

    @property
    def dtype(self) -> DType:
        """Always float."""
        return DType.FLOAT

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.base.shape

    def _read(self, index: Index) -> Array:
        rows = self.base.read(index[:1]).astype(np.float32)
        scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
        scale[scale == 0] = 1
        return np.asarray((np.rint(rows / scale).clip(-127, 127) * scale)[:, index[1]])


@register
@dataclass(frozen=True)
class W8A16(Pass):
    """Quantize constant-weight linear layers to int8 by rounding to nearest, one scale an output channel.

    ``scale = max|row| / 127``, ``q = clip(rint(w / scale), -127, 127)``, all in fp32; weights stay expressions, so no
    weight is read here.
    The embedding is no linear layer; lm_head stays as it is unless asked for. With ``codes``, codes and scales come
    from a file that `vacc-opt calibrate` wrote (GPTQ); layers that it says to keep stay float. Rows that the checkpoint
    holds as codes keep them.

    Before:
        g (float[B,8] x) => (float[B,3] y) {
            t = Transpose <perm = [1, 0]> (w)
            y = MatMul (x, t)
        }
        # const "w" = Seeded('w', 'float', (3, 8))
    After:
        g (float[B,8] x) => (float[B,3] y) {
            y = Vastai.QuantizedLinearPerChannel (x, codes, scales)
        }
        # const "codes" = Codes(Seeded('w', 'float', (3, 8)))
        # const "scales" = Scales(Seeded('w', 'float', (3, 8)))
    """

    name: ClassVar[str] = "w8a16"
    kind: ClassVar[Kind] = Kind.LOSSY
    runs_before: ClassVar[tuple[str, ...]] = ("split-tp",)

    lm_head: bool = option(False, "quantize the layer that makes the logits too")
    include: str = option("", "regular expression of weight names to quantize; empty: all")
    exclude: str = option("", "regular expression of weight names to keep")
    codes: str = option("", "safetensors file of codes and scales to take; empty: round to nearest")
    logits: str = option("logits", "name of the output that lm_head makes")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Rewrite every admitted linear; raises CheckError after split-tp, since a scale belongs to the full row."""
        if graph.ranks > 1:
            raise CheckError("the graph is split over ranks already", "put w8a16 before split-tp: quantize, then split")
        file = CodesFile.open(self.codes) if self.codes else None
        found = self.candidates(graph)
        outcome = Outcome(fused=0, candidates=len(found))
        for linear, reason in found:
            made = file.of(linear.weight.name, linear.rows) if file is not None and not reason else None
            if file is not None and not reason and made is None:
                reason = f"{linear.weight.name} stays float: int8 loses much of its output, as {file.name} says"
            if reason:
                outcome.remarks.append(Remark("missed", self.name, reason, where(linear.node)))
                continue
            remark = Remark(
                "passed", self.name, f"{linear.weight.name} int8 {list(linear.rows.shape)}", where(linear.node)
            )
            # read anew: the layer before may have been rewritten
            self._rewrite(as_linear(linear.node) or linear, rw, made)
            outcome.fused = (outcome.fused or 0) + 1
            outcome.remarks.append(remark)
        if self.include and not outcome.fused:
            raise UserError(f"no linear layer matches include={self.include!r}", "`opt --remarks` lists the weights")
        outcome.summary = f"{outcome.fused} of {outcome.candidates} linears int8"
        return outcome

    def candidates(self, graph: Graph) -> list[tuple[Linear, str]]:
        """Every linear that is not int8 yet, and why it is to be kept; an empty reason means that it is quantized."""
        head = None if self.lm_head else self._head(graph)
        return [(linear, self._kept(linear, head)) for linear in linears(graph) if linear.scale is None]

    def reference(self, before: Graph, roots: Collection[str]) -> Graph:
        """The same linears with weights that are rounded to their codes' values in fp32."""
        rw = Rewriter(before)
        file = CodesFile.open(self.codes) if self.codes else None
        for linear in [one for one in linears(before) if one.scale is None and one.node.output.name in roots]:
            made = file.of(linear.weight.name, linear.rows) if file is not None else coded_parts(linear.rows)
            rounded = rw.const(Coded(*made) if made is not None else RoundedRows(linear.rows))
            by_rows = linear.node.op == "Gemm" and linear.node.attributes.get("transB", 0)
            before_it = linear.node.inputs[1]
            rw.set_input(linear.node, 1, rounded if by_rows else rw.op.Transpose(rounded, perm=(1, 0)))
            if before_it is not None and before_it.producer is not None:
                rw.erase_dead(before_it.producer)
        return before

    def _head(self, graph: Graph) -> Value | None:
        value = graph.outputs.get(self.logits)
        while value is not None and value.producer is not None and as_linear(value.producer) is None:
            value = value.producer.inputs[0] if value.producer.inputs else None
        return value

    def _kept(self, linear: Linear, head: Value | None) -> str:
        name = linear.weight.name
        if linear.node.output is head:
            return "lm_head is kept (lm_head=true quantizes it)"
        try:
            if self.include and not re.search(self.include, name):
                return f"{name} does not match include"
            if self.exclude and re.search(self.exclude, name):
                return f"{name} matches exclude"
        except re.error as error:
            raise UserError(f"include or exclude is no regular expression: {error}") from error
        if isinstance(linear.rows, PerRank):
            return "the weight is split over ranks already"
        dtype = linear.rows.dtype
        if not dtype.is_float or dtype is DType.DOUBLE:  # codes and scales are made of what fp32 holds
            return f"{name} is {dtype.value}"
        return ""

    def _rewrite(self, linear: Linear, rw: Rewriter, made: tuple[TensorExpr, TensorExpr] | None) -> None:
        with rw.applying([linear.node]):
            stem = linear.weight.name.removesuffix(".weight")
            history = linear.weight.provenance
            by_codes, by_scales = made or coded_parts(linear.rows) or (Codes(linear.rows), Scales(linear.rows))
            codes = rw.const(by_codes, f"{stem}.qweight", of=history)
            scales = rw.const(by_scales, f"{stem}.scale", of=history)
            rw.replace(linear.node.output, rw.vastai.QuantizedLinearPerChannel(linear.x, codes, scales))

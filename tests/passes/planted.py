"""Passes with a bug planted in them, and graphs on which they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vacc_opt.ir import CheckError, Graph, Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.tensor import Codes, Scales, TensorExpr
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, option
from vacc_opt.passes.infra.model.linear import Linear
from vacc_opt.passes.quantize.w8a16 import W8A16

Make = Callable[[Rewriter, Node, int], Value | None]


def chain(length: int = 20) -> Graph:
    """X negated ``length`` times: n0, n1, ... with a sum over the last axis at the end."""
    lines = [f"n{i} = Neg ({f'n{i - 1}' if i else 'x'})" for i in range(length)]
    body = "\n".join([*lines, f"y = ReduceSum (n{length - 1}, axes)"])
    provenance = "\n".join(f'# from "n{i}" = [[["layers.{i}", "model.py:{10 + i}", ""]], []]' for i in range(length))
    text = f"g (float[batch,32] x) => (float[batch,1] y) <int64[1] axes = {{1}}> {{\n{body}\n}}\n{provenance}\n"
    return from_text(text)


@dataclass(frozen=True)
class EachNode(Pass):
    """Put something in place of every node of one operator, one application each."""

    op: ClassVar[str] = "Neg"
    kind: ClassVar[Kind] = Kind.EXACT

    def make(self, rw: Rewriter, node: Node, index: int) -> Value | None:
        """What takes the place of the ``index``-th node (from 1); None: the node stays."""
        raise NotImplementedError

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        for index, node in enumerate([n for n in graph.nodes() if n.op == self.op], 1):
            with rw.applying([node]):
                new = self.make(rw, node, index)
                if new is not None:
                    rw.replace(node.output, new)
        return Outcome()


def number(rw: Rewriter, value: float) -> Value:
    return rw.const(np.float32(value))


@dataclass(frozen=True)
class SubtractFromZero(EachNode):
    """-x  ->  0 - x, which is right."""

    name: ClassVar[str] = "subtract-from-zero"

    def make(self, rw: Rewriter, node: Node, index: int) -> Value | None:
        return rw.op.Sub(number(rw, 0), node.inputs[0])


@dataclass(frozen=True)
class WrongAt(EachNode):
    """-x  ->  0 - x, but 1e-4 - x at one application."""

    name: ClassVar[str] = "wrong-at"

    at: int = option(7, "number of the wrong application")

    def make(self, rw: Rewriter, node: Node, index: int) -> Value | None:
        return rw.op.Sub(number(rw, 1e-4 if index == self.at else 0), node.inputs[0])


@dataclass(frozen=True)
class WrongScale(EachNode):
    """-x  ->  -1.001 x."""

    name: ClassVar[str] = "wrong-scale"
    kind: ClassVar[Kind] = Kind.REASSOCIATING

    def make(self, rw: Rewriter, node: Node, index: int) -> Value | None:
        return rw.op.Mul(node.inputs[0], number(rw, -1.001))


@dataclass(frozen=True)
class ThirdByProduct(EachNode):
    """X / 3  ->  x * (1/3), another rounding; ``wrong`` adds an error of 1e-3."""

    name: ClassVar[str] = "third-by-product"
    op: ClassVar[str] = "Div"
    kind: ClassVar[Kind] = Kind.REASSOCIATING

    wrong: bool = option(False, "multiply by a third and a little")

    def make(self, rw: Rewriter, node: Node, index: int) -> Value | None:
        return rw.op.Mul(node.inputs[0], number(rw, 1 / 3 + (1e-3 if self.wrong else 0)))


@dataclass(frozen=True)
class Swapped(EachNode):
    """A - b  ->  b - a."""

    name: ClassVar[str] = "swapped"
    op: ClassVar[str] = "Sub"

    def make(self, rw: Rewriter, node: Node, index: int) -> Value | None:
        return rw.op.Sub(node.inputs[1], node.inputs[0])


@dataclass(frozen=True)
class NanMaker(EachNode):
    """Abs(x)  ->  Sqrt(x) * Sqrt(x), NaN below 0."""

    name: ClassVar[str] = "nan-maker"
    op: ClassVar[str] = "Abs"
    kind: ClassVar[Kind] = Kind.REASSOCIATING

    def make(self, rw: Rewriter, node: Node, index: int) -> Value | None:
        root = rw.op.Sqrt(node.inputs[0])
        return rw.op.Mul(root, root)


@dataclass(frozen=True)
class DropsPadding(EachNode):
    """future or padded  ->  future: right where nothing is padded."""

    name: ClassVar[str] = "drops-padding"
    op: ClassVar[str] = "Or"

    def make(self, rw: Rewriter, node: Node, index: int) -> Value | None:
        future, padded = node.inputs
        return rw.op.Or(future, rw.op.Xor(padded, padded))


@dataclass(frozen=True)
class DropsAnOutput(Pass):
    """Say to be exact, and take an output away."""

    name: ClassVar[str] = "drops-an-output"
    kind: ClassVar[Kind] = Kind.EXACT

    output: str = option("y", "name of the output")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        with rw.applying():
            rw.drop_output(self.output)
        return Outcome()


@dataclass(frozen=True)
class RaisesAt(EachNode):
    """-x  ->  0 - x, with an error of ours at one application."""

    name: ClassVar[str] = "raises-at"

    at: int = option(5, "number of the application that raises")
    check: bool = option(False, "raise an error for people instead of a defect")

    def make(self, rw: Rewriter, node: Node, index: int) -> Value | None:
        if index == self.at:
            raise CheckError(f"cannot rewrite {node.output.name}") if self.check else ValueError("boom")
        return rw.op.Sub(number(rw, 0), node.inputs[0])


@dataclass(frozen=True)
class BreaksTypes(EachNode):
    """-x  ->  0 - x, and past the rewriter's checks a wrong type at one application."""

    name: ClassVar[str] = "breaks-types"

    at: int = option(3, "number of the application after which the graph is not valid")

    def make(self, rw: Rewriter, node: Node, index: int) -> Value | None:
        new = rw.op.Sub(number(rw, 0), node.inputs[0])
        rw.replace(node.output, new)
        if index == self.at:
            old = new.producer
            assert old is not None
            new.type = type(new.type)(new.type.dtype, (3, 5))
        return None


@dataclass(frozen=True)
class WrongCodes(W8A16):
    """w8a16, but one weight gets the scales of its rows in reverse order."""

    name: ClassVar[str] = "wrong-codes"

    weight: str = option("wu", "name of the weight")

    def _rewrite(self, linear: Linear, rw: Rewriter, made: tuple[TensorExpr, TensorExpr] | None) -> None:
        if linear.weight.name != self.weight:
            super()._rewrite(linear, rw, made)
            return
        with rw.applying([linear.node]):
            codes, scales = rw.const(Codes(linear.rows), "q"), rw.const(Scales(linear.rows).read()[::-1].copy(), "s")
            rw.replace(linear.node.output, rw.vastai.QuantizedLinearPerChannel(linear.x, codes, scales))


ALL = (
    SubtractFromZero,
    WrongAt,
    WrongScale,
    Swapped,
    NanMaker,
    DropsPadding,
    DropsAnOutput,
    RaisesAt,
    BreaksTypes,
    WrongCodes,
)

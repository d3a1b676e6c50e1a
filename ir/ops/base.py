"""How an operator of the Vastai domain is declared: once, with its type rule, documentation and body."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy.typing as npt
import onnx

from vacc_opt.ir.graph import Node
from vacc_opt.ir.infer import Rule, rule

DOMAIN = "Vastai"
OPS: dict[str, OpDef] = {}
Facets = tuple[str, ...]  # what a call asks for, such as the optional inputs that it gives
Array = npt.NDArray[Any]
Combine = Callable[[Sequence[Array], Mapping[str, Any]], list[Array]]


@dataclass(frozen=True)
class OpDef:
    """An operator we define.

    ``body`` is ONNX text of the statements between the braces, or None for a collective, which needs all ranks:
    there ``combine`` gives what each rank gets of the parts of all, from the parts in rank order and the attributes.
    ``attributes`` maps each attribute to what it means; ``inputs`` and ``outputs`` are formal names in order, of which
    the last ``optional`` inputs may be left out.

    A body in ONNX cannot ask whether an input is there. Where it depends on that, ``facets`` says what a call asks for
    and ``body`` is a function of it: each combination is an overload of its own, named after its facets.
    """

    name: str
    doc: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    infer: Rule
    attributes: tuple[tuple[str, str], ...] = ()
    body: str | Callable[[Facets], str] | None = None
    optional: int = 0
    facets: Callable[[Node], Facets] = lambda node: ()
    combine: Combine | None = None

    @property
    def is_collective(self) -> bool:
        """True when the operator exchanges data between ranks."""
        return self.body is None

    @cache  # noqa: B019 - a handful of module-level constants live as long as the process
    def function(self, opset: int, facets: Facets = ()) -> onnx.FunctionProto:
        """The operator, for calls with these facets, as an ONNX local function over standard operators."""
        if self.body is None:
            raise ValueError(f"{self.name} is a collective and has no body")
        body = self.body if isinstance(self.body, str) else self.body(facets)
        attributes = f"<{', '.join(a for a, _ in self.attributes)}>" if self.attributes else ""
        text = (
            f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
            f"{self.name} {attributes} ({', '.join(self.inputs)}) => ({', '.join(self.outputs)}) {{\n{body}\n}}"
        )
        function = onnx.parser.parse_function(text)
        function.overload = overload(facets)
        function.doc_string = self.doc
        return function


def overload(facets: Facets) -> str:
    """The overload of a function for calls with these facets; empty when there is only one.

    >>> overload(("length", "causal"))
    'length_causal'
    """
    return "_".join(facets)


def facets_of(node: Node) -> Facets:
    """The facets of a call; none for operators of other domains."""
    op = get(node.op_type) if node.domain == DOMAIN else None
    return () if op is None else op.facets(node)


def define(op: OpDef) -> OpDef:
    """Register an operator and its type rule."""
    OPS[op.name] = op
    rule(f"{DOMAIN}::{op.name}")(op.infer)
    return op


def get(name: str) -> OpDef | None:
    """The operator of that name."""
    return OPS.get(name)

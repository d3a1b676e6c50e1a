"""How an operator of the Vastai domain is declared: once, with its type rule, documentation and body."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import onnx

from vacc_opt.ir.infer import Rule, rule

DOMAIN = "Vastai"
OPS: dict[str, OpDef] = {}


@dataclass(frozen=True)
class OpDef:
    """An operator we define.

    ``body`` is ONNX text of the statements between the braces, or None for a collective, which needs all ranks.
    ``attributes`` maps each attribute to what it means; ``inputs`` and ``outputs`` are formal names in order.
    """

    name: str
    doc: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    infer: Rule
    attributes: tuple[tuple[str, str], ...] = ()
    body: str | None = None

    @property
    def is_collective(self) -> bool:
        """True when the operator exchanges data between ranks."""
        return self.body is None

    @cache  # noqa: B019 - a handful of module-level constants live as long as the process
    def function(self, opset: int) -> onnx.FunctionProto:
        """The operator as an ONNX local function over standard operators."""
        if self.body is None:
            raise ValueError(f"{self.name} is a collective and has no body")
        attributes = f"<{', '.join(a for a, _ in self.attributes)}>" if self.attributes else ""
        text = (
            f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
            f"{self.name} {attributes} ({', '.join(self.inputs)}) => ({', '.join(self.outputs)}) {{\n{self.body}\n}}"
        )
        function = onnx.parser.parse_function(text)
        function.doc_string = self.doc
        return function


def define(op: OpDef) -> OpDef:
    """Register an operator and its type rule."""
    OPS[op.name] = op
    rule(f"{DOMAIN}::{op.name}")(op.infer)
    return op


def get(name: str) -> OpDef | None:
    """The operator of that name."""
    return OPS.get(name)

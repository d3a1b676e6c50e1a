"""Calls of local functions  ->  the nodes of their bodies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.attributes import nodes_within
from vacc_opt.ir.functions import caller_dims
from vacc_opt.ir.provenance import merge
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option, where
from vacc_opt.passes.infra.registry import register


@register
@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Replace calls of local functions by their bodies, those inside bodies included.

    A function whose operators mean something else at the opset of the graph is kept.

    Before:
        <ir_version: 10, opset_import: ["" : 24, "other" : 1]>
        g (float[B,8] x) => (float[B,8] y) {
            double = other.Twice (x)
            y = other.Less (double)
        }
        <domain: "other", opset_import: ["" : 24]>
        Twice (a) => (b) {
            b = Add (a, a)
        }
        <domain: "other", opset_import: ["" : 24]>
        Less (a) => (b) {
            b = Neg (a)
        }
    After inline-functions{only=other::Twice}:
        <ir_version: 10, opset_import: ["" : 24, "other" : 1]>
        g (float[B,8] x) => (float[B,8] y) {
            double = Add (x, x)
            y = other.Less (double)
        }
        <domain: "other", opset_import: ["" : 24]>
        Less (a) => (b) {
            b = Neg (a)
        }
    """

    name: ClassVar[str] = "inline-functions"
    kind: ClassVar[Kind] = Kind.EXACT

    only: str = option("", "inline these alone: names such as `other::Twice`, separated by spaces")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Inline call by call; what a body calls is inlined after it."""
        remarks: list[Remark] = []
        pending = self._calls(graph, graph.nodes())
        while pending:
            call = pending.pop()
            reason = next(_misfits(graph, graph.functions[call.op]), None)
            if reason is not None:
                remarks.append(Remark("missed", self.name, f"{call.op}: {reason}", where(call)))
                continue
            remarks.append(Remark("passed", self.name, f"{call.op} inlined", where(call)))
            with rw.applying([call]):
                _inline(call, graph.functions[call.op], rw)
            pending += self._calls(graph, rw.made)
        inlined = sum(r.kind == "passed" for r in remarks)
        return Outcome(f"inlined {inlined} calls", remarks, fused=inlined, candidates=len(remarks))

    def _calls(self, graph: Graph, nodes: list[Node]) -> list[Node]:
        wanted = self.only.split() or list(graph.functions)
        return [n for n in reversed(nodes) if n.op in graph.functions and n.op in wanted]


def _misfits(graph: Graph, body: Graph) -> Iterator[str]:
    """Operators of the body that the graph's imports would turn into others."""
    used = {(node.domain, node.op_type) for node in body.nodes()}
    used |= {(inner.domain, inner.op_type) for node in body.nodes() for inner in nodes_within(node)}
    for domain, op_type in sorted(used):
        if not domain and _since(op_type, body.opset) != _since(op_type, graph.opset):
            yield f"{op_type} of opset {body.opset} is another operator at opset {graph.opset}"
        have, needed = graph.domains.get(domain), body.domains.get(domain)
        if have is not None and needed is not None and have != needed:
            yield f"{domain} is imported at version {have}, the function needs {needed}"


def _since(op_type: str, opset: int) -> int:
    return int(onnx.defs.get_schema(op_type, opset).since_version)


def _inline(call: Node, body: Graph, rw: Rewriter) -> None:
    given = [value for value in call.inputs if value is not None]
    dims = caller_dims((v.type for v in body.inputs), (v.type for v in given), (), "")
    stem = call.output.name
    made: dict[Value | None, Value | None] = {None: None, **dict(zip(body.inputs, given, strict=True))}
    for value in body.constants():
        assert value.const is not None
        of = merge([value.provenance, call.provenance])
        made[value] = rw.const(value.const, f"{stem}_{value.name}", of=of)
    for node in body.nodes():
        with rw.on_behalf_of(node, call):
            twin = rw.add(
                node.op_type,
                [made[value] for value in node.inputs],
                node.attributes,
                domain=node.domain,
                outputs=len(node.outputs),
                name=f"{stem}_{node.output.name}",
                declared=[value.type.bind(dims) for value in node.outputs],
            )
        made.update(zip(node.outputs, twin.outputs, strict=True))
    for domain, version in body.domains.items():
        rw.import_domain(domain, version)
    for old, inner in zip(call.outputs, body.outputs.values(), strict=True):
        new = made[inner]
        assert new is not None
        rw.replace(old, new)

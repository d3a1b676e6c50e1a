"""The SPMD graph of n ranks  ->  one graph that holds all of them, for stock onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

from vacc_opt.ir import Graph, Node, PerRank, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind, Outcome, Pass
from vacc_opt.passes.infra.check.adapters import Adapter, Expanded
from vacc_opt.passes.infra.registry import register

SHARED_INPUTS = ("input_ids", "pos", "valid", "attention_mask", "position_ids")


_EXCHANGES = ("Vastai::AllReduce", "Vastai::AllGather", "Vastai::ReduceScatter")


def _exchanged(node: Node, rw: Rewriter, parts: list[Value]) -> list[Value]:
    """What each rank gets of a collective."""
    if node.op == "Vastai::AllGather":
        return [rw.op.Concat(*parts, axis=node.attributes["axis"])] * len(parts)
    total = reduce(lambda a, b: rw.op.Add(a, b), parts)
    if node.op == "Vastai::AllReduce":
        return [total] * len(parts)
    cut = {"axis": node.attributes["axis"], "num_outputs": len(parts)}
    return list(rw.add("Split", (total,), cut, outputs=len(parts)).outputs)


@register
@dataclass(frozen=True)
class ExpandRanks(Pass):
    """Write out all ranks of a split graph in one: AllReduce becomes additions in rank order, AllGather a Concat.

    KV buffers become one input and output a rank, named ``<name>.rank<i>``; the logits are those of rank 0, which every
    rank has. Adapter: feed the buffers of rank i to ``<name>.rank<i>``.

    Before:
        g (float[B,4] input_ids) => (logits) {
            part = MatMul (input_ids, w)
            logits = Vastai.AllReduce <ranks = 2> (part)
        }
        # meta ranks = 2
        # const "w" = PerRank((Seeded('w0', 'float', (4, 4)), Seeded('w1', 'float', (4, 4))))
    After:
        g (float[B,4] input_ids) => (logits) {
            part0 = MatMul (input_ids, w0)
            part1 = MatMul (input_ids, w1)
            logits = Add (part0, part1)
        }
        # const "w0" = Seeded('w0', 'float', (4, 4))
        # const "w1" = Seeded('w1', 'float', (4, 4))
    """

    name: ClassVar[str] = "expand-ranks"
    kind: ClassVar[Kind] = Kind.INTERFACE
    runs_after: ClassVar[tuple[str, ...]] = ("split-tp",)

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Replace the graph by that of all ranks; one rank stays as it is."""
        ranks = graph.ranks
        if ranks == 1:
            return Outcome("one rank: nothing to expand")
        before = len(graph)
        with rw.applying():
            self._expand(graph, rw, ranks)
        return Outcome(f"{ranks} ranks in one graph, {before} nodes to {len(graph)}")

    def adapter(self, before: Graph) -> Adapter:
        """Buffers of a rank go to the inputs that bear its number."""
        return Expanded(before.ranks, SHARED_INPUTS) if before.ranks > 1 else Adapter()

    def _expand(self, graph: Graph, rw: Rewriter, ranks: int) -> None:
        nodes = list(graph.nodes())
        copies: dict[Value, list[Value]] = {}
        for value in list(graph.inputs):
            shared = value.name in SHARED_INPUTS
            copies[value] = [
                value if shared else rw.add_input(f"{value.name}.rank{r}", value.type) for r in range(ranks)
            ]
        for value in graph.constants():
            if isinstance(value.const, PerRank):
                copies[value] = [
                    rw.const(value.const.rank(r), f"{value.name}.rank{r}", of=value.provenance) for r in range(ranks)
                ]
            else:
                copies[value] = [value] * ranks
        rw.set_ranks(1)
        for node in nodes:
            with rw.on_behalf_of(node):
                self._copy(node, rw, copies, ranks)
        outputs = dict(graph.outputs)
        for name, value in outputs.items():
            twins = copies[value]
            if all(t is twins[0] for t in twins) or name == "logits":
                rw.set_output(name, twins[0])
                continue
            rw.drop_output(name)
            for r, twin in enumerate(twins):
                rw.set_output(f"{name}.rank{r}", twin)
        rw.erase_dead(*nodes)
        for value in list(graph.inputs):
            if not graph.use_count(value) and value.name not in SHARED_INPUTS:
                rw.remove_input(value)
        rw.erase_unused_constants()

    def _copy(self, node: Node, rw: Rewriter, copies: dict[Value, list[Value]], ranks: int) -> None:
        columns = [None if v is None else copies[v] for v in node.inputs]
        if node.op in _EXCHANGES:
            assert columns[0] is not None
            copies[node.output] = _exchanged(node, rw, columns[0])
            return
        distinct = any(c is not None and any(v is not c[0] for v in c) for c in columns)
        made = []
        for r in range(ranks if distinct else 1):
            inputs = [None if c is None else c[r] for c in columns]
            name = f"{node.output.name}.rank{r}" if distinct else ""
            twin = rw.add(
                node.op_type, inputs, node.attributes, domain=node.domain, outputs=len(node.outputs), name=name
            )
            made.append(twin)
        for index, value in enumerate(node.outputs):
            copies[value] = [(made[r] if distinct else made[0]).outputs[index] for r in range(ranks)]

"""``vacc-opt reduce``: a graph shrinks for as long as a test finds it interesting, from thousands of nodes to a few.

Regions are cut out with onnx-graphsurgeon: what a region reads from outside becomes its inputs, what nothing in it
reads its outputs. First the end of the graph goes, then its beginning (both by halves), then runs of nodes in between
(delta debugging: Zeller & Hildebrandt 2002), then single nodes that one of their operands can stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from vacc_opt.ir import Graph, Node, Value, from_onnx, to_onnx
from vacc_opt.ir.copy import copy
from vacc_opt.ir.errors import UserError, VaccError
from vacc_opt.ir.onnx_proto import export_names
from vacc_opt.ir.provenance import Provenance
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.check.locate import Verdict, first_bad
from vacc_opt.passes.infra.debug.shrink import SMALLEST, resized, sizes, without_files

Interesting = Callable[[Graph], bool]


class Surgeon:
    """Cuts regions out of one graph, which is imported into onnx-graphsurgeon once."""

    def __init__(self, graph: Graph) -> None:
        import onnx_graphsurgeon as gs

        names = export_names(graph)
        self._names = names
        self._graph = graph
        self._whole = gs.import_onnx(to_onnx(graph, provenance=False))
        self._constants = {names[v]: v.const for v in graph.constants() if v.const is not None}
        self._sources = {names[v]: n.provenance for n in graph.nodes() for v in n.outputs if v in names}
        self._sources |= {names[v]: v.provenance for v in graph.constants() if v.provenance != Provenance()}
        self._types = {names[value]: value for value in graph.values.values()}
        self._outputs = set(graph.outputs)
        self._tensors = self._whole.tensors()

    def region(self, nodes: Iterable[Node]) -> Graph:
        """The nodes as a graph of their own, sorted, every value under its name.

        Raises:
            UserError: the region cannot stand alone.
        """
        import onnx_graphsurgeon as gs

        nodes = list(nodes)
        made = dict.fromkeys(self._names[v] for node in nodes for v in node.outputs if v in self._names)
        read = dict.fromkeys(self._names[v] for node in nodes for v in node.inputs if v is not None)
        inside = [node for node in self._whole.nodes if any(output.name in made for output in node.outputs)]
        # copies of what is kept, and of nothing else: a region costs its own size
        tensors = {name: self._tensors[name].copy() for name in (*made, *read) if name in self._tensors}
        for name, tensor in tensors.items():
            self._declare(tensor, self._types[name])
        copies = [
            node.copy(
                [tensors.get(i.name, i) for i in node.inputs], [tensors.get(o.name, o) for o in node.outputs], tensors
            )
            for node in inside
        ]
        cut = gs.Graph(
            copies,
            [tensors[name] for name in read if name not in made and name not in self._constants],
            [tensors[name] for name in made if name in self._outputs or name not in read],
            name=self._whole.name,
            opset=self._whole.opset,
            import_domains=self._whole.import_domains,
            functions=self._whole.functions,
            ir_version=self._whole.ir_version,
        )
        constants = {name: expr for name, expr in self._constants.items() if name in read}
        metadata = dict(self._graph.metadata, **({"ranks": str(self._graph.ranks)} if self._graph.ranks > 1 else {}))
        return from_onnx(gs.export_onnx(cut), constants, self._sources, metadata)

    def _declare(self, tensor: Any, value: Value) -> None:
        if tensor.dtype is None:
            tensor.dtype = value.type.dtype.onnx
        if tensor.shape is None and value.shape is not None:
            tensor.shape = [d if isinstance(d, int) else str(d) for d in value.shape]


class Reducer:
    """Shrinks ``graph`` while ``interesting`` holds; the same graph and test give the same result.

    Args:
        graph: an interesting graph; it is left as it is.
        interesting: gets a graph of its own, which it may change.
        focus: names of values near which the cause is known to be, to start from.
        say: hears every improvement as a line.
    """

    def __init__(
        self,
        graph: Graph,
        interesting: Interesting,
        *,
        focus: Sequence[str] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.graph = graph
        self.calls: int = 0
        self._interesting, self._focus, self._say = interesting, focus, say

    def run(self) -> Graph:
        """Shrink.

        Raises:
            UserError: the graph is not interesting to begin with.
        """
        if not self._holds(self.graph):
            raise UserError("the test does not find the model interesting: there is nothing to reduce")
        self._near_focus()
        self._one_side(lambda nodes, count: nodes[:count], "from the end")
        self._one_side(lambda nodes, count: nodes[len(nodes) - count :], "from the beginning")
        while self._runs() | self._bypasses():
            pass
        self._outputs()
        self._shapes()
        seeded = without_files(self.graph)
        if seeded is not None:
            self._try(seeded, "seeded weights", nodes=False)
        return self.graph

    def _holds(self, graph: Graph) -> bool:
        self.calls += 1
        return self._interesting(copy(graph))

    def _try(self, graph: Graph, what: str, *, nodes: bool = True) -> bool:
        """Take ``graph`` if it is interesting, and has fewer ``nodes`` or need not."""
        if (nodes and len(graph) >= len(self.graph)) or not self._holds(graph):
            return False
        self.graph = graph
        self._say(f"{len(graph):,} nodes, {self.calls} tries: {what}")
        return True

    def _region(self, surgeon: Surgeon, nodes: Sequence[Node], what: str) -> bool:
        try:
            region = surgeon.region(nodes)
        except VaccError:
            return False
        return bool(nodes) and self._try(region, what)

    def _near_focus(self) -> None:
        """Start from what is a few steps from the place that is known, if that is enough."""
        start = [v.producer for name in self._focus if (v := self.graph.values.get(name)) is not None]
        near = {node for node in start if node is not None}
        if not near:
            return
        surgeon, order = Surgeon(self.graph), self.graph.nodes()
        while len(near) < len(order) // 2:
            near |= {n for node in near for n in _neighbors(node)}
            if self._region(surgeon, [n for n in order if n in near], "around the place of the failure"):
                return

    def _one_side(self, part: Callable[[list[Node], int], list[Node]], what: str) -> None:
        """The smallest beginning, or end, of the graph that is still interesting, by halves."""
        surgeon, nodes = Surgeon(self.graph), self.graph.nodes()

        def test(count: int) -> Verdict:
            return Verdict.BAD if self._region(surgeon, part(nodes, count), what) else Verdict.GOOD

        first_bad(0, len(nodes), test)

    def _runs(self) -> bool:
        """Leave out runs of nodes, long ones first; True when some could be."""
        before, size = len(self.graph), max(len(self.graph) // 2, 1)
        while True:
            self._leave_out(size)
            if size == 1:
                return len(self.graph) < before
            size = max(size // 2, 1)

    def _leave_out(self, size: int) -> None:
        at = len(self.graph)
        surgeon, nodes = Surgeon(self.graph), self.graph.nodes()
        while at > 0:
            low = max(at - size, 0)
            what = f"without {at - low} in between"
            past = _jumped(self.graph, nodes[low:at])
            if self._region(surgeon, nodes[:low] + nodes[at:], what) or (past is not None and self._try(past, what)):
                surgeon, nodes = Surgeon(self.graph), self.graph.nodes()
            at = min(low, len(nodes))

    def _bypasses(self) -> bool:
        """Let an operand of the same type take the place of a node; True when that worked somewhere."""
        found = False
        for name in [node.output.name for node in reversed(self.graph.nodes())]:
            for graph in _bypassed(self.graph, name):
                if self._try(graph, "past a node"):
                    found = True
                    break
        return found

    def _outputs(self) -> None:
        for name in list(self.graph.outputs):
            if len(self.graph.outputs) > 1:
                tried = copy(self.graph)
                rw = Rewriter(tried)
                value = tried.outputs[name]
                rw.drop_output(name)
                if value.producer is not None:
                    rw.erase_dead(value.producer)
                _drop_unused_inputs(tried, rw)
                self._try(tried, f"without the output {name}", nodes=False)

    def _shapes(self) -> None:
        for size in sizes(self.graph):
            for small in (SMALLEST, size // 2):
                tried = resized(self.graph, size, small)
                if tried is not None and self._try(tried, f"{small} in place of {size}", nodes=False):
                    break


def _neighbors(node: Node) -> Iterator[Node]:
    for value in node.inputs:
        if value is not None and value.producer is not None:
            yield value.producer
    for value in node.outputs:
        yield from value.users()


def _jumped(graph: Graph, run: Sequence[Node]) -> Graph | None:
    """The graph without a run of nodes, what was computed by it taken from before it, where the types allow that."""
    inside = set(run)
    stands: dict[str, str] = {}
    for value in (v for node in run for v in node.outputs):
        if graph.is_output(value) or any(user not in inside for user in value.users()):
            earlier = _earlier(value, inside)
            if earlier is None or (graph.is_output(value) and earlier.producer is None):
                return None
            stands[value.name] = earlier.name
    tried = copy(graph)
    rw = Rewriter(tried)
    for old, new in stands.items():
        if old in tried.values and new in tried.values:
            rw.replace(tried.values[old], tried.values[new])
    _drop_unused_inputs(tried, rw)
    return tried


def _earlier(value: Value, inside: set[Node]) -> Value | None:
    """The nearest value of the same type behind ``value`` that nothing inside computes."""
    pending, seen = [value], {value}
    for one in pending:
        for operand in one.producer.inputs if one.producer is not None else ():
            if operand is None or operand.is_const or operand in seen:
                continue
            if operand.producer in inside:
                seen.add(operand)
                pending.append(operand)
            elif operand.type == value.type:
                return operand
    return None


def _bypassed(graph: Graph, name: str) -> Iterator[Graph]:
    """Graphs in which one operand, of the same type, stands for the value ``name``."""
    value = graph.values.get(name)
    node = value.producer if value is not None else None
    for position, operand in enumerate(node.inputs if node is not None else ()):
        if operand is None or value is None or operand.is_const or operand.type != value.type:
            continue
        tried = copy(graph)
        rw = Rewriter(tried)
        old = tried.values[name]
        assert old.producer is not None
        new = old.producer.inputs[position]
        assert new is not None
        if tried.is_output(old) and new.producer is None:
            continue  # an input would be an output
        rw.replace(old, new)
        _drop_unused_inputs(tried, rw)
        yield tried


def _drop_unused_inputs(graph: Graph, rw: Rewriter) -> None:
    for value in list(graph.inputs):
        if not graph.use_count(value):
            rw.remove_input(value)

"""Explain one thing of a model: kernel call, graph node, the passes that touched it, source lines, weights.

A node goes by the name of its first output, which is unique; that is how the calls of a schedule cite it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Set
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vacc_opt.backends.vacc.schedule import Call, Program
from vacc_opt.frontends import load_onnx
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.origins import name_origins
from vacc_opt.ir.provenance import Origin, Provenance
from vacc_opt.ir.storage import is_stored
from vacc_opt.ir.types import DType
from vacc_opt.ir.weights import formula
from vacc_opt.runtime.artifact import is_artifact, open_artifact
from vacc_opt.runtime.models import TEXT_SUFFIX, load_model

_CALL = re.compile(r"(?:call\s+|#)(\d+)")
_INDICES = (DType.INT64, DType.INT32, DType.BOOL)


@dataclass(frozen=True)
class CallFact:
    """A kernel call and the nodes that it implements, the one that it computes first."""

    index: int
    kernel: str
    nodes: tuple[str, ...]

    def __str__(self) -> str:
        return f"call {self.index}  {self.kernel}"


@dataclass(frozen=True)
class WeightFact:
    """A constant: the formula over tensors of the checkpoint, and who reads it."""

    name: str
    type: str
    formula: str
    passes: tuple[str, ...]
    origins: tuple[Origin, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True)
class NodeFact:
    """A node; ``becomes`` says what the schedule makes of it, empty without a schedule."""

    name: str
    op: str
    type: str
    passes: tuple[str, ...]
    origins: tuple[Origin, ...]
    calls: tuple[CallFact, ...]
    becomes: str
    weights: tuple[WeightFact, ...]


@dataclass(frozen=True)
class Explanation:
    """What was found of ``subject``; ``kind``: call, node, weight, input or module."""

    subject: str
    kind: str
    model: str
    calls: tuple[CallFact, ...]
    nodes: tuple[NodeFact, ...]
    weights: tuple[WeightFact, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        return asdict(self)


def explain(path: Path, subject: str, *, phase: str | None = None, rank: int | None = None) -> Explanation:
    """Explain a node, a value, a weight, a call (``call 17``, ``#17``) or all of a module path.

    Args:
        path: an artifact, or an .onnx or .vacc file, which has no calls.
        subject: what to explain.
        phase: of an artifact; by default the first that knows the subject.
        rank: whose weights are meant, 0 by default.

    Raises:
        UserError: no such model, phase, rank or subject; the nearest name is given.
    """
    models: list[Explainer] = []
    for model in explainers(path, phase, rank):
        found = model.find(subject)
        if found is not None:
            return found
        models.append(model)
    raise UserError(f"{path}: no {subject!r} in {', '.join(m.title for m in models)}", _hint(subject, models))


def explainers(path: Path, phase: str | None = None, rank: int | None = None) -> Iterator[Explainer]:
    """The graphs that :func:`explain` looks in, each read only when it is asked for; raises UserError as it does."""
    if path.is_file() and path.suffix in (".onnx", TEXT_SUFFIX):
        if phase is not None or (rank is not None and path.suffix == ".onnx"):
            option = "--phase" if phase is not None else "--rank"
            raise UserError(
                f"{path}: {option} chooses among the graphs of an artifact", "leave it out: this is one graph"
            )
        graph = load_model(str(path))
        name_origins(graph)  # a text may be written by hand
        yield Explainer(graph, path.name, _checked_rank(path, rank, graph.ranks))
        return
    if path.is_dir() and not is_artifact(path) and (files := sorted(p.name for p in path.glob("*.onnx"))):
        raise UserError(f"{path}: not an artifact", f"name one of its files, such as {path / files[0]}")
    if path.is_file():
        raise UserError(
            f"{path}: not an artifact, nor an .onnx or {TEXT_SUFFIX} file", "`vacc-opt opt -o` writes these"
        )
    artifact = open_artifact(path)
    rank = _checked_rank(path, rank, artifact.ranks)
    for name in (artifact.find_phase(phase).name,) if phase is not None else artifact.phases:
        program = Program.from_text(artifact.schedule(name))
        yield Explainer(load_onnx(path / f"{name}.rank{rank}.onnx"), name, rank, program)


def _checked_rank(path: Path, rank: int | None, ranks: int) -> int:
    if rank is not None and not 0 <= rank < ranks:
        raise UserError(f"{path}: has no rank {rank}", f"ranks are 0 to {ranks - 1}" if ranks > 1 else "it has one, 0")
    return rank or 0


@dataclass(frozen=True)
class Explainer:
    """A graph with what its schedule makes of it."""

    graph: Graph
    title: str
    rank: int
    program: Program | None = None

    def find(self, subject: str) -> Explanation | None:
        """The explanation of one thing, None when this graph does not have it."""
        call = _CALL.fullmatch(subject)
        if call is not None:
            return self._call(int(call[1]))
        node = self._nodes.get(subject)
        value = self.graph.values.get(subject)
        if value is not None and value.producer is not None:
            node = value.producer
        if node is not None:
            return self._made(subject, "node", [node], self._calls.get(node.output.name, ()))
        if value is not None:
            constants = [value] if value.is_const else []
            readers = [] if value.is_const else value.users()
            return self._made(subject, "weight" if value.is_const else "input", readers, (), constants)
        constants = [v for v in self.graph.constants() if any(_is_tensor(o, subject) for o in v.provenance.origins)]
        if constants:
            return self._made(subject, "weight", [], (), constants)
        return self._module(subject)

    def names(self) -> Iterator[str]:
        """Everything that :meth:`find` knows."""
        yield from self._nodes
        yield from self.graph.values
        modules = (o.module.split(".") for p in self._provenances() for o in p.origins)
        yield from dict.fromkeys(".".join(parts[: i + 1]) for parts in modules for i in range(len(parts)))

    @cached_property
    def _nodes(self) -> dict[str, Node]:
        return {node.name: node for node in self.graph.nodes() if node.name}

    @cached_property
    def _calls(self) -> dict[str, list[CallFact]]:
        found: dict[str, list[CallFact]] = {}
        for call in self.program.calls if self.program is not None else ():
            for name in call.nodes:
                found.setdefault(name, []).append(_call_fact(call))
        return found

    def _provenances(self) -> Iterator[Provenance]:
        yield from (node.provenance for node in self.graph.nodes())
        yield from (value.provenance for value in self.graph.constants())

    def _call(self, index: int) -> Explanation | None:
        if self.program is None:
            raise UserError(f"{self.title}: has no calls", "name an artifact, which holds schedules")
        if index >= len(self.program.calls):
            return None
        scheduled = self.program.calls[index]
        call = _call_fact(scheduled)
        cited = [self.graph.values.get(name) for name in call.nodes]
        nodes = [value.producer for value in cited if value is not None and value.producer is not None]
        if not nodes or len(nodes) < len(cited):
            raise UserError(f"{self.title}: call {index} does not name nodes of the graph", "compile it again")
        # of a node that takes several calls, the weights of this one: those of another call are tensors as well
        elsewhere = self.program.tensor.keys() - {one.tensor for one in scheduled.arguments}
        return self._made(f"call {index}", "call", nodes, [call], without=elsewhere)

    def _module(self, path: str) -> Explanation | None:
        nodes = [n for n in self.graph.nodes() if any(_inside(o, path) for o in n.provenance.origins)]
        constants = [
            v for v in self.graph.constants() if is_stored(v) and any(_inside(o, path) for o in v.provenance.origins)
        ]
        if not nodes and not constants:
            return None
        calls = {call.index: call for node in nodes for call in self._calls.get(node.output.name, ())}
        return self._made(path, "module", nodes, [calls[index] for index in sorted(calls)], constants)

    def _made(
        self,
        subject: str,
        kind: str,
        nodes: Iterable[Node],
        calls: Iterable[CallFact],
        constants: Iterable[Value] = (),
        without: Set[str] = frozenset(),
    ) -> Explanation:
        facts = tuple(self._node_fact(node, without) for node in nodes)
        weights = tuple(self._weight_fact(value) for value in constants)
        return Explanation(subject, kind, self._where(), tuple(calls), facts, weights)

    def _where(self) -> str:
        return f"{self.title}, rank {self.rank}" if self.graph.ranks > 1 and self.program is not None else self.title

    def _node_fact(self, node: Node, without: Set[str]) -> NodeFact:
        calls = tuple(self._calls.get(node.output.name, ()))
        types = ", ".join(str(value.type) for value in node.outputs)
        p = node.provenance
        weights = tuple(self._weight_fact(value) for value in _weights(node) if value.name not in without)
        return NodeFact(
            node.output.name, node.op, types, p.passes, p.origins, calls, self._becomes(node, calls), weights
        )

    def _becomes(self, node: Node, calls: tuple[CallFact, ...]) -> str:
        if self.program is None:
            return ""
        if any(call.nodes[0] == node.output.name for call in calls):
            return "computed"
        if calls:
            return "done inside"
        indices = all(value.type.dtype in _INDICES for value in node.outputs)
        return "run-time scalars of calls" if indices else "strides of an output"

    def _weight_fact(self, value: Value) -> WeightFact:
        assert value.const is not None
        p, const = value.provenance, value.const.rank(self.rank)
        readers = tuple(node.output.name for node in value.users())
        return WeightFact(value.name, str(const.type), formula(const), p.passes, p.origins, readers)


def _call_fact(call: Call) -> CallFact:
    return CallFact(call.index, call.kernel, call.nodes)


def _weights(node: Node) -> Iterator[Value]:
    """The stored constants that a node reads, also through a transpose of its own."""
    for value in node.inputs:
        if value is None:
            continue
        turned = value.producer
        if turned is not None and turned.op == "Transpose" and turned.inputs[0] is not None:
            value = turned.inputs[0]
        if value.is_const and is_stored(value):
            yield value


def _is_tensor(origin: Origin, name: str) -> bool:
    """Whether a weight comes from the parameter, or the tensor of a file, that is called so."""
    tensor = origin.source.partition(":")[2]  # of code it is a line
    return bool(tensor) and not tensor.isdigit() and name in (origin.module, tensor)


def _inside(origin: Origin, path: str) -> bool:
    return origin.module == path or origin.module.startswith(f"{path}.")


def _hint(subject: str, models: list[Explainer]) -> str:
    if _CALL.fullmatch(subject):
        calls = [f"0 to {len(one.program.calls) - 1} in {one.title}" for one in models if one.program is not None]
        return f"calls are {', '.join(calls)}"
    names = list(dict.fromkeys(name for model in models for name in model.names()))
    if difflib.get_close_matches(subject, names, n=1, cutoff=0.6):
        return did_you_mean(subject, names)
    return (
        "give a node, a value, a weight, a call such as `call 17`, or a module path such as `model.layers.0.self_attn`"
    )

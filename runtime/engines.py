"""Engines: ways to execute a phase for all ranks, behind one interface that holds the KV buffers.

``schedule`` executes the tiles of the schedule text on numpy, ``native`` the same tiles compiled for this machine;
``onnxruntime`` runs the exported rank graphs, cut at their collectives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.runtime.artifact import Artifact
from vacc_opt.runtime.entry_points import EntryPoint

if TYPE_CHECKING:
    from vacc_opt.backends.vacc import Program
    from vacc_opt.ir.graph import Node

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]
Caches = list[dict[str, Array]]


class Engine(ABC):
    """Executes phases of an artifact; ``caches`` are the KV buffers of each rank, written in place.

    ``tiles_executed`` counts the tile operations of all ranks so far, 0 for an engine without tiles.
    """

    name: str

    def __init__(self, artifact: Artifact, ranks: Sequence[int] | None = None) -> None:
        """``ranks`` are those that run in this process, in the order of ``caches``; all of them by default."""
        self.artifact = artifact
        self.ranks: Sequence[int] = range(artifact.ranks) if ranks is None else ranks
        self.context: int = 0
        self.caches: Caches = []
        self.take_context(artifact.context)

    def take_context(self, context: int) -> None:
        """Forget all tokens and have buffers of that many; raises UserError when no phase has such."""
        if context == self.context:
            self.reset()
            return
        first, *_ = self.artifact.entries(context)
        self.caches = _empty_caches(self.artifact, first.name, len(self.ranks))
        self.context = context

    @property
    def tiles_executed(self) -> int:
        """Tile operations of all ranks since the engine was made."""
        return 0

    def prepare(self) -> None:  # noqa: B027 - most engines have nothing to do beforehand
        """Make now what the first call of a phase would make, where that takes seconds."""

    def choose(self, logits: Array) -> int:
        """The best token of logits [V]."""
        return int(logits.argmax())

    def reset(self) -> None:
        """Forget all tokens."""
        for rank in self.caches:
            for buffer in rank.values():
                buffer[...] = 0

    def run(self, phase: str, input_ids: Ids, pos: Ids, valid: Ids) -> Array:
        """Logits [B, 1, V] at row ``valid - 1``; keys and values of ``input_ids`` [B, S] go to the buffers at ``pos``.

        Args:
            phase: a prefill (S is its length, padded on the right) or decode (S = 1) of the context at hand.
            input_ids: token ids, int64 [B, S].
            pos: tokens cached before this call, int64 [B].
            valid: tokens of this call that count, int64 [B], from 1 to S.

        Raises:
            UserError: shapes that the phase was not compiled for, or no room in the buffers.
        """
        entry = self.artifact.find_phase(phase)
        self._check(entry, input_ids, pos, valid)
        end = int(pos.max()) + input_ids.shape[1]
        if end > self.context:
            raise UserError(f"{entry.name} at {int(pos.max())} writes up to token {end}; the context is {self.context}")
        return self._run(entry.name, {"input_ids": input_ids, "pos": pos, "valid": valid})

    def _check(self, entry: EntryPoint, input_ids: Ids, pos: Ids, valid: Ids) -> None:
        phase, tokens = entry.name, entry.tokens
        if entry.context != self.context:
            raise UserError(f"{phase} has buffers of {entry.context} tokens, those at hand hold {self.context}")
        if input_ids.ndim != 2 or input_ids.shape[1] != tokens:
            raise UserError(f"{phase} takes input_ids [batch, {tokens}], not {list(input_ids.shape)}")
        if int(pos.min()) < 0:
            raise UserError(f"{phase}: pos is {int(pos.min())}, it is at least 0")
        if int(valid.min()) < 1 or int(valid.max()) > tokens:
            raise UserError(f"{phase}: valid is {valid.tolist()}, it is 1 to {tokens}")

    @abstractmethod
    def _run(self, phase: str, inputs: Mapping[str, Array]) -> Array:
        """Logits of the first rank here (all ranks have the same), buffers updated."""


class ScheduleEngine(Engine):
    """Executes the schedule text of the artifact tile by tile on numpy buffers."""

    name = "schedule"

    def __init__(self, artifact: Artifact, texts: Mapping[str, str] | None = None) -> None:
        """``texts`` may give the schedule of a phase instead of the stored one."""
        super().__init__(artifact)
        self._texts = dict(texts or {})
        self._simulators: dict[str, Any] = {}

    @property
    def tiles_executed(self) -> int:
        """Tile operations of all ranks since the engine was made."""
        return sum(simulator.tiles_executed for simulator in self._simulators.values())

    def _simulator(self, phase: str) -> Any:
        if phase not in self._simulators:
            from vacc_opt.backends.vacc import Program

            program = Program.from_text(self._texts.get(phase) or self.artifact.schedule(phase))
            weights = [self.artifact.weights(phase, rank) for rank in range(program.ranks)]
            self._simulators[phase] = self._executable(program, weights)
        return self._simulators[phase]

    def _executable(self, program: Program, weights: Sequence[Mapping[str, Array]]) -> Any:
        """What runs a program."""
        from vacc_opt.backends.vacc import ValueSimulator

        return ValueSimulator(program, weights)

    def _run(self, phase: str, inputs: Mapping[str, Array]) -> Array:
        simulator = self._simulator(phase)
        used = {tensor.name for tensor in simulator.program.of_role("input")}
        outputs = simulator.run({n: v for n, v in inputs.items() if n in used}, self.caches)
        return np.asarray(outputs["logits"])


class NativeEngine(ScheduleEngine):
    """Executes the schedule text of the artifact tile by tile as C that is compiled for this machine's CPU."""

    name = "native"

    def prepare(self) -> None:
        """Compile the phases of this context, unless the cache has them; raises UserError without a C compiler."""
        for entry in self.artifact.entries(self.context):
            self._simulator(entry.name)

    def _executable(self, program: Program, weights: Sequence[Mapping[str, Array]]) -> Any:
        from vacc_opt.backends.vacc.native import NativeProgram

        return NativeProgram(program, weights)


class OnnxRuntimeEngine(Engine):
    """Runs the ONNX files of all ranks on onnxruntime in this process, or those of one rank among others."""

    name = "onnxruntime"

    def __init__(self, artifact: Artifact, rank: int | None = None) -> None:
        """With ``rank`` only its files are opened; :meth:`exchange` then has to meet the other ranks."""
        super().__init__(artifact, None if rank is None else [rank])
        self._executables: dict[str, Any] = {}

    def exchange(self, node: Node, parts: list[Array]) -> list[Array]:
        """What each rank here gets of a collective, from their parts."""
        from vacc_opt.ir.evaluate import combine

        return combine(node, parts)

    def _executable(self, phase: str) -> Any:
        if phase not in self._executables:
            from vacc_opt.ir.evaluate import Executable

            alone = len(self.ranks) < self.artifact.ranks
            graph = self.artifact.rank_graph(phase, self.ranks[0]) if alone else self.artifact.graph(phase)
            weights = [self.artifact.weights(phase, rank) for rank in self.ranks]
            in_place = {name: _past(name) for name in graph.outputs if name.startswith("present.")}
            inner = {graph.outputs[name].name: past for name, past in in_place.items()}
            self._executables[phase] = Executable(
                graph, in_place=inner, weights=weights, ranks=self.ranks, exchange=self.exchange
            )
        return self._executables[phase]

    def _run(self, phase: str, inputs: Mapping[str, Array]) -> Array:
        executable = self._executable(phase)
        results = executable.run(inputs, self.caches)
        for caches, outputs in zip(self.caches, results, strict=True):
            for name, value in outputs.items():
                if name.startswith("present."):
                    buffer = caches[_past(name)]
                    if not np.shares_memory(buffer, value):  # an engine that could not write in place
                        buffer[...] = value
        return np.asarray(results[0]["logits"])


ENGINES: dict[str, Callable[[Artifact], Engine]] = {
    "schedule": ScheduleEngine,
    "native": NativeEngine,
    "onnxruntime": OnnxRuntimeEngine,
}


def make_engine(name: str, artifact: Artifact) -> Engine:
    """The engine of that name; raises UserError with the nearest one."""
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}", did_you_mean(name, ENGINES))
    return ENGINES[name](artifact)


def _past(present: str) -> str:
    return present.replace("present.", "past_key_values.", 1)


def _empty_caches(artifact: Artifact, phase: str, ranks: int) -> Caches:
    """Zeroed KV buffers of ``ranks`` ranks, by input name, as the interface of a phase declares them."""
    from vacc_opt.ir.types import DType

    inputs: Mapping[str, str] = artifact.manifest["phases"][phase]["inputs"]
    found: Caches = []
    for _ in range(ranks):
        buffers: dict[str, Array] = {}
        for name, declared in inputs.items():
            if name.startswith("past_key_values."):
                dtype, _, dims = declared.rstrip("]").partition("[")
                buffers[name] = np.zeros([int(d) for d in dims.split(",")], DType(dtype).numpy)
        found.append(buffers)
    return found

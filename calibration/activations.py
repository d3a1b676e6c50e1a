"""What calibration text makes of a graph, node by node: the live values of every sample, kept in memory or on disk."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir.copy import extract
from vacc_opt.ir.evaluate import Executable, read_weights
from vacc_opt.ir.graph import Graph, Node

Array = npt.NDArray[Any]
Watch = Callable[[str, Array], None]
BUDGET = 1 << 29  # bytes of values in memory; beyond, they go to files
SPILLED = "activations-"  # how the directory of these files is called


def fresh_feeds(graph: Graph, ids: npt.NDArray[np.int64]) -> dict[str, Array]:
    """Inputs of a graph before ``kv-cache`` for ids [1, n]: no past, nothing masked."""
    feeds: dict[str, Array] = {}
    for value in graph.inputs:
        if value.name == "input_ids":
            feeds[value.name] = ids
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones(ids.shape, value.type.dtype.numpy)
        elif value.name == "position_ids":
            feeds[value.name] = np.arange(ids.shape[1], dtype=np.int64)[None]
        else:
            shape = [1 if i == 0 else d if isinstance(d, int) else 0 for i, d in enumerate(value.shape or ())]
            feeds[value.name] = np.zeros(shape, value.type.dtype.numpy)
    return feeds


@dataclass(frozen=True)
class _Program:
    """Some nodes, ready to run on the values of a sample; ``replaced``: with other weights than the graph has."""

    executable: Executable
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    replaced: bool

    def run(self, values: Mapping[str, Array]) -> dict[str, Array]:
        found = self.executable.run({name: values[name] for name in self.inputs})[0]
        _give_back(values.values())
        return {name: found[name] for name in self.outputs}


class Activations:
    """The values of every sample that nodes still to run will read.

    Args:
        graph: whose nodes run, in its order.
        feeds: inputs of each sample.
        scratch: directory for what exceeds ``budget`` bytes; None: that of the system.
        threads: of onnxruntime.
        optimize: let onnxruntime rewrite the nodes, as :class:`Executable` says: turned weights are turned once.
    """

    def __init__(
        self,
        graph: Graph,
        feeds: Sequence[Mapping[str, Array]],
        scratch: Path | None,
        *,
        threads: int,
        budget: int = BUDGET,
        optimize: bool = False,
    ) -> None:
        self.graph, self.nodes = graph, graph.nodes()
        self.at = 0  # nodes before this one have run
        self.spilled = 0  # values written to files so far
        self._threads, self._budget, self._optimize = threads, budget, optimize
        self._scratch = tempfile.TemporaryDirectory(prefix=SPILLED, dir=scratch)
        self._values: list[dict[str, Array]] = [dict(one) for one in feeds]
        self._held = sum(array.nbytes for one in self._values for array in one.values())
        # the last node that reads a value
        self.last = {v.name: i for i, node in enumerate(self.nodes) for v in node.inputs if v is not None}

    def advance(
        self, end: int, weights: Mapping[str, Array], watch: Watch | None = None, names: Set[str] | None = None
    ) -> None:
        """Run the nodes up to ``end`` for good; ``weights`` take the place of constants of these names.

        ``watch`` hears every value that they compute, or those of ``names``, of every sample.
        """
        made = {v.name for node in self.nodes[self.at : end] for v in node.outputs} if watch is not None else set()
        heard = made if names is None else made & names
        if end <= self.at:
            return
        program = self._program(end, weights, heard)
        for values in self._values:
            for name, array in program.run(values).items():
                if watch is not None and name in heard:
                    watch(name, array)
                if self.last.get(name, -1) >= end:
                    values[name] = self._held_or_stored(array)
        self.at = end
        for values in self._values:
            for name in [n for n in values if self.last.get(n, -1) < self.at]:
                self._drop(values, name)

    def peek(
        self, other: Activations, end: int, names: Iterable[str], weights: Mapping[str, Array]
    ) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
        """The values ``names`` of each sample if the nodes up to ``end`` ran, here with ``weights``; nothing is kept.

        Beside them those of ``other``, which is at the same place of the same graph, with the weights as they are.
        """
        wanted = set(names)
        if wanted <= self._values[0].keys():
            for mine, theirs in zip(self._values, other._values, strict=True):
                yield {name: mine[name] for name in wanted}, {name: theirs[name] for name in wanted}
                _give_back((*mine.values(), *theirs.values()))
            return
        here = self._program(end, weights, wanted)
        # one program holds the weights of a layer once
        there = other._program(end, {}, wanted) if here.replaced else here
        for mine, theirs in zip(self._values, other._values, strict=True):
            first, second = here.run(mine), there.run(theirs)
            yield {n: {**mine, **first}[n] for n in wanted}, {n: {**theirs, **second}[n] for n in wanted}

    def _program(self, end: int, weights: Mapping[str, Array], asked: Set[str] = frozenset()) -> _Program:
        nodes: list[Node] = self.nodes[self.at : end]
        made = [v for node in nodes for v in node.outputs if v.name in asked]
        region = extract(self.graph, nodes, self.graph.name, keep=made)
        replaced = {v.name for v in region.constants()} & weights.keys()
        # read only what is not given
        given = {name: np.ascontiguousarray(weights[name], np.float32) for name in replaced}
        for name in replaced:
            region.values[name].const = None
        read = read_weights(region)[0]
        for name in replaced:
            region.values[name].const = self.graph.values[name].const
        run = Executable(region, threads=self._threads, weights=[{**read, **given}], optimize=self._optimize)
        wanted = [name for name in region.outputs if name in asked or self.last.get(name, -1) >= end]
        return _Program(run, tuple(v.name for v in region.inputs), tuple(wanted), bool(replaced))

    def _held_or_stored(self, array: Array) -> Array:
        if self._held + array.nbytes <= self._budget:
            self._held += array.nbytes
            return array
        path = Path(self._scratch.name) / f"{self.spilled}.npy"
        np.save(path, array)
        self.spilled += 1
        return np.asarray(np.load(path, mmap_mode="r"))

    def close(self) -> None:
        """Forget all values and their files."""
        self._values = []
        self._scratch.cleanup()

    def _drop(self, values: dict[str, Array], name: str) -> None:
        array = values.pop(name)
        if isinstance(array.base, np.memmap):
            assert array.base.filename is not None
            Path(array.base.filename).unlink(missing_ok=True)
        else:
            self._held -= array.nbytes


def _give_back(values: Iterable[Array]) -> None:
    """Let go of the pages of values that lie in files: they would count as memory until the next use."""
    for array in values:
        pages = getattr(array.base, "_mmap", None)
        if pages is not None:
            pages.madvise(mmap.MADV_DONTNEED)

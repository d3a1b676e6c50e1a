"""GPTQ over a model: layer after layer on what the quantized layers before it give, resumable at every step.

Memory holds the weights of the layers at hand, one Hessian an input, and the live values of the samples.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.calibration.activations import BUDGET, Activations
from vacc_opt.calibration.gptq import Inputs, Solution, Solver, solve
from vacc_opt.ir.errors import UserError, VaccError
from vacc_opt.ir.graph import Graph, Value
from vacc_opt.ir.storage import read_safetensors_header, write_safetensors
from vacc_opt.ir.tensor import Literal, TensorExpr
from vacc_opt.passes.infra.model.layers import layer_ends
from vacc_opt.passes.infra.model.linear import Linear
from vacc_opt.passes.quantize.codes_file import CODES, KEEP, MARK, SCALES, mark_of
from vacc_opt.passes.quantize.w8a16 import W8A16

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
KEPT_SHARE = 0.03
KEEP_LOSS = 1e-3  # a relative error of 3 % of the output; int8 loses 1e-5 to 1e-4 in the linears of SmolLM2


@dataclass(frozen=True)
class Options:
    """How a model is quantized.

    ``true_sequential``: within a layer, every linear sees what the quantized ones before it give; without, all linears
    of a layer see the layer as it was. ``keep_share``: at most this share of the linears stays float, those that lose
    more than ``KEEP_LOSS`` of their output's energy.
    """

    solver: Solver = field(default_factory=Solver)
    true_sequential: bool = False
    keep_share: float = KEPT_SHARE
    threads: int = 2
    budget: int = BUDGET


@dataclass(frozen=True)
class LayerResult:
    """A linear: the share of its output's energy that int8 loses, by GPTQ and by rounding; ``kept``: it stays float."""

    name: str
    shape: tuple[int, int]
    loss: float
    rounding_loss: float
    kept: bool = False


@dataclass(frozen=True)
class _Group:
    """Linears that read one value; ``at`` is the place of the first in the order of the graph."""

    x: Value
    linears: tuple[Linear, ...]
    at: int

    @property
    def names(self) -> list[str]:
        return [one.weight.name for one in self.linears]


def quantize_model(
    graph: Graph,
    feeds: Sequence[Feeds],
    out: Path,
    work: Path,
    key: str,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerResult]:
    """Solve every linear that ``w8a16`` would quantize, and write ``out`` for ``w8a16{codes=...}``.

    Args:
        graph: a recognized model of one rank, before ``kv-cache``.
        feeds: inputs of each calibration sample.
        out: safetensors file, written when all is done.
        work: directory of the steps done so far; a run with the same ``key`` continues there.
        key: digest of all that the result depends on.
        options: see :class:`Options`.
        progress: hears (linears done, all).

    Raises:
        UserError: no samples, no linear to quantize, or a weight with NaN.
        CheckError: a layer's inputs are not finite.
    """
    if not feeds:
        raise UserError("GPTQ needs at least one sequence of tokens")
    chosen = options or Options()
    stages = _stages(graph, chosen.true_sequential)
    if not stages:
        raise UserError("the graph has no linear layer to quantize")
    total = sum(len(group.linears) for stage in stages for group in stage)
    work.mkdir(parents=True, exist_ok=True)
    with _Run(graph, feeds, work, key, chosen, int(chosen.keep_share * total)) as run:
        results: list[LayerResult] = []
        for stage in stages:
            for result in run.stage(stage):
                results.append(result)
                if progress is not None:
                    progress(len(results), total)
        _write(out, run, results)
    return results


class _Run:
    """The state of a run: what was solved, and the activations behind it, of the quantized and of the float model."""

    def __init__(
        self, graph: Graph, feeds: Sequence[Feeds], work: Path, key: str, options: Options, may_stay: int
    ) -> None:
        self.graph, self.work, self.key, self.options, self.may_stay = graph, work, key, options, may_stay
        self.quantized, self.exact = (
            Activations(graph, feeds, work, threads=options.threads, budget=options.budget // 2) for _ in range(2)
        )
        self.files: dict[str, Path] = {}
        self.rows: dict[str, TensorExpr] = {}

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.quantized.close()
        self.exact.close()

    def stage(self, stage: Sequence[_Group]) -> Iterator[LayerResult]:
        """Solve groups that see the same state of the model."""
        done = _Dequantized(self)
        self.quantized.advance(stage[0].at, done)
        self.exact.advance(stage[0].at, {})
        missing = [group for group in stage if any(not self._file(name).is_file() for name in group.names)]
        seen = self._seen(missing, done) if missing else {}
        for group in stage:
            inputs = seen.pop(group.x.name, None)
            for linear in group.linears:
                if linear.weight.name not in self.rows:  # layers may share a weight: the first one decides
                    yield self._solved(linear, inputs, last=linear is group.linears[-1])

    def _solved(self, linear: Linear, seen: Inputs | None, *, last: bool) -> LayerResult:
        name = linear.weight.name
        self.rows[name] = linear.rows
        file = self._file(name)
        if not file.is_file():
            assert seen is not None
            weight = np.asarray(linear.rows.read(), np.float32)
            try:
                self._store(file, solve(weight, seen, self.options.solver, last=last))
            except VaccError as error:
                raise type(error)(f"weight {name}: {error.message}", error.hint) from error
        loss, rounding_loss = map(float, read_safetensors_header(file)["losses"].read())
        kept = loss > KEEP_LOSS and self.may_stay > 0
        if kept:
            self.may_stay -= 1
        else:
            self.files[name] = file
        return LayerResult(name, (linear.out_features, linear.in_features), loss, rounding_loss, kept)

    def _seen(self, groups: Sequence[_Group], done: Mapping[str, Array]) -> dict[str, Inputs]:
        """The inputs of each group; all but those of the first come from this layer before it is quantized."""
        found = {g.x.name: Inputs(g.linears[0].in_features, self.options.solver.device) for g in groups}
        end = max(g.at for g in groups)
        for values, right in self.quantized.peek(self.exact, end, found, done):
            for name, seen in found.items():
                seen.add(values[name], right[name])
        return found

    def _file(self, name: str) -> Path:
        digest = hashlib.sha256(f"{self.key} {name}".encode()).hexdigest()[:24]
        return self.work / f"{digest}.safetensors"

    def _store(self, path: Path, solution: Solution) -> None:
        scratch = path.with_suffix(".tmp")
        losses = np.array([solution.loss, solution.rounding_loss], np.float64)
        tensors = {"codes": solution.codes, "scales": solution.scales, "losses": losses}
        write_safetensors(scratch, {n: Literal(a) for n, a in tensors.items()})
        os.replace(scratch, path)

    def weight(self, name: str) -> Array:
        """The solved weight as the graph holds it, [N, K] or its transpose."""
        parts = read_safetensors_header(self.files[name])
        rows = parts["codes"].read().astype(np.float32) * parts["scales"].read()[:, None]
        return rows if self.graph.values[name].shape == rows.shape and not self._flipped(name) else rows.T

    def _flipped(self, name: str) -> bool:
        return self.graph.values[name].const != self.rows[name]


class _Dequantized(Mapping[str, Array]):
    """Weights that were solved, read when asked for."""

    def __init__(self, run: _Run) -> None:
        self._run = run

    def __getitem__(self, name: str) -> Array:
        return self._run.weight(name)

    def __iter__(self) -> Any:
        return iter(self._run.files)

    def __len__(self) -> int:
        return len(self._run.files)


def _stages(graph: Graph, sequential: bool) -> list[list[_Group]]:
    """Groups that are solved together, in order: one at a time, or all of a layer."""
    place = {node: i for i, node in enumerate(graph.nodes())}
    by_x: dict[Value, list[Linear]] = {}
    for linear, reason in W8A16().candidates(graph):
        if not reason:
            by_x.setdefault(linear.x, []).append(linear)
    groups = [_Group(x, tuple(found), min(place[one.node] for one in found)) for x, found in by_x.items()]
    groups.sort(key=lambda group: group.at)
    if sequential:
        return [[group] for group in groups]
    ends = [place[v.producer] for v in layer_ends(graph) if v is not None and v.producer is not None]
    stages: dict[int, list[_Group]] = {}
    for group in groups:
        stages.setdefault(sum(end < group.at for end in ends), []).append(group)
    return [stages[layer] for layer in sorted(stages)]


def _write(out: Path, run: _Run, results: Sequence[LayerResult]) -> None:
    tensors: dict[str, TensorExpr] = {}
    for one in results:
        tensors[one.name + MARK] = Literal(mark_of(run.rows[one.name]))
        if one.kept:
            tensors[one.name + KEEP] = Literal(np.ones(1, np.int8))
            continue
        parts = read_safetensors_header(run.files[one.name])
        tensors[one.name + CODES], tensors[one.name + SCALES] = parts["codes"], parts["scales"]
    scratch = out.with_name(out.name + ".tmp")
    write_safetensors(scratch, tensors)
    os.replace(scratch, out)

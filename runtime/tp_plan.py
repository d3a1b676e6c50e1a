"""What a split over N ranks would hold and exchange: one export, then the passes of `compile` on a copy for each N.

Nothing is estimated: heads, bytes and collectives are read off the graphs that ``split-tp`` makes, whose weights are
expressions that know their size. No weight is read; an int8 cache is planned with scales that are made up.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from vacc_opt.ir import ops
from vacc_opt.ir.copy import copy
from vacc_opt.ir.errors import UserError, VaccError
from vacc_opt.ir.graph import Graph
from vacc_opt.ir.tensor import TensorExpr
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.model.attention import attentions
from vacc_opt.passes.shard.block import attention_block
from vacc_opt.runtime.artifact import PhaseModel, merge_weights
from vacc_opt.runtime.measure import cache_bytes, padded_elements
from vacc_opt.runtime.models import load_model
from vacc_opt.runtime.plan import SCALES_FILE, Plan, plan_compilation


@dataclass(frozen=True)
class Heads:
    """Heads a rank of one attention structure; of all ranks together, padded ones and KV heads held once more."""

    query: int
    kv: int
    padded_query: int
    padded_kv: int
    replicated_kv: int

    def __str__(self) -> str:
        notes = [f"{self.padded_query} padded"] if self.padded_query else []
        notes += [f"{self.padded_kv} KV padded"] if self.padded_kv else []
        notes += [f"{self.replicated_kv} KV copies"] if self.replicated_kv else []
        return f"{self.query} + {self.kv}" + (f" ({', '.join(notes)})" if notes else "")


@dataclass(frozen=True)
class Traffic:
    """The collectives of one call of a phase: how many of each kind, and the bytes that a rank gives to them."""

    phase: str
    collectives: dict[str, int]
    bytes: int


@dataclass(frozen=True)
class Row:
    """One number of ranks; bytes of weights and of the KV cache are those of one rank.

    ``padding`` and ``replicated`` are bytes of all ranks together: zeros that fill up heads, channels and vocabulary,
    and what more than one rank holds. ``reason`` says why a split is not possible; then there is nothing else.
    """

    tp: int
    heads: tuple[Heads, ...] = ()
    weights: int = 0
    kv_cache: int = 0
    padding: int = 0
    replicated: int = 0
    traffic: tuple[Traffic, ...] = ()
    reason: str | None = None

    @property
    def waste(self) -> float:
        """Padding as a share of everything that the ranks hold."""
        held = (self.weights + self.kv_cache) * self.tp
        return self.padding / held if held else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        if self.reason is not None:
            return {"tp": self.tp, "reason": self.reason}
        found = asdict(self)
        del found["reason"]
        return {**found, "waste": round(self.waste, 6)}


def parse_ranks(text: str) -> tuple[int, ...]:
    """The numbers of ``1,2,4``, as given; raises UserError for what is no list of them.

    >>> parse_ranks("1,2,4")
    (1, 2, 4)
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = next((part for part in parts if not part.isdecimal() or int(part) < 1), None)
    if wrong is not None:
        raise UserError(f"--tp: {wrong!r} is no number of ranks", "give numbers from 1 on: --tp 1,2,4")
    return tuple(dict.fromkeys(map(int, parts)))


def tp_plan(
    file: Path, ranks: Sequence[int], overrides: Sequence[str] = (), progress: Callable[[str], None] = lambda text: None
) -> Iterator[Row]:
    """A row for each number of ranks, in the order given, for the model and the precision that the YAML names.

    Raises:
        UserError: the configuration or the checkpoint cannot be used.
    """
    plan = plan_compilation(file, [*overrides, "frontend.model_kwargs.tp=1"])
    graph = quantized_graph(plan, progress)
    whole = sum(expr.nbytes for expr in _stored(split_graph(graph, plan, 1)[1], 0).values())
    for tp in ranks:
        progress(f"tp {tp}")
        try:
            yield _row(*split_graph(graph, plan, tp), whole, graph)
        except VaccError as error:
            hint = f" ({error.hint})" if error.hint else ""
            yield Row(tp, reason=f"{error.message.removeprefix('split-tp: ')}{hint}")


def quantized_graph(plan: Plan, progress: Callable[[str], None] = lambda text: None) -> Graph:
    """The model of a plan before it is split, without calibration: codes are rounded, scales of a cache made up."""
    frontend = plan.config.frontend
    graph = load_model(
        frontend.checkpoint,
        attention=frontend.attention,
        trust_remote_code=frontend.trust_remote_code,
        progress=progress,
    )
    progress("recognize")
    run_pipeline(graph, f"{plan.recognize},{plan.interface}")
    with tempfile.TemporaryDirectory(prefix="vacc-opt-") as scratch:
        quantize = plan.quantize(str(_any_scales(graph, Path(scratch))))
        if quantize:
            run_pipeline(graph, quantize)
    return graph


def split_graph(graph: Graph, plan: Plan, tp: int) -> tuple[Graph, dict[str, Graph]]:
    """The quantized graph split as `compile` does it, and its phases; ``graph`` itself stays."""
    split = copy(graph)
    run_pipeline(split, replace(plan, tp=tp).split)
    run_pipeline(split, plan.specialize)
    return split, split.phases


def _any_scales(graph: Graph, folder: Path) -> Path:
    """A file of scales in the place of calibrated ones; no two are equal, or passes would make one of them."""
    from vacc_opt.calibration.kv_scales import KvScales, ScaleZero

    found: dict[tuple[int, str], ScaleZero] = {}
    for value in graph.inputs:
        if value.name.startswith("past_key_values."):
            _, layer, part = value.name.split(".")
            _, heads, _, width = value.shape or ()
            both = (np.full([int(str(heads)), int(str(width))], 2 * len(found) + n, np.float32) for n in (1, 2))
            found[int(layer), part] = ScaleZero(*both)
    KvScales(found).save(folder / SCALES_FILE)
    return folder / SCALES_FILE


def _row(graph: Graph, phases: dict[str, Graph], whole: int, before: Graph) -> Row:
    tp = graph.ranks
    first = next(iter(phases.values()))
    stored = [expr for rank in range(tp) for expr in _stored(phases, rank).values()]
    weights, cache = sum(expr.nbytes for expr in stored), cache_bytes(first).stored
    heads = _heads(graph, before)
    padded = sum(padded_elements(expr) * expr.dtype.bits // 8 for expr in stored)
    copies = weights - whole - padded
    for structure in heads:
        one_head = cache // (structure.kv * tp) // len(heads)
        padded += structure.padded_kv * one_head
        copies += structure.replicated_kv * one_head
    return Row(
        tp=tp,
        heads=heads,
        weights=weights // tp,
        kv_cache=cache // tp,
        padding=padded,
        replicated=copies,
        traffic=tuple(_traffic(name, phase) for name, phase in phases.items()),
    )


def _stored(phases: dict[str, Graph], rank: int) -> dict[str, TensorExpr]:
    """What the file of a rank will hold, but for small constants that a schedule may take from there."""
    stored: dict[str, TensorExpr] = {}
    for name, phase in phases.items():
        merge_weights(stored, PhaseModel(name, phase, "", ()), rank)
    return stored


def _heads(graph: Graph, before: Graph) -> tuple[Heads, ...]:
    """Of each structure among the attentions, as it stands in the split graph."""
    found: dict[Heads, None] = {}
    for node, old in zip(attentions(graph), attentions(before), strict=True):
        block, whole = attention_block(node), attention_block(old)
        (query, kv), tp = block.heads, graph.ranks
        key = block.key.weight.const
        assert key is not None
        a_head = prod(key.rank(0).shape) // kv
        padded_kv = sum(padded_elements(key.rank(r)) for r in range(tp)) // a_head
        copies = kv * tp - padded_kv - whole.heads[1]
        found[Heads(query, kv, query * tp - whole.heads[0], padded_kv, copies)] = None
    return tuple(found)


def _traffic(name: str, phase: Graph) -> Traffic:
    kinds: Counter[str] = Counter()
    given = 0
    for node in phase.nodes():
        op = ops.get(node.op_type) if node.domain == ops.DOMAIN else None
        if op is None or not op.is_collective:
            continue
        part = node.inputs[0]
        assert part is not None
        kinds[op.name] += 1
        given += prod(part.type.static_shape or ()) * part.type.dtype.itemsize
    return Traffic(name, dict(sorted(kinds.items())), given)

"""Scales of the int8 KV cache: the range of every (kv head, channel) of every layer, observed on text.

``q = clip(rint((x - zero) / scale), -127, 127)``, keys after rotary. Asymmetric: 254 steps from the smallest to the
largest value seen. Symmetric: zero is 0 and 127 steps reach the largest magnitude. A channel that never changes gets
scale 1, with its value as zero, and is exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.calibration.activations import Activations, fresh_feeds
from vacc_opt.calibration.rotary_envelope import Rotary
from vacc_opt.ir.copy import extract
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.storage import read_safetensors_header, write_safetensors
from vacc_opt.ir.tensor import Literal
from vacc_opt.ir.types import DType

Array = npt.NDArray[np.float32]
_PRESENT = re.compile(r"present\.(\d+)\.(key|value)")
_STEPS_ASYMMETRIC, _STEPS_SYMMETRIC = 254, 127
_BUDGET = 256 << 20  # bytes of the values of all sequences that stay in memory
_WEIGHTS = 256 << 20  # bytes of weights that are read at once, unless one of them is larger
_ROWS = 4096  # of an embedding that are read at once
_SMALL = 1 << 20  # bytes of a constant that is no weight


@dataclass(frozen=True)
class Range:
    """Smallest and largest value seen, each [kv heads, head dim] float32."""

    low: Array
    high: Array

    def include(self, other: Range) -> Range:
        """The range of both."""
        return Range(np.minimum(self.low, other.low), np.maximum(self.high, other.high))


@dataclass(frozen=True)
class ScaleZero:
    """Scale and float zero point of a cache, each [kv heads, head dim] float32."""

    scale: Array
    zero: Array


@dataclass(frozen=True)
class KvScales:
    """Scales of all layers: ``tensors[(layer, "key" | "value")]``."""

    tensors: dict[tuple[int, str], ScaleZero]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.tensors) // 2

    def save(self, path: Path) -> None:
        """Write ``layers.{i}.{key|value}.{scale|zero}`` as safetensors; equal scales give equal bytes."""
        literals: dict[str, Literal] = {}
        for (layer, part), found in self.tensors.items():
            literals[f"layers.{layer}.{part}.scale"] = Literal(found.scale)
            literals[f"layers.{layer}.{part}.zero"] = Literal(found.zero)
        write_safetensors(path, literals)


def load_kv_scales(path: Path) -> KvScales:
    """Read what :meth:`KvScales.save` wrote.

    Raises:
        UserError: the file is missing, damaged, lacks a tensor, or a scale is not a positive number.
    """
    sources = read_safetensors_header(path)
    found: dict[tuple[int, str], ScaleZero] = {}
    layers = sorted({int(m[1]) for m in map(re.compile(r"layers\.(\d+)\.").match, sources) if m})
    if not layers:
        raise UserError(f"{path}: holds no `layers.0.key.scale`", "it is not a file of KV scales")
    for layer in layers:
        for part in ("key", "value"):
            names = [f"layers.{layer}.{part}.{kind}" for kind in ("scale", "zero")]
            for name in names:
                if name not in sources:
                    raise UserError(f"{path}: no tensor {name}")
                if sources[name].dtype is not DType.FLOAT:
                    raise UserError(f"{path}: {name} is {sources[name].dtype.value}, not float")
            scale, zero = (sources[name].read() for name in names)
            if not (np.isfinite(scale).all() and np.isfinite(zero).all() and (scale > 0).all()):
                raise UserError(f"{path}: {names[0]}: a scale is not a positive number")
            found[layer, part] = ScaleZero(scale, zero)
    return KvScales(found)


def scales_of(seen: Range, *, symmetric: bool = False) -> ScaleZero:
    """Scale and zero of a range, computed in fp32; a channel without extent gets scale 1."""
    if symmetric:
        largest = np.maximum(np.abs(seen.low), np.abs(seen.high))
        scale = (largest / np.float32(_STEPS_SYMMETRIC)).astype(np.float32)
        zero = np.zeros_like(scale)
    else:
        # half of each bound before the sum: their sum or difference may exceed the fp32 range
        half = (seen.high / np.float32(2) - seen.low / np.float32(2)).astype(np.float32)
        scale = (half / np.float32(_STEPS_ASYMMETRIC / 2)).astype(np.float32)
        zero = (seen.high / np.float32(2) + seen.low / np.float32(2)).astype(np.float32)
    return ScaleZero(np.where(scale == 0, np.float32(1), scale).astype(np.float32), zero)


def calibrate_kv(
    graph: Graph,
    sequences: Sequence[npt.NDArray[np.int64]],
    *,
    symmetric: bool = False,
    envelope: bool = True,
    threads: int = 2,
    scratch: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> KvScales:
    """Observe the keys and values of ``graph`` over token sequences [1, n] and give their scales.

    The graph is one before ``kv-cache``: inputs input_ids, attention_mask, position_ids and empty pasts, outputs
    ``present.{i}.key|value`` [1, kv heads, n, head dim], keys after rotary. With ``envelope`` the range of a key is
    what it has at any position of the rotary tables, else where it was seen. Parts of layers run one after the
    other over all sequences, so that memory holds the weights of one; values that are too many go to files in
    ``scratch``. ``progress`` hears (parts done, all).

    Raises:
        UserError: no sequences, or the graph has no such outputs.
        CheckError: the model gives NaN or infinity.
    """
    if not sequences:
        raise UserError("calibration needs at least one sequence of tokens")
    names = {name: value for name, value in graph.outputs.items() if _PRESENT.fullmatch(name)}
    if not names:
        raise UserError("the graph has no outputs present.0.key, ...", "calibrate before `kv-cache`")
    turned = {name: rotary for name, value in names.items() if envelope and (rotary := Rotary.behind(_new(value)))}
    model = _caches_only(graph, [*names.values(), *(rotary.before for rotary in turned.values())])
    # one value may be the cache of several layers
    watched: dict[str, list[str]] = {}
    for name, value in names.items():
        watched.setdefault(turned[name].before.name if name in turned else value.name, []).append(name)
    seen: dict[str, Range] = {}

    def watch(source: str, array: npt.NDArray[Any]) -> None:
        for name in watched[source]:
            one = _finite(Range(*turned[name].extent(array)) if name in turned else _range(array), name)
            seen[name] = seen[name].include(one) if name in seen else one

    feeds = [fresh_feeds(model, ids) for ids in _used_rows(model, sequences)]
    live = Activations(model, feeds, scratch, threads=threads, budget=_BUDGET, optimize=True)
    try:
        ends = _ends(live, watched)
        for done, end in enumerate(ends, 1):
            live.advance(end, {}, watch, watched.keys())
            if progress is not None:
                progress(done, len(ends))
    finally:
        live.close()
    scales: dict[tuple[int, str], ScaleZero] = {}
    for name, extent in sorted(seen.items()):
        match = _PRESENT.fullmatch(name)
        assert match is not None
        scales[int(match[1]), match[2]] = scales_of(extent, symmetric=symmetric)
    return KvScales(dict(sorted(scales.items())))


def _ends(live: Activations, watched: Mapping[str, Sequence[str]]) -> list[int]:
    """Places in the order of nodes: behind what is watched of each layer, and before weights that are too many at once.

    What is made of weights alone stays with the node that reads it: it is as large as they are.
    """
    place = {v.name: index for index, node in enumerate(live.nodes, 1) for v in node.outputs}
    layers: dict[str, int] = {}
    for source, names in watched.items():
        for name in names:
            layer = name.rpartition(".")[0]
            layers[layer] = max(layers.get(layer, 0), place[source])
    ends, held, needed = set(layers.values()), 0, 0
    constant: set[Value] = set()  # values made of large weights alone
    for index, node in enumerate(live.nodes):
        given = [v for v in node.inputs if v is not None]
        own = sum(v.const.nbytes for v in given if v.const is not None)
        if index in ends:
            held = 0
        elif held and held + own > _WEIGHTS and index >= needed:
            ends.add(index)
            held = 0
        held += own
        if all(v.const is not None or v in constant for v in given) and (own > _SMALL or constant & set(given)):
            constant.update(node.outputs)
            needed = max(needed, *(live.last.get(v.name, index) + 1 for v in node.outputs))
    return sorted(ends)


def _caches_only(graph: Graph, caches: Iterable[Value]) -> Graph:
    """The part that computes the caches: without lm_head, whose weights and logits would be the largest of all."""
    wanted = list(caches)
    nodes: dict[Node, None] = {}
    pending = [v.producer for v in wanted if v.producer is not None]
    while pending:
        node = pending.pop()
        if node not in nodes:
            nodes[node] = None
            pending += [v.producer for v in node.inputs if v is not None and v.producer is not None]
    return extract(graph, nodes, f"{graph.name}.caches", keep=wanted)


def _used_rows(model: Graph, sequences: Sequence[npt.NDArray[np.int64]]) -> Sequence[npt.NDArray[np.int64]]:
    """Keep the rows of the embedding, the largest weight of all, that the tokens take; gives the tokens as its rows."""
    ids = next((value for value in model.inputs if value.name == "input_ids"), None)
    readers = [node for node in ids.users() if node.op != "Shape"] if ids is not None else []
    tables = [node.inputs[0] for node in readers]
    lookups = all(node.op == "Gather" and not node.attributes.get("axis") for node in readers)
    if not lookups or any(table is None or table.const is None for table in tables):
        return sequences
    used = np.unique(np.concatenate([one.reshape(-1) for one in sequences]))
    rw = Rewriter(model, by="calibrate")
    for node, table in zip(readers, tables, strict=True):
        assert table is not None
        assert table.const is not None
        count, *rest = table.const.shape
        rows = []
        for first in range(0, count, _ROWS):
            block = slice(first, min(first + _ROWS, count))
            inside = used[(used >= block.start) & (used < block.stop)] - first
            if len(inside):
                rows.append(table.const.read([block, *(slice(0, size) for size in rest)])[inside])
        rw.set_input(node, 0, rw.const(np.concatenate(rows), "rows", of=table.provenance))
    return [np.searchsorted(used, one) for one in sequences]


def _new(present: Value) -> Value | None:
    """The tokens of this call that a cache is made of: joined with the past, or all of it."""
    node = present.producer
    joined = node is not None and node.op == "Concat" and len(node.inputs) == 2
    return node.inputs[1] if node is not None and joined else present


def _range(values: npt.NDArray[Any]) -> Range:
    """Range over batch and tokens of [1, kv heads, n, head dim]."""
    return Range(values.min(axis=(0, 2)).astype(np.float32), values.max(axis=(0, 2)).astype(np.float32))


def _finite(found: Range, name: str) -> Range:
    if not (np.isfinite(found.low).all() and np.isfinite(found.high).all()):
        raise CheckError(f"calibration: {name} holds NaN or infinity", "the checkpoint may be damaged")
    return found

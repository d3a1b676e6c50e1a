"""What can be evaluated: a graph or an artifact that turns a window of tokens into logits and into signals of layers.

A graph is measured as it stands but for two things: lm_head reads all tokens of a call instead of the last one, and the
signals become outputs. What it computes of a token is what it computes in use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.calibration.activations import fresh_feeds
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.model.attention import attentions
from vacc_opt.passes.infra.model.layers import layer_ends
from vacc_opt.runtime.engines import Engine
from vacc_opt.runtime.entry_points import DECODE

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]
Weights = Sequence[Mapping[str, Array]]
RESIDUAL, ATTENTION = "residual", "attention"
_SIGNAL = "signal"
_DECODED_TOGETHER = 8  # windows, one a row: every step then reads the weights once for all of them


@dataclass(frozen=True)
class Observed:
    """Of a window of n tokens: logits [n, vocabulary], and each signal of each layer, [n, numbers] float32."""

    logits: Array
    signals: Mapping[tuple[int, str], Array] = field(default_factory=dict)


class Subject(ABC):
    """A model that can be shown windows of tokens; every window starts without a past.

    ``name`` says what it is, ``chunk`` how many tokens a call takes (0: the whole window), ``rows`` how many windows it
    likes to see at once, ``capacity`` how many tokens a window may have (None: any number).
    """

    name: str
    chunk: int = 0
    rows: int = 1
    capacity: int | None = None

    @abstractmethod
    def observe(self, windows: Sequence[Ids], *, signals: bool = True) -> Iterator[Observed]:
        """Logits, and if asked for signals, of windows [n] of token ids, all of one n, at most ``capacity``."""


class GrowingSubject(Subject):
    """A graph before ``kv-cache``: the window is one call without a past."""

    def __init__(self, name: str, graph: Graph, *, threads: int = 1, weights: Weights | None = None) -> None:
        """``weights`` are already read ones of each rank, by name."""
        self.name = name
        self._executable = Executable(_exposed(graph), threads=threads, weights=weights)

    def observe(self, windows: Sequence[Ids], *, signals: bool = True) -> Iterator[Observed]:
        """A call a window."""
        for ids in windows:
            outputs = self._executable.run(fresh_feeds(self._executable.graph, ids[None]))[0]
            yield Observed(outputs["logits"][0], _signals([outputs], [len(ids)]) if signals else {})


class BufferedSubject(Subject):
    """A graph after ``kv-cache``, of all its ranks: windows go through its buffers call by call, a row each.

    Args:
        name: what it is called.
        graph: with symbolic sizes or with those of a phase.
        chunk: tokens of a call; a graph of fixed sizes has one. Default: the whole window.
        threads: of onnxruntime.
        weights: already read weights of each rank.
    """

    def __init__(
        self,
        name: str,
        graph: Graph,
        *,
        chunk: int = 0,
        threads: int = 1,
        weights: Weights | None = None,
    ) -> None:
        self.name, self.chunk = name, chunk
        ids = graph.input_named("input_ids")
        batch, fixed = ids.shape if ids is not None and ids.shape is not None else (None, None)
        self._fixed = isinstance(fixed, int)
        if isinstance(fixed, int):
            if chunk not in (0, fixed):
                raise UserError(f"{name}: a call takes {fixed} tokens, not {chunk}")
            self.chunk = fixed
        self.rows = _DECODED_TOGETHER if self.chunk == 1 and not isinstance(batch, int) else 1
        self._buffers: dict[str, tuple[list[int], npt.DTypeLike]] = {}
        for value in (v for v in graph.inputs if v.name.startswith("past_key_values.")):
            shape = [d for d in (value.shape or ())[1:] if isinstance(d, int)]
            if 1 + len(shape) != value.rank:
                raise UserError(f"{name}: the buffers have no fixed size", "evaluate a graph before or after kv-cache")
            self._buffers[value.name] = shape, value.type.dtype.numpy
        self.capacity = min((shape[1] for shape, _ in self._buffers.values()), default=None)
        presents = {name: name.replace("present.", "past_key_values.", 1) for name in graph.outputs}
        self._presents = {name: past for name, past in presents.items() if past in self._buffers}
        in_place = {graph.outputs[name].name: past for name, past in self._presents.items()}
        self._executable = Executable(_exposed(graph), threads=threads, in_place=in_place, weights=weights)

    def observe(self, windows: Sequence[Ids], *, signals: bool = True) -> Iterator[Observed]:
        """Call by call, ``rows`` windows in each; a last call that is not full is padded on the right."""
        for low in range(0, len(windows), self.rows):
            yield from self._together(np.stack(windows[low : low + self.rows]), signals)

    def _together(self, ids: Ids, signals: bool) -> Iterator[Observed]:
        """Windows [rows, n] in the same calls."""
        rows, length = ids.shape
        caches = [self._empty(rows) for _ in range(self._executable.graph.ranks)]
        chunk = self.chunk if self._fixed else min(self.chunk or length, length)
        calls: list[dict[str, Array]] = []
        counts: list[int] = []
        starts = [*range(0, length - chunk + 1, chunk)]
        rest = len(starts) * chunk
        if rest < length:
            # the last call may not write past the buffers: it starts earlier, and computes some tokens again
            starts.append(min(rest, (self.capacity or length) - chunk) if self.capacity else rest)
        done = 0
        for start in starts:
            part = ids[:, start : start + chunk]
            count = part.shape[1]
            padded = np.zeros((rows, chunk), np.int64)
            padded[:, :count] = part
            each = np.ones(rows, np.int64)
            feeds = {"input_ids": padded, "pos": each * start, "valid": each * count}
            used = {v.name for v in self._executable.graph.inputs}
            results = self._executable.run({n: v for n, v in feeds.items() if n in used}, caches)
            self._keep(results, caches)
            fresh, wanted = slice(done - start, count), results[0].items()
            calls.append(
                {n: v[..., fresh, :] for n, v in wanted if n == "logits" or (signals and n.startswith(f"{_SIGNAL}."))}
            )
            counts.append(count - (done - start))
            done = start + count
        for row in range(rows):
            logits = np.concatenate([call["logits"][row] for call in calls])
            yield Observed(logits, _signals(calls, counts, row))

    def _empty(self, rows: int) -> dict[str, Array]:
        return {name: np.zeros([rows, *shape], dtype) for name, (shape, dtype) in self._buffers.items()}

    def _keep(self, results: list[dict[str, Array]], caches: list[dict[str, Array]]) -> None:
        for outputs, cache in zip(results, caches, strict=True):
            for name, past in self._presents.items():
                if not np.shares_memory(cache[past], outputs[name]):
                    cache[past] = outputs[name]


class EngineSubject(Subject):
    """An artifact on one of its engines, token by token: logits only, since the phases compute those of one token."""

    chunk = 1

    def __init__(self, name: str, engine: Engine) -> None:
        entries = engine.artifact.entries(engine.context)
        decode = next((one.name for one in entries if one.kind == DECODE), None)
        if decode is None:
            raise UserError(f"{name}: has no decode phase", "compile it with a decode context")
        self.name, self.capacity = name, engine.context
        self._engine, self._decode = engine, decode

    def observe(self, windows: Sequence[Ids], *, signals: bool = True) -> Iterator[Observed]:
        """One decode call a token."""
        one = np.ones(1, np.int64)
        for ids in windows:
            self._engine.reset()
            rows = [
                self._engine.run(self._decode, one[None] * token, one * pos, one)[0, -1]
                for pos, token in enumerate(ids)
            ]
            yield Observed(np.stack(rows))


def _exposed(graph: Graph) -> Graph:
    """The graph, changed in place: all tokens reach lm_head, and the signals of the layers are outputs."""
    if "logits" not in graph.outputs:
        raise UserError(f"{graph.name}: no output 'logits'", f"it has {', '.join(graph.outputs)}"[:200])
    rw = Rewriter(graph, by="eval")
    with rw.applying():
        _read_all_tokens(graph, rw)
        for (layer, kind), value in layer_signals(graph).items():
            rw.set_output(f"{_SIGNAL}.{layer}.{kind}", _tokens_second(graph, rw, value))
    return graph


def _tokens_second(graph: Graph, rw: Rewriter, value: Value) -> Value:
    """The value as [batch, ...]: some models work on [tokens, batch, channels]."""
    ids = graph.input_named("input_ids")
    batch, tokens = ids.shape if ids is not None and ids.shape is not None else (None, None)
    turned = value.rank == 3 and value.shape is not None and value.shape[:2] == (tokens, batch) and batch != tokens
    return rw.op.Transpose(value, perm=(1, 0, 2)) if turned else value


def _read_all_tokens(graph: Graph, rw: Rewriter) -> None:
    """Undo ``slice-last-token``: lm_head reads the rows that the gather took one of."""
    for gather in graph.by_op("GatherND"):
        rows = gather.inputs[0]
        if gather.attributes.get("batch_dims") != 1 or rows is None or not _depends_on(gather, "valid"):
            continue
        for picked in gather.output.users():
            for node, position in list(picked.output.uses):
                rw.set_input(node, position, rows)
        rw.infer_again()
        return


def _depends_on(gather: Node, name: str) -> bool:
    value = gather.inputs[1]
    while value is not None and value.producer is not None:
        value = next((v for v in value.producer.inputs if v is not None and not v.is_const), None)
    return value is not None and value.name == name


def layer_signals(graph: Graph) -> dict[tuple[int, str], Value]:
    """What is compared of layer i: the residual stream behind it, and on one rank what its attention gives."""
    found: dict[tuple[int, str], Value] = {}
    for index, (node, stream) in enumerate(zip(attentions(graph), layer_ends(graph), strict=True)):
        if graph.ranks == 1:
            found[index, ATTENTION] = node.output
        if stream is not None and stream not in found.values():
            found[index, RESIDUAL] = stream
    return found


def _signals(calls: list[dict[str, Array]], counts: list[int], row: int = 0) -> dict[tuple[int, str], Array]:
    """The signals of a row of all calls, tokens first: [n, numbers]."""
    found: dict[tuple[int, str], Array] = {}
    for name in calls[0]:
        if not name.startswith(f"{_SIGNAL}."):
            continue
        _, layer, kind = name.split(".")
        parts = []
        for outputs, count in zip(calls, counts, strict=True):
            array = outputs[name][row]
            if array.shape[-2] != count:
                raise CheckError(f"{name} is {list(array.shape)}: its tokens are not where they are expected")
            moved = np.moveaxis(array, -2, 0)  # [heads, tokens, channels] or [tokens, channels]
            parts.append(moved.reshape(count, -1).astype(np.float32))
        found[int(layer), kind] = np.concatenate(parts)
    return found

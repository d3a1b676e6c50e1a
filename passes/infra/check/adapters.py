"""Adapters: how a call of the graph before an interface pass is put to the graph after it, and the results compared."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir import DType, Graph
from vacc_opt.passes.infra.check.calls import GARBAGE, Call, Results

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two arrays that should be the same; ``bound`` is the error that each element may have, where one is known."""

    name: str
    expected: Array
    found: Array | None
    bound: Array | None = None


@dataclass(frozen=True)
class Adapter:
    """The adapter of a pass that keeps the interface: same inputs, same outputs.

    Subclasses speak for passes that do not. A pass ships one by its method ``adapter``.
    """

    def call(self, call: Call) -> Call:
        """The same call for the graph after the pass."""
        return call

    def reference_call(self, call: Call) -> Call:
        """The same call for the pass's reference definition, which has the interface of before."""
        return call

    def pairs(self, call: Call, before: Results, after: Results) -> Iterator[Pair]:
        """What must agree: results of ``call`` before the pass, and of :meth:`call` of it after."""
        for rank, outputs in enumerate(before):
            where = f" (rank {rank})" if len(before) > 1 else ""
            for name, expected in outputs.items():
                yield from self.pair(name, where, expected, after[rank].get(name) if rank < len(after) else None)

    def pair(self, name: str, where: str, expected: Array, found: Array | None) -> Iterator[Pair]:
        """What must agree of one output."""
        yield Pair(name + where, expected, found)


def continued(graph: Graph) -> dict[str, str]:
    """The outputs that continue an input by new tokens: ``present.0.key`` of ``past_key_values.0.key``."""
    found: dict[str, str] = {}
    for name, value in graph.outputs.items():
        node = value.producer
        if node is not None and node.op in ("Concat", "TensorScatter"):
            past = node.inputs[0]
            if past is not None and past.producer is None and past.const is None:
                found[name] = past.name
    return found


@dataclass(frozen=True)
class Casts(Adapter):
    """Inputs of one float type become inputs of another."""

    old: DType
    new: DType

    def call(self, call: Call) -> Call:
        """Round the inputs."""
        return Call(self._cast(call.shared), tuple(self._cast(rank) for rank in call.per_rank))

    def _cast(self, given: Mapping[str, Array]) -> dict[str, Array]:
        return {n: a.astype(self.new.numpy) if a.dtype == self.old.numpy else a for n, a in given.items()}


@dataclass(frozen=True)
class LastToken(Adapter):
    """The output ``logits`` [batch, seq, ...] keeps row ``valid - 1`` of each batch row."""

    logits: str
    valid: str

    def call(self, call: Call) -> Call:
        """Give the rows different numbers of valid tokens, where the call has none yet."""
        if self.valid in call.shared:
            return call
        rows, seq = call.shared["input_ids"].shape if "input_ids" in call.shared else _leading(call)
        valid = np.maximum(seq - np.array([(0, 2, 1)[row % 3] for row in range(rows)], np.int64), 1)
        return Call({**call.shared, self.valid: valid}, call.per_rank)

    def pairs(self, call: Call, before: Results, after: Results) -> Iterator[Pair]:
        """Compare the rows that are kept."""
        valid = self.call(call).shared[self.valid]
        kept = [{**r, self.logits: r[self.logits][np.arange(len(valid)), valid - 1][:, None]} for r in before]
        return super().pairs(call, kept, after)


def _leading(call: Call) -> tuple[int, int]:
    first = next(a for a in call.shared.values() if a.ndim > 1)
    return first.shape[0], first.shape[1]


@dataclass(frozen=True)
class FixedBuffers(Adapter):
    """Growing past/present tensors and a left-padded mask become buffers written at ``pos``, without padding.

    ``pasts`` maps each present output to the past input that it continues.
    """

    pasts: Mapping[str, str]
    spare: int = field(default=4)  # slots of garbage behind the last token

    def call(self, call: Call) -> Call:
        """Move each row's past to the front of a buffer, over what the mask hides."""
        given = dict(call.shared)
        seq, past = given["input_ids"].shape[1], self._past(call)
        hidden = self._hidden(call)
        for name in self.pasts.values():
            rows, heads, _, depth = given[name].shape
            buffer = np.full((rows, heads, past + seq + self.spare, depth), GARBAGE, given[name].dtype)
            for row, skip in enumerate(hidden):
                buffer[row, :, : past - skip] = given[name][row, :, skip:]
            given[name] = buffer
        given.pop("attention_mask", None)
        given.pop("position_ids", None)
        given.setdefault("valid", np.full(len(hidden), seq, np.int64))
        return Call({**given, "pos": past - hidden})

    def pairs(self, call: Call, before: Results, after: Results) -> Iterator[Pair]:
        """Put the new tokens of each present where they belong in the buffer, and compare all of it."""
        moved = self.call(call).shared
        past = self._past(call)
        expected = dict(before[0])
        for present, name in self.pasts.items():
            buffer = moved[name].copy()
            for row, pos in enumerate(moved["pos"]):
                new = expected[present][row, :, past:]
                buffer[row, :, pos : pos + new.shape[1]] = new
            expected[present] = buffer
        return super().pairs(call, [expected], after)

    def _past(self, call: Call) -> int:
        return next((call.shared[name].shape[2] for name in self.pasts.values()), 0)

    def _hidden(self, call: Call) -> npt.NDArray[np.int64]:
        mask, rows = call.shared.get("attention_mask"), len(call.shared["input_ids"])
        return np.zeros(rows, np.int64) if mask is None else (mask[:, : self._past(call)] == 0).sum(axis=1)


@dataclass(frozen=True, eq=False)
class Quantized(Adapter):
    """Float buffers become int8 codes ``clip(rint((x - zero) / scale), -127, 127)``.

    ``grids`` maps each buffer to its (scale, zero), [heads, 1, channels]; ``presents`` each output to its buffer.
    """

    grids: Mapping[str, tuple[Array, Array]]
    presents: Mapping[str, str]

    def call(self, call: Call) -> Call:
        """Quantize the buffers."""
        return self._mapped(call, lambda x, scale, zero: self._codes(x, scale, zero).astype(np.int8))

    def reference_call(self, call: Call) -> Call:
        """Buffers that hold what their codes stand for."""
        return self._mapped(call, lambda x, scale, zero: self._codes(x, scale, zero) * scale + zero)

    def pair(self, name: str, where: str, expected: Array, found: Array | None) -> Iterator[Pair]:
        """A code stands for the nearest number that it can: half a step of its channel away, inside the range."""
        if name not in self.presents or found is None or found.dtype != np.int8:
            yield from super().pair(name, where, expected, found)
            return
        scale, zero = self.grids[self.presents[name]]
        inside = np.clip(expected, zero - 127 * scale, zero + 127 * scale)
        # the last few bits of the division and of the product with the scale
        bound = np.broadcast_to(scale * 0.5001 + np.abs(inside) * 1e-5, expected.shape)
        yield Pair(name + where, inside, found.astype(np.float32) * scale + zero, bound)

    def _codes(self, x: Array, scale: Array, zero: Array) -> Array:
        return np.asarray(np.clip(np.rint((x - zero) / scale), -127, 127), np.float32)

    def _mapped(self, call: Call, change: Any) -> Call:
        return Call({n: change(a, *self.grids[n]) if n in self.grids else a for n, a in call.shared.items()})


@dataclass(frozen=True)
class Ranks(Adapter):
    """KV buffers are split by heads over ranks.

    ``heads`` maps each buffer to the heads of each rank (negative: padding), ``presents`` each output to its buffer.
    """

    heads: Mapping[str, Sequence[Sequence[int]]]
    presents: Mapping[str, str]
    ranks: int

    def call(self, call: Call) -> Call:
        """Give every rank its heads of the buffers."""
        parts: list[dict[str, Array]] = [{} for _ in range(self.ranks)]
        for name, plan in self.heads.items():
            for rank, heads in enumerate(plan):
                taken = call.shared[name][:, [max(h, 0) for h in heads]].copy()
                taken[:, [h < 0 for h in heads]] = GARBAGE
                parts[rank][name] = taken
        return Call({n: a for n, a in call.shared.items() if n not in self.heads}, tuple(parts))

    def pairs(self, call: Call, before: Results, after: Results) -> Iterator[Pair]:
        """Compare the heads of every rank, but for padding, and the other outputs of rank 0."""
        for name, expected in before[0].items():
            buffer = self.presents.get(name)
            if buffer is None or buffer not in self.heads:
                yield Pair(name, expected, after[0].get(name))
                continue
            for rank, heads in enumerate(self.heads[buffer]):
                found = after[rank].get(name) if rank < len(after) else None
                real = [place for place, head in enumerate(heads) if head >= 0]
                mine = expected[:, [heads[place] for place in real]]
                fits = found is not None and found.ndim == 4 and found.shape[1] == len(heads)
                yield Pair(f"{name} (rank {rank})", mine, found[:, real] if fits and found is not None else found)


@dataclass(frozen=True)
class Expanded(Adapter):
    """What each of ``ranks`` ranks had becomes an input or output ``NAME.rank<i>`` of one graph, but for ``shared``."""

    ranks: int
    shared: Collection[str] = ()

    def call(self, call: Call) -> Call:
        """Rename the inputs of the ranks."""
        given = [call.of(rank) for rank in range(self.ranks)]
        renamed = {f"{n}.rank{r}": a for r, mine in enumerate(given) for n, a in mine.items() if n not in self.shared}
        return Call({**{n: a for n, a in call.shared.items() if n in self.shared}, **renamed})

    def pairs(self, call: Call, before: Results, after: Results) -> Iterator[Pair]:
        """Compare each rank's outputs with those of its name, or with the one that all ranks share."""
        for rank, outputs in enumerate(before):
            for name, expected in outputs.items():
                own = f"{name}.rank{rank}"
                yield Pair(own, expected, after[0].get(own, after[0].get(name)))

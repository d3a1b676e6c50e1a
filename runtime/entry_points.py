"""Entry points of a model: prefill lengths and contexts that share its weights, and which of them serve a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class EntryPoint:
    """A phase at its sizes: ``tokens`` of one call, KV buffers of ``context`` tokens; ``kind``: prefill or decode."""

    name: str
    kind: str
    tokens: int
    context: int

    @property
    def most_cached(self) -> int:
        """Tokens that can be cached before a call."""
        return self.context - self.tokens

    def to_json(self) -> dict[str, Any]:
        """What the manifest says of it, under its name."""
        found = asdict(self)
        del found["name"]
        return found

    @staticmethod
    def from_json(name: str, data: Mapping[str, Any]) -> EntryPoint:
        """Read :meth:`to_json` back."""
        return EntryPoint(name, str(data["kind"]), int(data["tokens"]), int(data["context"]))


def entry_points(prefills: Sequence[int], contexts: Sequence[int]) -> tuple[EntryPoint, ...]:
    """A decode for each context, before them a prefill for each length and each context that holds it.

    With one of each they are called ``prefill`` and ``decode``. Without contexts there is no decode, and the buffers
    hold the longest prefill.

    >>> [one.name for one in entry_points((256, 1024), (2048,))]
    ['prefill-256', 'prefill-1024', 'decode-2048']
    >>> [one.name for one in entry_points((64, 256), (128, 512))]
    ['prefill-64-128', 'prefill-64-512', 'prefill-256-512', 'decode-128', 'decode-512']
    """
    capacities = contexts or [max(prefills)]
    several = len(prefills) > 1 or len(capacities) > 1
    found = []
    for tokens in prefills:
        for context in capacities:
            if tokens <= context:
                tail = (f"-{tokens}" if several else "") + (f"-{context}" if len(capacities) > 1 else "")
                found.append(EntryPoint(f"{PREFILL}{tail}", PREFILL, tokens, context))
    found += [EntryPoint(f"{DECODE}-{c}" if several else DECODE, DECODE, 1, c) for c in contexts]
    return tuple(found)


@dataclass(frozen=True)
class Chunk:
    """A call that fills the cache: ``entry`` takes ``count`` tokens of the prompt from ``start`` on."""

    entry: EntryPoint
    start: int
    count: int


def chunks(entries: Sequence[EntryPoint], count: int, seconds: Mapping[str, float]) -> list[Chunk]:
    """The calls that take a prompt of ``count`` tokens in the least predicted time, padding included.

    A prefill may not write past the buffers; where none fits any more, decode takes token by token.

    Args:
        entries: those of one context.
        count: tokens of the prompt, at most the context.
        seconds: predicted time of one call by name of the entry point, in any unit.
    """
    prefills = [one for one in entries if one.kind == PREFILL]
    decode = next((one for one in entries if one.kind == DECODE), None)
    best: list[tuple[float, int, EntryPoint | None]] = [(0.0, 0, None)] * (count + 1)  # (time, calls, first call)
    for at in range(count - 1, -1, -1):
        fitting = [one for one in prefills if at <= one.most_cached] or ([decode] if decode is not None else [])
        choices = []
        for entry in fitting:
            rest = best[min(at + entry.tokens, count)]
            choices.append((rest[0] + seconds[entry.name], rest[1] + 1, entry))
        best[at] = min(choices, key=lambda c: (c[0], c[1], -c[2].tokens), default=(float("inf"), 0, None))
    found: list[Chunk] = []
    at = 0
    while at < count:
        chosen = best[at][2]
        assert chosen is not None  # without decode the longest prefill holds every prompt
        found.append(Chunk(chosen, at, min(chosen.tokens, count - at)))
        at += found[-1].count
    return found

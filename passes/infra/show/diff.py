"""What a pass changed: two listings compared by the names of values, in time linear in their length.

>>> from vacc_opt.ir.text import from_text
>>> before = listing_of(from_text("g (float[2] x) => (float[2] y) { a = Neg(x) y = Relu(a) }"))
>>> after = listing_of(from_text("g (float[2] x) => (float[2] y) { a = Abs(x) y = Relu(a) }"))
>>> diff = compare(before, after)
>>> print(diff.summary())
~1 node
>>> print("\\n".join(render(diff)))
  input x: float[2]
~ a: float[2] = Neg => Abs(x)
  y: float[2] = Relu(a)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from vacc_opt.passes.infra.show.listing import END, NEW, OLD, Listing, Row, listing_of, plain, text, with_comments

__all__ = ["Change", "Diff", "compare", "listing_of", "render"]

CONTEXT = 1  # unchanged lines shown on either side of a change
_RED, _GREEN, _YELLOW, _GREY, _CYAN, _RESET = "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[90m", "\x1b[36m", "\x1b[0m"
_COLORS = {"-": _RED, "+": _GREEN, "~": "", " ": _GREY}
_NOUNS = {"node": "nodes", "weight": "weights", "input": "inputs", "output": "outputs", "graph": "facts"}


@dataclass(frozen=True)
class Change:
    """A line of a comparison: ``+`` new, ``-`` removed, ``~`` changed from ``before``, or a blank for unchanged."""

    sign: str
    row: Row
    before: Row | None = None


@dataclass(frozen=True)
class Diff:
    """All lines of two listings in one order: what was removed stands before what took its place."""

    lines: Sequence[Change]

    @cached_property
    def changes(self) -> list[Change]:
        """The lines that differ."""
        return [c for c in self.lines if c.sign != " "]

    def count(self, sign: str, kind: str = "node") -> int:
        """The number of lines of that sign and kind."""
        return sum(c.sign == sign and c.row.kind == kind for c in self.changes)

    def summary(self) -> str:
        """Counts in words: ``+61 -427 ~152 nodes, ~1 output``; ``no change`` when nothing differs."""
        parts: list[str] = []
        for kind, plural in _NOUNS.items():
            counts = [(sign, self.count(sign, kind)) for sign in "+-~"]
            given = [f"{sign}{n:,}" for sign, n in counts if n]
            if given:
                parts.append(f"{' '.join(given)} {kind if sum(n for _, n in counts) == 1 else plural}")
        return ", ".join(parts) or "no change"


def compare(before: Listing, after: Listing) -> Diff:
    """Compare row by row, each known by the name of its first value.

    A removed row stands before the row that followed it and is still there; a new one behind what was removed there.
    """
    removed = _anchored(before, after)
    lines: list[Change] = []
    made: list[Change] = []
    for key, row in after.items():
        old = before.get(key)
        if old is None:
            made.append(Change("+", row))
            continue
        lines += removed.pop(key, [])
        lines += made
        made = []
        lines.append(Change(" ", row) if row.same(old) else Change("~", row, old))
    lines += removed.pop(None, [])
    return Diff(lines + made)


def _anchored(before: Listing, after: Listing) -> dict[tuple[str, str] | None, list[Change]]:
    """Removed rows by the key of the next row that is still there; None for those at the end."""
    found: dict[tuple[str, str] | None, list[Change]] = {}
    pending: list[Change] = []
    for key, row in before.items():
        if key not in after:
            pending.append(Change("-", row))
        elif pending:
            found[key] = pending
            pending = []
    if pending:
        found[None] = pending
    return found


def render(diff: Diff, *, color: bool = False, context: int = CONTEXT) -> list[str]:
    """The changed lines with ``context`` unchanged ones around; what is left out in between is counted."""
    shown: list[str] = []
    for block in hunks(diff, context):
        if isinstance(block, int):
            gap = f"  ... {block:,} line{'s' if block > 1 else ''}"
            shown.append(f"{_CYAN}{gap}{_RESET}" if color else gap)
        else:
            shown += _block(block, color)
    return shown


def hunks(diff: Diff, context: int = CONTEXT) -> Iterator[Sequence[Change] | int]:
    """Runs of lines that hold changes, and between two of them the number of lines left out."""
    ranges: list[tuple[int, int]] = []
    for index, change in enumerate(diff.lines):
        if change.sign == " ":
            continue
        first, last = max(index - context, 0), min(index + context + 1, len(diff.lines))
        if ranges and first <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], last
        else:
            ranges.append((first, last))
    for number, (first, last) in enumerate(ranges):
        if number:
            yield first - ranges[number - 1][1]
        yield diff.lines[first:last]


def _block(changes: Sequence[Change], color: bool) -> list[str]:
    texts = with_comments([(text(c.row, c.before), c.row.place) for c in changes], margin=2)
    shown: list[str] = []
    for change, body in zip(changes, texts, strict=True):
        if not color:
            shown.append(f"{change.sign} {plain(body)}")
            continue
        head = f"{_YELLOW}~{_RESET}" if change.sign == "~" else change.sign
        marked = body.replace(OLD, _RED).replace(NEW, f"{_RESET} => {_GREEN}").replace(END, _RESET)
        shown.append(f"{_COLORS[change.sign]}{head} {marked}{_RESET}")
    return shown

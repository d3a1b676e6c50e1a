"""Two runs held against each other by their remarks: what each pass rewrote in either, and which places moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vacc_opt.ir.errors import CheckError
from vacc_opt.passes.infra.show.remarks import Entry

# how a place is found again, the surest way first; lines of a file move before modules do, and nodes are renamed first
_KEYS: tuple[Callable[[Entry], str], ...] = (
    lambda one: one.remark.where,
    lambda one: one.place if one.module else "",
    lambda one: one.module,
    lambda one: one.remark.message,
)
PASSED, MISSED = "passed", "missed"
SHOWN = 3  # places of one kind that the text names


@dataclass(frozen=True)
class Pair:
    """One place in both runs; None where a run says nothing of it."""

    before: Entry | None
    after: Entry | None

    @property
    def place(self) -> str:
        """Where, as the later run says it."""
        entry = self.after or self.before
        assert entry is not None
        return entry.place

    def was(self, kind: str) -> bool:
        """True when the earlier run made such a remark here."""
        return self.before is not None and self.before.remark.kind == kind

    def now(self, kind: str) -> bool:
        """True when the later run made such a remark here."""
        return self.after is not None and self.after.remark.kind == kind

    def to_json(self) -> dict[str, Any]:
        """The place, and what each run said of it."""
        return {"place": self.place, "before": _said(self.before), "after": _said(self.after)}


def _said(entry: Entry | None) -> dict[str, str] | None:
    if entry is None:
        return None
    return {"kind": entry.remark.kind, "message": entry.remark.message, "where": entry.remark.where}


@dataclass
class PassDiff:
    """One pass in both runs."""

    by: str
    pairs: list[Pair] = field(default_factory=list)

    def counts(self, kind: str) -> tuple[int, int]:
        """How many remarks of that kind before and after."""
        return sum(p.was(kind) for p in self.pairs), sum(p.now(kind) for p in self.pairs)

    @property
    def worse(self) -> bool:
        """True when the pass rewrites fewer places."""
        before, after = self.counts(PASSED)
        return after < before

    @property
    def lost(self) -> list[Pair]:
        """Places that were rewritten and are not any more."""
        return [p for p in self.pairs if p.was(PASSED) and not p.now(PASSED)]

    @property
    def won(self) -> list[Pair]:
        """Places that are rewritten now and were not."""
        return [p for p in self.pairs if p.now(PASSED) and not p.was(PASSED)]

    @property
    def other_reason(self) -> list[Pair]:
        """Places that both runs missed, for another reason."""
        return [p for p in self.pairs if p.was(MISSED) and p.now(MISSED) and _reason(p.before) != _reason(p.after)]

    def line(self) -> tuple[str, str, str]:
        """Name, passed and missed in words; the first reason when places were lost."""
        passed, missed = (_counts(self.counts(kind), kind) for kind in (PASSED, MISSED))
        reasons = [_reason(p.after) for p in self.lost if p.now(MISSED)]
        if self.worse and reasons:
            missed += f", first reason: {reasons[0]}"
        elif all(p.after is None for p in self.pairs):
            missed += ", no word of it in B"
        return self.by, passed, missed

    def to_json(self) -> dict[str, Any]:
        """Counts and places."""
        counts = {kind: dict(zip(("before", "after"), self.counts(kind), strict=True)) for kind in (PASSED, MISSED)}
        places = {"lost": self.lost, "won": self.won, "other_reason": self.other_reason}
        return {
            "pass": self.by,
            **counts,
            "worse": self.worse,
            **{name: [p.to_json() for p in pairs] for name, pairs in places.items()},
        }


def _reason(entry: Entry | None) -> str:
    return entry.remark.message if entry is not None else ""


def _counts(counts: tuple[int, int], kind: str) -> str:
    before, after = counts
    return f"{before} {kind}" if before == after else f"{before} -> {after} {kind}"


def compare_remarks(before: Sequence[Entry], after: Sequence[Entry]) -> list[PassDiff]:
    """Match the places of two runs pass by pass, in the order in which the passes spoke.

    A place is found again by its full name, else by module path and source line, else by module path, else by message;
    among equals, those that say the same first. Linear in the number of remarks.
    """
    names = dict.fromkeys([*(one.by for one in before), *(one.by for one in after)])
    diffs = {name: PassDiff(name) for name in names}
    sides = ({name: [] for name in names}, {name: [] for name in names})  # type: tuple[_ByPass, _ByPass]
    for side, found in zip(sides, (before, after), strict=True):
        for one in found:
            if one.remark.kind in (PASSED, MISSED):
                side[one.by].append(one)
    for name, diff in diffs.items():
        diff.pairs = list(_pairs(sides[0][name], sides[1][name]))
    return [diff for diff in diffs.values() if diff.pairs]


_ByPass = dict[str, list[Entry]]


def _pairs(before: list[Entry], after: list[Entry]) -> Iterator[Pair]:
    for key in _KEYS:
        for same_kind in (True, False):
            pairs, before, after = _matched(before, after, key, same_kind)
            yield from pairs
    yield from (Pair(one, None) for one in before)
    yield from (Pair(None, one) for one in after)


def _matched(
    before: Sequence[Entry], after: Sequence[Entry], key: Callable[[Entry], str], same_kind: bool
) -> tuple[list[Pair], list[Entry], list[Entry]]:
    """Pairs with equal keys in order, and what is left of both sides."""

    def full(one: Entry) -> tuple[str, str]:
        return key(one), one.remark.kind if same_kind else ""

    waiting: dict[tuple[str, str], list[Entry]] = {}
    for one in reversed(after):
        waiting.setdefault(full(one), []).append(one)
    pairs: list[Pair] = []
    left: list[Entry] = []
    for one in before:
        partners = waiting.get(full(one)) if key(one) else None
        if partners:
            pairs.append(Pair(one, partners.pop()))
        else:
            left.append(one)
    taken = {id(pair.after) for pair in pairs}
    return pairs, left, [one for one in after if id(one) not in taken]


def check_not_worse(diffs: Sequence[PassDiff]) -> None:
    """Raise CheckError when a pass rewrites fewer places than before, with the counts of each such pass."""
    worse = [f"{d.by} {d.counts(PASSED)[0]} -> {d.counts(PASSED)[1]}" for d in diffs if d.worse]
    if worse:
        hint = "`vacc-opt opt MODEL -p PIPELINE --why-not PASS` explains places that were missed"
        raise CheckError(f"fewer places are rewritten: {', '.join(worse)}", hint)


def report(diffs: Sequence[PassDiff]) -> str:
    """A line a pass, then the places that changed sides, those with equal reasons together."""
    rows = [diff.line() for diff in diffs]
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
    for diff in diffs:
        for title, pairs in (("not rewritten any more", diff.lost), ("rewritten now", diff.won)):
            lines += _places(f"{diff.by}: {title}", pairs)
        lines += _places(f"{diff.by}: missed for another reason", diff.other_reason)
    return "\n".join(lines) if lines else "no pass said that it rewrote or missed a place"


def _places(title: str, pairs: Sequence[Pair]) -> Iterator[str]:
    if not pairs:
        return
    yield f"\n{title}, {len(pairs)} place{'s' if len(pairs) > 1 else ''}"
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((_words(pair.before), _words(pair.after)), []).append(pair)
    for (before, after), members in groups.items():
        yield f"  before  {before}"
        yield f"  after   {after}"
        places = [p.place for p in members]
        yield from (f"    {place}" for place in places[:SHOWN])
        if len(places) > SHOWN:
            yield f"    ... {len(places) - SHOWN} more (--json names all)"


def _words(entry: Entry | None) -> str:
    return f"{entry.remark.kind}: {entry.remark.message}" if entry is not None else "nothing said of it"

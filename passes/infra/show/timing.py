"""Where the time of a run went, as a tree down to each rule, and what each pass did to the numbers of nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vacc_opt.ir import Graph
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Pass, RuleStats
from vacc_opt.passes.infra.instrument import Instrument, PassRecord, Report, Step
from vacc_opt.passes.infra.pipeline import flat
from vacc_opt.passes.infra.scopes import Functions, Phase

if TYPE_CHECKING:
    from vacc_opt.passes.infra.pipeline import Item

_COLUMNS = ("seconds", "%", "runs", "tried", "matched", "applied")


@dataclass
class Entry:
    """A line of the tree: a scope, a pass over all its runs, or a rule."""

    name: str
    seconds: float = 0.0
    runs: int = 0
    rule: RuleStats | None = None
    inner: list[Entry] = field(default_factory=list)

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Entry]]:
        """The line and those below it with their depth."""
        yield depth, self
        for one in self.inner:
            yield from one.walk(depth + 1)


class Timing(Instrument):
    """Measures a run: scopes, passes and rules with their counts; verification stands on its own line."""

    wants_rule_times = True

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._items: Sequence[Item] = ()
        self._runs: list[tuple[Step, PassRecord]] = []
        self._began = self._ended = 0.0

    def started(self, graph: Graph, items: Sequence[Item]) -> None:
        """Start the clock."""
        self._items, self._runs = items, []
        self._began = self._ended = self._clock()

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        """Keep what the manager measured."""
        self._runs.append((step, record))
        self._ended = self._clock()

    def failed(self, step: Step, graph: Graph, error: Exception) -> None:
        """Stop the clock."""
        self._ended = self._clock()

    def finished(self, report: Report) -> None:
        """Stop the clock."""
        self._ended = self._clock()

    def tree(self) -> Entry:
        """The whole run; what no pass and no verification took is called ``other``."""
        records = [record for _, record in self._runs]
        inner = _Tree(self._runs).entries(self._items, "")
        verify = sum(r.verify_seconds for r in records)
        total = self._ended - self._began
        other = max(total - verify - sum(one.seconds for one in inner), 0.0)
        return Entry("total", total, 0, None, [*inner, Entry("verification", verify), Entry("other", other)])

    def text(self) -> str:
        """Aligned lines: seconds, share of the total, and for rules how often they were tried, matched and applied."""
        tree = self.tree()
        rows = [("timing", *_COLUMNS)] + [_cells(depth, one, tree.seconds) for depth, one in tree.walk()]
        return "\n".join(columns(rows))


@dataclass
class _Tree:
    """Runs, sorted into the items of a pipeline; of several places that hold the same object the first takes all."""

    runs: Sequence[tuple[Step, PassRecord]]
    taken: set[tuple[int, str]] = field(default_factory=set)

    def entries(self, items: Sequence[Item], scope: str) -> list[Entry]:
        found: list[Entry] = []
        for item in items:
            if isinstance(item, Pass):
                found += self._pass(item, scope)
            elif isinstance(item, Functions):
                found += [self._group(f"function {name}", item.body, name) for name in self._scopes(item)]
            else:
                name = item.spec().removesuffix(f"({','.join(one.spec() for one in item.body)})")
                found.append(self._group(name, item.body, item.name if isinstance(item, Phase) else scope))
        return found

    def _group(self, name: str, items: Sequence[Item], scope: str) -> Entry:
        inner = self.entries(items, scope)
        return Entry(name, sum(one.seconds for one in inner), 0, None, inner)

    def _scopes(self, item: Functions) -> list[str]:
        inside = {id(one) for one in flat(item.body)}
        return list(dict.fromkeys(step.scope for step, _ in self.runs if id(step.item) in inside))

    def _pass(self, item: Pass, scope: str) -> list[Entry]:
        records = [r for step, r in self.runs if step.item is item and step.scope == scope]
        if not records or (id(item), scope) in self.taken:
            return []
        self.taken.add((id(item), scope))
        rules = merged_rules(records)
        own = rules.pop(item.name) if list(rules) == [item.name] else None
        inner = [Entry(name, stats.seconds, 0, stats) for name, stats in rules.items()]
        return [Entry(item.spec(), sum(r.seconds for r in records), len(records), own, inner)]


def merged_rules(records: Sequence[PassRecord]) -> dict[str, RuleStats]:
    """The counts of each rule over several runs; of a rule that a pass does not count itself, its applications."""
    total: dict[str, RuleStats] = {}
    for record in records:
        for name, stats in record.rules.items():
            sofar = total.setdefault(name, RuleStats())
            sofar.tried += stats.tried
            sofar.matched += stats.matched
            sofar.applied += stats.applied
            sofar.seconds += stats.seconds
        for application in record.applications:
            if application.rule not in record.rules:
                total.setdefault(application.rule, RuleStats()).applied += 1
    return {name: stats for name, stats in total.items() if stats.tried or stats.applied}


def _cells(depth: int, one: Entry, total: float) -> tuple[str, ...]:
    share = 100 * one.seconds / total if total else 0.0
    counts = ("", "", "")
    if one.rule is not None:
        counts = rule_counts(one.rule)
    runs = str(one.runs) if one.runs > 1 else ""
    # a rule that only its applications tell of was not timed
    untimed = one.rule is not None and not one.rule.tried and not one.runs
    timed = ("", "") if untimed else (f"{one.seconds:.3f}", f"{share:.1f}")
    return ("  " * depth + one.name, *timed, runs, *counts)


def telling_rules(record: PassRecord) -> dict[str, RuleStats]:
    """The rules of one run, unless they say no more than that the pass was applied."""
    rules = merged_rules([record])
    plain = list(rules) == [record.name] and not rules[record.name].tried
    return {} if plain else rules


def rule_counts(stats: RuleStats) -> tuple[str, str, str]:
    """Tried, matched and applied in words; the first two are empty for a rule that only its applications tell of."""
    found = (f"{stats.tried:,}", f"{stats.matched:,}") if stats.tried else ("", "")
    return (*found, f"{stats.applied:,}")


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows below each other, the first column to the left and the others to the right; empty columns go.

    >>> columns([("pass", "seconds", "runs"), ("simplify", "0.310", "")])
    ['pass      seconds', 'simplify    0.310']
    """
    first, *others = zip(*rows, strict=True)
    used = [column for column in others if any(column[1:])]
    width = max(map(len, first))
    widths = [max(map(len, column)) for column in used]
    return [
        (f"{name:<{width}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True))).rstrip()
        for name, *cells in zip(first, *used, strict=True)
    ]


class Stats(Instrument):
    """Counts what each pass did: nodes of each operator before and after, changes, applications, rules."""

    def __init__(self) -> None:
        self._before: Mapping[str, int] = {}
        self._blocks: list[str] = []

    def before(self, step: Step, graph: Graph) -> None:
        """Count the operators."""
        self._before = graph.op_counts()

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        """Count again and keep the difference."""
        self._blocks.append("\n".join(_stats(step, record, self._before, graph.op_counts())))

    def text(self) -> str:
        """A block a pass."""
        return "\n".join(["statistics", *self._blocks])


def _stats(step: Step, record: PassRecord, before: Mapping[str, int], after: Mapping[str, int]) -> Iterator[str]:
    was, now = sum(before.values()), sum(after.values())
    nodes = f"{was:,} -> {_some(now, 'node')}" if was != now else _some(now, "node")
    done = f"{_some(record.changes, 'change')} in {_some(len(record.applications), 'application')}"
    yield f"  {step.index + 1} {step}: {nodes}, {done if record.changes else 'no change'}"
    ops = [(op, before.get(op, 0), after.get(op, 0)) for op in sorted({*before, *after})]
    width = max((len(op) for op, a, b in ops if a != b), default=0)
    for op, a, b in ops:
        if a != b:
            yield f"      {op:<{width}}  {a:,} -> {b:,}"
    rules = telling_rules(record)
    if rules:
        width = max(map(len, rules))
        for name, stats in rules.items():
            named = zip(rule_counts(stats), ("tried", "matched", "applied"), strict=True)
            yield f"      rule {name:<{width}}  {', '.join(f'{number} {verb}' for number, verb in named if number)}"


def _some(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")

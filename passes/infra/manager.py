"""The pass manager: runs a pipeline, verifies after each pass, restores the graph when one fails, tells instruments."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vacc_opt.ir import Graph, collector
from vacc_opt.ir.copy import bind, symbols
from vacc_opt.ir.errors import CheckError, UserError, VaccError, did_you_mean
from vacc_opt.ir.rewriter import ApplicationLimit, Rewriter
from vacc_opt.ir.verify import Interface, InvalidGraph, verify
from vacc_opt.passes.infra import analysis
from vacc_opt.passes.infra.base import Kind, Outcome, Pass
from vacc_opt.passes.infra.instrument import Instrument, PassRecord, Report, Step
from vacc_opt.passes.infra.patterns import why_not
from vacc_opt.passes.infra.patterns.pattern_pass import PatternPass
from vacc_opt.passes.infra.pipeline import Item, check_order, flat, parse_pipeline
from vacc_opt.passes.infra.scopes import CAPACITY, Fixpoint, Functions, Phase


@dataclass(frozen=True)
class Until:
    """Where a run ends early: in pass number ``step``, after so many applications (None: all of them)."""

    step: int
    applications: int | None = None


class _Stop(Exception):
    """The point that ``until`` names was reached."""


def run_pipeline(
    graph: Graph,
    pipeline: str | Sequence[Item],
    *,
    on_pass: Callable[[PassRecord], None] | None = None,
    verify_each: bool = True,
    instruments: Sequence[Instrument] = (),
    check_analyses: bool = False,
    until: Until | None = None,
) -> Report:
    """Run passes over ``graph`` in place.

    Args:
        graph: changed in place; a pass that fails leaves it as it was before that pass.
        pipeline: text, or passes and scopes.
        on_pass: called after each pass.
        verify_each: check structure, types and interface after each pass.
        instruments: hear the run.
        check_analyses: compute preserved analyses again after each pass and compare.
        until: end early, for bisection.

    Raises:
        VaccError: a pass declined its task, an expectation is not met, or a pass left an invalid graph.
    """
    items = parse_pipeline(pipeline) if isinstance(pipeline, str) else list(pipeline)
    if not isinstance(pipeline, str):
        check_order(items)
    hears = [*instruments, *([_OnPass(on_pass)] if on_pass is not None else [])]
    manager = _Manager(hears, verify_each, check_analyses, until)
    for one in hears:
        one.started(graph, items)
    with contextlib.suppress(_Stop), collector.paused():
        manager.run(items, graph, "")
    report = Report(tuple(manager.records))
    for one in hears:
        one.finished(report)
    return report


class _OnPass(Instrument):
    def __init__(self, call: Callable[[PassRecord], None]) -> None:
        self._call = call

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        self._call(record)


@dataclass
class _Manager:
    hears: Sequence[Instrument]
    verify_each: bool
    check_analyses: bool
    until: Until | None
    records: list[PassRecord] = field(default_factory=list)
    caller: Graph | None = None  # the graph that calls the function whose body is worked on
    repeating: int = 0  # fixpoint groups around the present pass

    def run(self, items: Sequence[Item], graph: Graph, scope: str) -> None:
        for item in items:
            if isinstance(item, Pass):
                self._pass(item, graph, scope)
            elif isinstance(item, Fixpoint):
                self._fixpoint(item, graph, scope)
            elif isinstance(item, Functions):
                self._functions(item, graph, scope)
            elif isinstance(item, Phase):
                self._phase(item, graph)

    def _pass(self, item: Pass, graph: Graph, scope: str) -> None:
        step = Step(len(self.records), item, scope)
        for one in self.hears:
            one.before(step, graph)
        stops = self.until is not None and self.until.step == step.index
        limit = self.until.applications if self.until is not None and stops else None
        rw = Rewriter(graph, by=item.name, limit=limit)
        rw.timed = any(one.wants_rule_times for one in self.hears)
        version = graph.version
        try:
            record = self._run(step, graph, rw)
            analysis.after_pass(graph, version, item.preserves, check=item.name if self.check_analyses else "")
            self.records.append(record)
            for one in self.hears:
                one.after(step, graph, record, rw)
            if not stops and not self.repeating:
                check_expectation(item, record, graph)
        except Exception as error:
            rw.rollback()
            for one in self.hears:
                one.failed(step, graph, error)
            raise
        if stops:
            raise _Stop

    def _run(self, step: Step, graph: Graph, rw: Rewriter) -> PassRecord:
        item = step.item
        promised = None if item.kind is Kind.INTERFACE else Interface.of(graph, types=item.kind is not Kind.LOSSY)
        started = time.perf_counter()
        try:
            outcome = item.run(graph, rw)
        except ApplicationLimit:
            outcome = Outcome(f"stopped after {rw.limit} applications")
        except VaccError as error:
            raise _named(error, item) from error
        except Exception as error:
            error.add_note(f"in the pass {item.name}")
            raise
        ran = time.perf_counter()
        if self.verify_each:
            verify(graph, after=item.name, interface=promised)
            if self.caller is not None:
                self._verify_caller(self.caller, step)
        return PassRecord(
            name=item.name,
            spec=item.spec(),
            seconds=ran - started,
            changes=rw.modified,
            summary=outcome.summary,
            remarks=tuple(outcome.remarks),
            fused=outcome.fused,
            candidates=outcome.candidates,
            scope=step.scope,
            verify_seconds=time.perf_counter() - ran,
            rules=outcome.rules,
            applications=tuple(rw.applications),
        )

    def _verify_caller(self, caller: Graph, step: Step) -> None:
        """A body still fits its calls; a pass may only break that where its kind lets it change types."""
        try:
            verify(caller, after=f"{step.scope}: {step.item.name}")
        except InvalidGraph as error:
            if step.item.kind in (Kind.EXACT, Kind.REASSOCIATING):
                raise
            message = f"{step.item.name}: the calls of {step.scope} do not fit its changed body any more"
            raise CheckError(message, "run inline-functions before it") from error

    def _fixpoint(self, item: Fixpoint, graph: Graph, scope: str) -> None:
        start = len(self.records)
        for _ in range(item.max_rounds):
            first = len(self.records)
            self.repeating += 1
            try:
                self.run(item.body, graph, scope)
            finally:
                self.repeating -= 1
            changing = [r.name for r in self.records[first:] if r.changes]
            if not changing:
                if not self.repeating:
                    self._check_rounds(item, start, graph)
                return
        raise CheckError(
            f"{item.spec()} has not settled after {item.max_rounds} rounds",
            f"still changing the graph: {', '.join(dict.fromkeys(changing))}",
        )

    def _check_rounds(self, item: Fixpoint, start: int, graph: Graph) -> None:
        """Hold expectations inside a group to the sum of its rounds."""
        for one in flat(item.body):
            records = [r for r in self.records[start:] if r.spec == one.spec()]
            if isinstance(one, Pass) and records:
                total = sum(r.fused or 0 for r in records)
                last = dataclasses.replace(records[-1], fused=total, candidates=max(total, records[-1].candidates or 0))
                check_expectation(one, last, graph)

    def _functions(self, item: Functions, graph: Graph, scope: str) -> None:
        try:
            wanted = re.compile(item.match)
        except re.error as error:
            raise UserError(f"function{{match={item.match}}} is no regular expression: {error}") from error
        bodies = {name: body for name, body in sorted(graph.functions.items()) if wanted.search(name)}
        if not bodies and item.match:
            hint = did_you_mean(item.match, graph.functions) if graph.functions else "the model kept no functions"
            raise UserError(f"no function of the model matches {item.match!r}", hint)
        outer, self.caller = self.caller, self.caller or graph
        for name, body in bodies.items():
            self.run(item.body, body, f"{scope} {name}".strip())
        self.caller = outer

    def _phase(self, item: Phase, graph: Graph) -> None:
        name = item.phase
        if name not in graph.phases:
            sizes = item.sizes()
            if any(size < 1 for size in sizes.values()):
                raise UserError(f"{name}: how many tokens a call has is not said", "as in `prefill{seq=64}(...)`")
            bound = bind(graph, sizes)
            if symbols(bound):
                message = f"{name}: the size {min(symbols(bound))} of the interface is not bound"
                hint = "`kv-cache` fixes the sizes of the cache: put it before"
                raise CheckError(message, "as in `decode{context=2048}(...)`" if CAPACITY in symbols(bound) else hint)
            bound.name = name
            graph.phases[name] = bound
        self.run(item.body, graph.phases[name], name)


def _named(error: VaccError, item: Pass) -> VaccError:
    if error.message.startswith(f"{item.name}: "):
        return error
    return type(error)(f"{item.name}: {error.message}", error.hint)


def check_expectation(item: Pass, record: PassRecord, graph: Graph) -> None:
    """Compare the count of a pass with its option ``expect``; raises CheckError that says why the rest was missed."""
    fields = {f.name for f in dataclasses.fields(item)}
    expected = getattr(item, "expect", None) if "expect" in fields else None
    if expected is None or expected == record.fused:
        return
    if isinstance(item, PatternPass):
        hint = "\n  ".join(why_not.report(record, why_not.explain(item, graph)).splitlines())
    else:
        missed = [str(r) for r in record.remarks if r.kind == "missed"]
        hint = "\n  ".join(missed[:5]) if missed else "it says nothing of the rest"
    raise CheckError(f"{item.name}: {record.fused} rewritten, {expected} expected", hint)

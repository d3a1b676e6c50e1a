"""``vacc-opt bisect``: the first pass, and in it the first application, after which a test finds the model bad."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vacc_opt.ir import Graph
from vacc_opt.ir.copy import copy
from vacc_opt.ir.errors import CheckError, UserError, VaccError
from vacc_opt.ir.rewriter import Application, Rewriter
from vacc_opt.ir.verify import InvalidGraph, verify
from vacc_opt.passes.infra.base import Pass
from vacc_opt.passes.infra.check.locate import Verdict, applied, first_bad, in_model, shown_change
from vacc_opt.passes.infra.check.numerics import NumericMismatch
from vacc_opt.passes.infra.debug.failures import find_failure
from vacc_opt.passes.infra.debug.reproducer import Numerics, failure_of, reproducer_of, rest_of
from vacc_opt.passes.infra.debug.scripts import Script
from vacc_opt.passes.infra.instrument import Instrument, PassRecord, Step
from vacc_opt.passes.infra.manager import Until, run_pipeline
from vacc_opt.passes.infra.show.files import write_whole

if TYPE_CHECKING:
    from vacc_opt.passes.infra.pipeline import Item

Test = Callable[[Graph], Verdict]


@dataclass(frozen=True)
class Culprit:
    """What was found.

    ``application`` is None where the pass makes none, or where the ones that could be blamed cannot be tested apart:
    then ``suspects`` are the numbers of the first and the last of these. ``graph`` is the one in front of the pass.
    """

    step: Step
    graph: Graph
    total: int | None
    application: Application | None = None
    suspects: tuple[int, int] | None = None
    change: tuple[str, ...] = ()
    why: str = ""

    def lines(self) -> list[str]:
        """The finding for people, its first line the pass."""
        said = [f"{self.step} is the first bad pass (pass {self.step.index + 1})"]
        if self.application is not None:
            one = self.application
            rule = f"{one.rule}, " if one.rule != self.step.item.name else ""
            place = f"{one.root or 'the whole graph'}{in_model(one.provenance)}"
            of = f" of {self.total}" if self.total is not None else ""
            said.append(f"application {one.index}{of}: {rule}{place}")
        elif self.suspects is not None:
            first, last = self.suspects
            said.append(f"applications {first} to {last} cannot be tested apart")
        else:
            said.append("it changes the graph outside of any application, so the whole pass is it")
        said += [f"because {self.why}"] if self.why else []
        return said + [f"  {line}" for line in self.change]


class _Steps(Instrument):
    """Counts what ran."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.totals: list[int] = []

    def before(self, step: Step, graph: Graph) -> None:
        self.steps.append(step)

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        self.totals.append(len(record.applications))


class _Reached(Exception):
    """The pass that was waited for is about to run."""


class _StopBefore(Instrument):
    """Ends a run in front of one pass."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.graph: Graph | None = None

    def before(self, step: Step, graph: Graph) -> None:
        if step.index == self.index:
            self.graph = graph
            raise _Reached


def _until_it_raises(graph: Graph, item: Pass) -> int:
    """A number of applications by which a pass raises, or all that it makes if it does not."""
    high = 1
    while True:
        with applied(item, graph, high) as rw:
            if rw.error is not None:
                return high
            if len(rw.applications) < high:
                return len(rw.applications)
        high *= 2


class Bisection:
    """One search: runs parts of a pipeline on copies of a graph and asks a test about each.

    Args:
        graph: the model; it is left as it is.
        items: the pipeline.
        test: says good, bad or skip of a graph.
        broken_is_bad: a part of the pipeline that raises is bad too (else it ends the search with its error).
        say: hears every try as a line.
    """

    def __init__(
        self,
        graph: Graph,
        items: Sequence[Item],
        test: Test,
        *,
        broken_is_bad: bool = False,
        verify_each: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.graph = graph
        self.items = items
        self.test = test
        self.say = say
        self.broken_is_bad = broken_is_bad
        self.verify_each = verify_each
        self.tries: int = 0
        self.why: str = ""

    def run(self) -> Culprit:
        """Search.

        Raises:
            UserError: the model is bad before any pass, or good after all of them.
            VaccError: the pipeline itself fails.
        """
        if self._judge(self.graph) is not Verdict.GOOD:
            raise UserError("the model is bad before any pass: there is nothing to find", "run the test on it alone")
        steps, verdict = self._whole()
        self.say(f"after all {len(steps.steps)} passes: {verdict.value}")
        if verdict is not Verdict.BAD:
            raise UserError(f"the model is {verdict.value} after the whole pipeline: there is nothing to find")
        good, bad = first_bad(-1, len(steps.steps) - 1, lambda step: self._after(Until(step), f"{steps.steps[step]}"))
        if bad - good > 1:
            names = ", ".join(str(step) for step in steps.steps[good + 1 : bad + 1])
            raise CheckError(f"these passes cannot be tested apart: {names}", "every model between them is skipped")
        return self._within(steps.steps[bad], steps.totals[bad] if bad < len(steps.totals) else None)

    def _whole(self) -> tuple[_Steps, Verdict]:
        steps, graph = _Steps(), copy(self.graph)
        try:
            run_pipeline(graph, self.items, instruments=[steps], verify_each=self.verify_each)
        except Exception as error:
            if not self.broken_is_bad:
                raise
            self.why = _words(error)
            return steps, Verdict.BAD
        return steps, self._judge(_scoped(graph, steps.steps[-1].scope) if steps.steps else graph)

    def _within(self, step: Step, total: int | None) -> Culprit:
        start, item = self._before(step), step.item
        # of a pass that raised, how many applications it makes is not known
        end = _until_it_raises(start, item) if total is None else total

        def after(count: int) -> Verdict:
            return self._after(Until(step.index, count), f"{count} of at most {end} applications of {item.name}")

        # the reasons of the last bad try are those of the culprit, so the end is asked about anew
        if not end or after(end) is not Verdict.BAD:
            return Culprit(step, start, total, why=self.why)
        good, bad = first_bad(0, end, after)
        if bad - good > 1:
            return Culprit(step, start, total, suspects=(good + 1, bad), why=self.why)
        with applied(item, start, bad) as rw:
            found, whole = rw.last, rw.error is None
        change = tuple(shown_change(item, start, found)) if found is not None and whole else ()
        return Culprit(step, start, total, found, change=change, why=self.why)

    def _before(self, step: Step) -> Graph:
        reached = _StopBefore(step.index)
        with suppress(_Reached):
            run_pipeline(copy(self.graph), self.items, verify_each=False, instruments=[reached])
        assert reached.graph is not None
        return reached.graph

    def _after(self, until: Until, what: str) -> Verdict:
        steps, graph = _Steps(), copy(self.graph)
        try:
            run_pipeline(graph, self.items, instruments=[steps], verify_each=self.verify_each, until=until)
        except Exception as error:
            if not self.broken_is_bad:
                raise
            self.why, verdict = _words(error), Verdict.BAD
        else:
            verdict = self._judge(_scoped(graph, steps.steps[-1].scope))
        if what:
            self.say(f"after {what}: {verdict.value}")
        return verdict

    def _judge(self, graph: Graph) -> Verdict:
        self.tries += 1
        return self.test(graph)


def _words(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, VaccError) else f"{type(error).__name__}: {text}"


def _scoped(graph: Graph, scope: str) -> Graph:
    for name in filter(None, scope.split(" ")):
        graph = graph.phases.get(name) or graph.functions.get(name, graph)
    return graph


def bisect_verify(graph: Graph, items: Sequence[Item], say: Callable[[str], None] = lambda line: None) -> Culprit:
    """The first pass, and application, after which the graph is not valid any more or the pipeline raises."""
    search = Bisection(graph, items, lambda tried: Verdict.GOOD, broken_is_bad=True, verify_each=False, say=say)

    def valid(tried: Graph) -> Verdict:
        try:
            verify(tried)
        except InvalidGraph as error:
            search.why = error.message
            return Verdict.BAD
        return Verdict.GOOD

    search.test = valid
    return search.run()


def bisect_numerics(graph: Graph, items: Sequence[Item], numerics: Numerics) -> Culprit:
    """The first pass, and application, that does not keep its promise about values.

    Raises:
        UserError: every pass keeps it.
    """
    found = find_failure(copy(graph), items, numerics)
    assert isinstance(found.error, NumericMismatch)
    application, why = found.error.application, str(found.error.difference)
    change = tuple(shown_change(found.item, found.graph, application)) if application is not None else ()
    return Culprit(found.step, found.graph, found.error.total, application, change=change, why=why)


def bisect_script(
    graph: Graph, items: Sequence[Item], command: str, folder: Path, say: Callable[[str], None] = lambda line: None
) -> Culprit:
    """The first pass, and application, after which a person's script finds the model bad; models go to ``folder``."""
    return Bisection(graph, items, Script(command, folder), say=say).run()


def write_culprit(
    found: Culprit, items: Sequence[Item], path: Path | None, command: str | None, numerics: Numerics | None
) -> Path:
    """Write a reproducer of what was found, to a temporary file where no path is given; gives the path."""
    notes = [f"after application {found.application.index} of the first pass"] if found.application is not None else []
    notes += (
        [f"the script {command} calls the result bad: write it with `-o model.onnx`"] if command is not None else []
    )
    made = reproducer_of(found.graph, rest_of(items, found.step.item), numerics=numerics, notes=notes)
    if command is None:
        error = replace(made, graph=copy(found.graph)).replay()
        if error is not None:
            made = replace(made, failure=failure_of(error), error=str(error))
    path = path or Path(tempfile.mkdtemp(prefix="vacc-opt-")) / "reproducer.vacc"
    write_whole(path, made.text())
    return path

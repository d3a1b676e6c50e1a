"""``--check-numerics``: runs the graph before and after every pass and holds the pass to what its kind promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vacc_opt.ir import Graph
from vacc_opt.ir.copy import copy
from vacc_opt.ir.errors import CheckError, UserError, VaccError, did_you_mean
from vacc_opt.ir.rewriter import Application, Rewriter
from vacc_opt.passes.infra.base import Kind, Pass
from vacc_opt.passes.infra.check.adapters import Adapter, Pair
from vacc_opt.passes.infra.check.calls import Call, Results, seeded_call
from vacc_opt.passes.infra.check.compare import (
    NOISE,
    Comparison,
    Difference,
    compare,
    has_half,
    loss,
    noise_of,
    tolerance_of,
)
from vacc_opt.passes.infra.check.layerwise import LAYER_BYTES, REAL_BYTES, Layerwise, missing_file, weight_bytes
from vacc_opt.passes.infra.check.locate import (
    Capture,
    Ranges,
    Verdict,
    applied,
    first_application,
    in_model,
    shown_change,
    twins,
)
from vacc_opt.passes.infra.instrument import Instrument, PassRecord, Step

if TYPE_CHECKING:
    from vacc_opt.passes.infra.pipeline import Item

WEIGHTS = ("auto", "real", "seeded")


class NumericMismatch(CheckError):
    """A pass broke its promise about values; ``application`` and ``difference`` say where, if it could be found."""

    application: Application | None = None
    total = 0  # applications that the pass makes
    difference: Difference | None = None
    pass_name = ""


@dataclass(frozen=True)
class Checked:
    """What the check of one pass found, as a sentence; ``compared`` is false where nothing could be held against it."""

    step: Step
    sentence: str
    compared: bool = True


@dataclass
class _State:
    """What is known of a graph as it is now: a call of it, and what it gives."""

    graph: Graph
    call: Call
    results: Results = field(default_factory=list)
    ranges: Ranges = field(default_factory=Ranges)
    problem: str = ""


class CheckNumerics(Instrument):
    """Stops the pipeline at the first pass that does not keep its promise, and names the first wrong application.

    Args:
        tolerance: allowed error as a share of an output's scale, for passes that change the order of sums; by default
            1e-5 (fp32).
        seed: of the inputs.
        sizes: numbers for named dimensions of the inputs.
        weights: ``real`` ones, ``seeded`` ones of the same shapes, or ``auto``: real ones up to 1 GiB if all are there.
        say: hears each result.

    Raises (through the manager):
        NumericMismatch: with pass, application, rule, source line and the first value that differs.
    """

    def __init__(
        self,
        tolerance: float | None = None,
        *,
        seed: int = 0,
        sizes: Mapping[str, int] | None = None,
        weights: str = "auto",
        layer_bytes: int = LAYER_BYTES,
        say: Callable[[Checked], None] | None = None,
    ) -> None:
        if weights not in WEIGHTS:
            raise UserError(f"weights are {weights!r}", did_you_mean(weights, WEIGHTS))
        if tolerance is not None and not tolerance > 0:
            raise UserError(f"the tolerance is {tolerance:g}", "it is a share of an output's scale, such as 1e-5")
        self.tolerance, self.seed, self.sizes, self.weights = tolerance, seed, dict(sizes or {}), weights
        self.locates = True  # find the application and the value, which takes some more runs
        self.checked: list[Checked] = []
        self._say = say
        self._layer_bytes = layer_bytes
        self._states: dict[str, _State] = {}
        self._runner = Layerwise(layer_bytes=layer_bytes)
        self._jittering = self._runner
        self._before: Graph | None = None  # for a pass that may change how numbers are rounded
        self._adapter: Adapter | None = None

    def started(self, graph: Graph, items: Sequence[Item]) -> None:
        """Choose the weights."""
        size, missing = weight_bytes(graph), missing_file(graph)
        if self.weights == "real" and missing:
            raise UserError(f"{missing}: the weights are not there", "check with seeded ones instead")
        seeded = self.weights == "seeded" or (self.weights == "auto" and (size > REAL_BYTES or bool(missing)))
        self._runner = Layerwise(seeded=seeded, layer_bytes=self._layer_bytes)
        self._jittering = Layerwise(seeded=seeded, layer_bytes=self._layer_bytes, jitter=True)
        self._states, self.checked = {}, []

    @property
    def weights_used(self) -> str:
        """``real`` or ``seeded``, once a pipeline has started."""
        return "seeded" if self._runner.seeded else "real"

    def before(self, step: Step, graph: Graph) -> None:
        """Run the graph if this is the first pass on it, or if it could not be run until now."""
        state = self._states.get(step.scope)
        if state is None or state.graph is not graph or state.problem:
            self._states[step.scope] = self._start(graph)
        try:
            self._adapter = step.item.adapter(graph)
        except VaccError:
            self._adapter = Adapter()  # the pass will refuse the graph with the same words
        self._before = copy(graph) if step.item.kind is not Kind.EXACT else None

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        """Hold the pass to its kind."""
        state = self._states[step.scope]
        if not record.changes:
            self._report(step, "nothing changed")
        elif state.problem:
            self._skip(step, state.problem)
        elif self._adapter is None:
            self._skip(step, "the pass changes the interface and ships no adapter")
        else:
            self._check(_Case(self, step, graph, state, self._adapter, self._before), rw)

    def _start(self, graph: Graph) -> _State:
        state = _State(graph, Call({}))
        try:
            state.call = seeded_call(graph, self.sizes, self.seed)
            state.results = self._runner.run(graph, state.call, state.ranges)
        except CheckError as error:
            state.problem = error.message
        return state

    def _check(self, case: _Case, rw: Rewriter) -> None:
        state = case.state
        try:
            call = case.adapter.call(state.call)
        except (KeyError, IndexError, ValueError, StopIteration) as error:
            self._skip(case.step, f"its adapter does not fit this model: {type(error).__name__} {error}")
            return
        if changed := case.interface_change():
            raise self._mismatch(case, rw, changed, None)
        ranges = Ranges()
        try:
            results = self._runner.run(case.graph, call, ranges)
        except CheckError as error:
            if case.only_loss:
                self._skip(case.step, error.message)
                return
            raise self._mismatch(case, rw, f"the graph does not run any more: {error.message}", None) from error
        roots = [a.root for a in rw.applications]
        found = case.compare(results, roots)
        if found is not None and not found.compared:
            self._skip(case.step, "there is no output on both sides")
            return
        if found is not None and found.wrong is not None and case.rounds and not found.wrong.why:
            case = self._with_noise(case, results, roots)
            found = case.compare(results, roots)
        if found is not None and found.wrong is not None:
            raise self._mismatch(case, rw, str(found.wrong), found.wrong)
        self._report(case.step, case.sentence(found, results) + _range(state.ranges, ranges))
        self._states[case.step.scope] = _State(case.graph, call, results, ranges)

    def _skip(self, step: Step, why: str) -> None:
        """Say that a pass was not held to anything; what follows is held to what it left."""
        self._report(step, f"not compared: {why}", compared=False)
        self._states = {}

    def _report(self, step: Step, sentence: str, *, compared: bool = True) -> None:
        self.checked.append(Checked(step, sentence, compared))
        if self._say is not None:
            self._say(self.checked[-1])

    def run(self, case: _Case, graph: Graph, watch: Callable[..., None] | None = None) -> Results:
        """Results of a graph after the pass of ``case``, or part of it."""
        return self._runner.run(graph, case.adapter.call(case.state.call), watch)

    def run_baseline(
        self, case: _Case, roots: Sequence[str], watch: Callable[..., None] | None = None, *, jitter: bool = False
    ) -> Results:
        """What the pass promises: results of its reference definition, else of the graph before."""
        reference = case.reference(roots)
        if reference is None and watch is None and not jitter:
            return case.state.results
        runner = self._jittering if jitter else self._runner
        if reference is not None:
            return runner.run(reference, case.adapter.reference_call(case.state.call), watch)
        return runner.run(case.before or case.graph, case.state.call, watch)

    def _with_noise(self, case: _Case, results: Results, roots: Sequence[str]) -> _Case:
        """The case, knowing what rounding alone does to each output."""
        exact, moved = (case.pairs(self.run_baseline(case, roots, jitter=j), results) for j in (False, True))
        return replace(case, noise=noise_of(exact, moved))

    def _mismatch(self, case: _Case, rw: Rewriter, what: str, wrong: Difference | None) -> NumericMismatch:
        """Find the application and the value, and say both; leaves the graph as it was before the pass."""
        total = len(rw.applications)
        message = f"{case.step}: {case.promise}, but {what}"
        if not self.locates:
            return NumericMismatch(message)
        rw.rollback()
        application = first_application(case.item, case.graph, total, lambda tried: self._verdict(case, tried))
        lines: list[str] = []
        if application is not None:
            rule = f"{application.rule} at " if application.rule != case.item.name else ""
            place = f"{application.root or 'the whole graph'}{in_model(application.provenance)}"
            lines.append(f"first wrong at application {application.index} of {total}: {rule}{place}")
        value = self._first_value(case, application)
        if value is not None:
            lines.append(f"first value that differs: {value[0]}{value[1]}")
        if application is not None:
            lines += [f"  {line}" for line in shown_change(case.item, case.graph, application)]
        broken = NumericMismatch(message, "\n  ".join(lines) or None)
        broken.application, broken.difference = application, value[0] if value is not None else wrong
        broken.pass_name, broken.total = case.item.name, total
        return broken

    def _verdict(self, case: _Case, rw: Rewriter) -> Verdict:
        try:
            found = case.compare(self.run(case, rw.graph), [a.root for a in rw.applications])
        except CheckError:
            return Verdict.BAD
        return Verdict.BAD if found is not None and found.wrong is not None else Verdict.GOOD

    def _first_value(self, case: _Case, application: Application | None) -> tuple[Difference, str] | None:
        """The first value that differs, and where the model has it; looks only where the pass changed something."""
        limit = application.index if application is not None else None
        found = twins(case.item, case.graph, limit)
        with applied(case.item, case.graph, limit) as rw:
            roots = [a.root for a in rw.applications]
            after = Capture({twin.name for twin in found})
            try:
                self.run(case, case.graph, after)
            except CheckError:
                return None
        before, moved = (Capture({twin.before for twin in found}) for _ in range(2))
        self.run_baseline(case, roots, before)
        if case.rounds:
            self.run_baseline(case, roots, moved, jitter=True)
        for twin in found:
            if twin.name not in after.values or twin.before not in before.values:
                continue
            left, right = before.values[twin.before][0], after.values[twin.name][0]
            if left.shape == right.shape and left.dtype == right.dtype:
                again = moved.values.get(twin.before, [left])[0]
                noise = noise_of([Pair(twin.name, left, right)], [Pair(twin.name, again, right)])
                wrong = compare([Pair(twin.name, left, right)], case.tolerance, noise).wrong
                if wrong is not None:
                    return wrong, in_model(twin.provenance)
        return None


@dataclass(frozen=True)
class _Case:
    """One pass under check, and what it is held against."""

    check: CheckNumerics
    step: Step
    graph: Graph
    state: _State
    adapter: Adapter
    before: Graph | None
    noise: Mapping[str, float] = field(default_factory=dict)

    @property
    def item(self) -> Pass:
        return self.step.item

    @property
    def kind(self) -> Kind:
        return self.item.kind

    @property
    def tolerance(self) -> float | None:
        if self.kind is Kind.EXACT and not has_half(self.graph):
            return None
        return self.check.tolerance if self.check.tolerance is not None else tolerance_of(self.graph)

    @property
    def rounds(self) -> bool:
        """True where the noise of rounding may excuse a difference: no exact pass, no tolerance of a person's own."""
        return self.before is not None and self.check.tolerance is None

    @property
    def has_reference(self) -> bool:
        """True for a lossy pass with a definition."""
        return type(self.item).reference is not Pass.reference

    @property
    def only_loss(self) -> bool:
        """True for a lossy pass without a definition."""
        return self.kind is Kind.LOSSY and not self.has_reference

    @property
    def promise(self) -> str:
        """What the kind of the pass says."""
        return {
            Kind.EXACT: "an exact pass",
            Kind.REASSOCIATING: "a reassociating pass",
            Kind.LOSSY: "a lossy pass with a definition",
            Kind.INTERFACE: "an interface pass, compared through its adapter",
        }[self.kind]

    def reference(self, roots: Sequence[str]) -> Graph | None:
        """The pass's definition for those applications; None where it has none."""
        if self.before is None or not self.has_reference:
            return None
        return self.item.reference(copy(self.before), frozenset(roots))

    def interface_change(self) -> str:
        """What another kind than an interface pass has done to inputs or outputs, empty for nothing."""
        if self.kind is Kind.INTERFACE:
            return ""
        call, outputs = self.state.call.of(0), self.state.results[0]
        inputs = [value.name for value in self.graph.inputs]
        for what, old, new in (("input", list(call), inputs), ("output", list(outputs), list(self.graph.outputs))):
            gone, added = [n for n in old if n not in new], [n for n in new if n not in old]
            if gone or added:
                return f"the {what} {gone[0]!r} is gone" if gone else f"the {what} {added[0]!r} is new"
        return ""

    def pairs(self, baseline: Results, results: Results) -> Iterator[Pair]:
        """What must agree, and extra outputs, which only interface passes may add."""
        call = self.adapter.reference_call(self.state.call) if self.has_reference else self.state.call
        return self.adapter.pairs(call, baseline, results)

    def compare(self, results: Results, roots: Sequence[str]) -> Comparison | None:
        """None for a lossy pass without a reference, of which only the loss can be told."""
        if self.only_loss:
            return None
        return compare(self.pairs(self.check.run_baseline(self, roots), results), self.tolerance, self.noise)

    def sentence(self, found: Comparison | None, results: Results) -> str:
        """The result in words."""
        cost = ""
        if self.kind is Kind.LOSSY:
            lost = loss(self.adapter.pairs(self.state.call, self.state.results, results))
            cost = str(lost) if lost is not None else "no float output to tell the loss of"
        if found is None:
            return f"no definition to compare with; {cost}"
        if self.tolerance is None:
            return f"equal bit for bit in {found.compared} output{'s' if found.compared > 1 else ''}"
        by = {Kind.INTERFACE: "through its adapter ", Kind.LOSSY: "by its definition "}.get(self.kind, "")
        flips = f", {found.flips} of {found.codes} codes one step apart" if found.flips else ""
        excused = f" ({NOISE} x what rounding its weights does)" if self._excused(found.worst) else ""
        return f"{by}{_off(found.worst)}{excused}{flips}" + (f"; {cost}" if cost else "")

    def _excused(self, worst: Difference | None) -> bool:
        return worst is not None and worst.error > 0 and worst.allowed > (self.tolerance or 0) * (worst.scale or 1)


def _off(worst: Difference | None) -> str:
    if worst is None or worst.error == 0:
        return "equal"
    return f"off by {worst.error:.1e} on a scale of {worst.scale:.3g} ({worst.name}), {worst.allowed:.1e} allowed"


def _range(before: Ranges, after: Ranges) -> str:
    """The range of what is computed now, and where the first NaN or infinity is, if there was none before."""
    new = [f"{kind} appears, first in {name}" for kind, name in after.turned.items() if kind not in before.turned]
    span = [f"values in [{after.low:.3g}, {after.high:.3g}]"] if after.low <= after.high else []
    return "".join(f"; {part}" for part in [*span, *new])

"""Random pipelines of every registered pass, and the examiner that holds each pass to what it promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import unified_diff
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from vacc_opt.ir import Graph, Literal
from vacc_opt.ir.copy import copy
from vacc_opt.ir.errors import UserError, VaccError
from vacc_opt.ir.infer import InferenceError
from vacc_opt.ir.rewriter import RewriteError, Rewriter
from vacc_opt.ir.storage import write_safetensors
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import InvalidGraph, verify_origins
from vacc_opt.passes.infra.base import Kind, Pass
from vacc_opt.passes.infra.check.numerics import CheckNumerics, NumericMismatch
from vacc_opt.passes.infra.instrument import Instrument, PassRecord, Report, Step
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.options import Option
from vacc_opt.passes.infra.pipeline import Item, dump_pipeline, parse_pipeline
from vacc_opt.passes.infra.registry import all_passes
from vacc_opt.passes.infra.scopes import Decode, Fixpoint, Functions, Prefill
from vacc_opt.tests.passes.graphs import Draw

SIZES = {"batch": 2, "seq": 7, "past": 5}
CONTEXT = 32
# values of options that are neither flags nor best left alone
CHOICES: dict[str, tuple[Any, ...]] = {
    "context": (CONTEXT, 48),
    "positions": (CONTEXT, 64),
    "tp": (2, 1, 3),
    "max_elements": (1 << 16, 4, 0),
    "max_eps": (1e-3, 1e-7),
    "to": ("float16", "float", "bfloat16"),
    "new_tokens": ("float", "quantized"),
    "include": ("", "proj|gate"),
    "exclude": ("", "k_proj"),
    "only": ("", "local::Part0"),
    "other_masks": ("refuse",),
}
# how a model goes to the accelerator; other passes, and other orders, are drawn around it
ROUTE = (
    "inline-functions", "simplify", "fuse-rms-norm", "fuse-rotary", "split-packed-linear", "fuse-gqa", "fuse-swiglu",
    "slice-last-token", "kv-cache", "w8a16", "kv8", "cast-float", "split-tp", "fuse-residual-norm", "legalize",
    "expand-ranks",
)  # fmt: skip
OWN_DEFECTS = (InvalidGraph, NumericMismatch, RewriteError, InferenceError)


def kv_scales(folder: Path) -> Callable[[Graph], str]:
    """Gives the path of a file of KV scales for a model, and writes it when it is not there yet."""

    def path(graph: Graph) -> str:
        past = graph.input_named("past_key_values.0.key")
        heads, depth = (past.shape[1], past.shape[3]) if past is not None and past.shape is not None else (1, 4)
        file = folder / f"kv_{heads}x{depth}.safetensors"
        if not file.exists():
            rng = np.random.default_rng(0)
            size = (heads, depth)
            stored = {
                f"layers.{layer}.{what}.{part}": Literal(rng.uniform(low, high, size).astype(np.float32))
                for layer in range(2)
                for what in ("key", "value")
                for part, low, high in (("scale", 0.02, 0.03), ("zero", -0.2, 0.2))
            }
            write_safetensors(file, stored)
        return str(file)

    return path


def _value(draw: Draw, option: Option, scales: str) -> Any:
    if option.name == "scales":
        return scales
    if option.name in CHOICES:
        return draw(st.sampled_from(CHOICES[option.name]))
    if option.type == "bool":
        return draw(st.sampled_from((option.default, not option.default)))
    return option.default


def drawn_pass(draw: Draw, cls: type[Pass], scales: str) -> Pass:
    """A pass with drawn options."""
    return cls(**{o.name: _value(draw, o, scales) for o in cls.options()})


@st.composite
def pipelines(draw: Draw, scales: str, *, model: bool, holding: str = "") -> tuple[Item, ...]:
    """Valid pipelines: for a model mostly along the route to the accelerator, else any passes in any allowed order.

    ``holding`` is the name of a pass that is in each of them.
    """
    registered = all_passes()
    items: list[Item] = []
    if model and draw(st.integers(0, 3)):
        items = [drawn_pass(draw, registered[n], scales) for n in ROUTE if n == holding or draw(st.integers(0, 7))]
    elif holding:
        items = [drawn_pass(draw, registered[holding], scales)]
    for _ in range(draw(st.integers(0, 2) if len(items) > 1 else st.integers(1, 6))):
        cls = registered[draw(st.sampled_from(sorted(registered)))]
        _insert(items, draw(st.integers(0, len(items))), drawn_pass(draw, cls, scales))
    if len(items) > 1 and draw(st.booleans()):
        at = draw(st.integers(0, len(items) - 1))
        count = draw(st.integers(1, 3))
        items[at : at + count] = [Fixpoint(body=tuple(items[at : at + count]))]
    if draw(st.booleans()):
        names = draw(st.lists(st.sampled_from(sorted(registered)), min_size=1, max_size=2))
        body = tuple(drawn_pass(draw, registered[name], scales) for name in names)
        _insert(items, len(items), draw(st.sampled_from((Prefill(body, seq=4), Decode(body), Functions(body)))))
    return tuple(items)


def _insert(items: list[Item], at: int, item: Item) -> None:
    """Put an item in, unless the place is wrong."""
    longer = [*items[:at], item, *items[at:]]
    try:
        parse_pipeline(dump_pipeline(longer))
    except UserError:
        return
    items[:] = longer


@dataclass
class Tally:
    """What happened over many cases, so that a test that examines nothing is seen."""

    runs: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    unlike: Counter[str] = field(default_factory=Counter)  # sentences of what could not be compared


class Numerics(CheckNumerics):
    """The check of values, which remembers from one item of a pipeline to the next what the graph gives."""

    def __init__(self) -> None:
        super().__init__(sizes=SIZES)
        self.locates = False
        self.fresh = True

    def started(self, graph: Graph, items: Sequence[Item]) -> None:
        if self.fresh:
            super().started(graph, items)
        self.fresh = False

    def finished(self, report: Report) -> None:
        pass


class Examiner(Instrument):
    """Asserts after each pass what must hold of any pass, and of its kind."""

    def __init__(self, numerics: CheckNumerics, tally: Tally) -> None:
        self.numerics, self.tally = numerics, tally
        self.trace: list[str] = []
        self.text = ""
        self.version: tuple[Graph | None, int] = None, 0
        self.interface: object = None

    def before(self, step: Step, graph: Graph) -> None:
        if self.version != (graph, graph.version):
            self.text = to_text(graph)
        self.interface = _interface(graph)

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        item = step.item
        text = to_text(graph)
        self.tally.runs[item.name] += 1
        self.tally.changed[item.name] += bool(record.changes)
        self.trace += [text, record.summary, *map(str, record.remarks)]
        verify_origins(graph, after=str(step))
        if record.changes:
            assert to_text(from_text(text)) == text, f"{step}: the text of the graph is not read back as it was"
        else:
            assert text == self.text, f"{step}: says that it changed nothing"
        if item.kind in (Kind.EXACT, Kind.REASSOCIATING):
            assert _interface(graph) == self.interface, f"{step}: another interface"
        self._shapes(step, graph)
        checked = self.numerics.checked[-1]
        self.tally.compared[item.name] += bool(record.changes) and checked.compared
        if not checked.compared:
            self.tally.unlike[f"{item.name}: {checked.sentence}"[:200]] += 1
        if item.idempotent and record.changes:
            self._again(step, graph)
        self.text, self.version = text, (graph, graph.version)

    def _shapes(self, step: Step, graph: Graph) -> None:
        """What onnxruntime computes has the shapes and types that the graph says."""
        state = self.numerics._states.get(step.scope)
        if state is None or not state.results:
            return
        for name, array in state.results[0].items():
            value = graph.outputs[name]
            sizes = _sizes(graph, state.call.of(0))
            shape = value.type.bind(sizes).shape
            assert array.dtype == value.type.dtype.numpy, f"{step}: {name} is {array.dtype}, {value.type} is said"
            known = [(a, b) for a, b in zip(shape or array.shape, array.shape, strict=True) if isinstance(a, int)]
            cached = graph.input_named("pos") is not None  # the check runs with shorter buffers than the graph has
            assert cached or all(a == b for a, b in known), f"{step}: {name} is {array.shape}, {value.type} is said"

    def _again(self, step: Step, graph: Graph) -> None:
        twin = copy(graph)
        try:
            (record,) = run_pipeline(twin, [step.item]).records
        except OWN_DEFECTS:
            raise
        except VaccError:
            return  # a refusal changes nothing either
        changes = list(unified_diff(to_text(graph).splitlines(), to_text(twin).splitlines(), n=0))[3:]
        assert not record.changes, f"{step}: a second run changes the graph: {record.summary}; {changes[:4]}"

    def failed(self, step: Step, graph: Graph, error: Exception) -> None:
        if isinstance(error, VaccError) and not isinstance(error, OWN_DEFECTS):
            self.tally.refused[step.item.name] += 1
            self.trace.append(str(error))
        assert to_text(graph) == self.text, f"{step} failed and left another graph: {error}"


def _interface(graph: Graph) -> object:
    return [(v.name, v.type) for v in graph.inputs], [(n, v.type.dtype) for n, v in graph.outputs.items()]


def _sizes(graph: Graph, given: dict[str, Any]) -> dict[str, int]:
    """The named sizes of a call, from the inputs whose sizes are single names."""
    sizes: dict[str, int] = {}
    for value in graph.inputs:
        for dim, size in zip(value.shape or (), given[value.name].shape if value.name in given else (), strict=False):
            if not isinstance(dim, int):
                sizes.setdefault(str(dim), int(size))
    return sizes


def run(text: str, items: Sequence[Item], tally: Tally, *, check: bool) -> list[str]:
    """Run the items one by one, going on behind what is refused; gives all texts, summaries, remarks and refusals."""
    graph = from_text(text)
    numerics, recorder = Numerics(), _Recorder()
    examiner = Examiner(numerics, tally)
    instruments: list[Instrument] = [numerics, examiner] if check else [recorder]
    for item in items:
        try:
            run_pipeline(graph, [item], instruments=instruments)
        except OWN_DEFECTS:
            raise
        except VaccError:
            pass
    return examiner.trace if check else recorder.trace


class _Recorder(Instrument):
    """The trace of an examiner, without the examination."""

    def __init__(self) -> None:
        self.trace: list[str] = []

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        self.trace += [to_text(graph), record.summary, *map(str, record.remarks)]

    def failed(self, step: Step, graph: Graph, error: Exception) -> None:
        self.trace.append(str(error))


def examine(graph: Graph, items: Sequence[Item], tally: Tally) -> None:
    """All that must hold of a pipeline on a graph; an AssertionError holds both as text, ready to paste."""
    text, spec = to_text(graph), dump_pipeline(items)
    try:
        assert parse_pipeline(spec) == list(items), "the pipeline's text is read as another pipeline"
        assert to_text(from_text(text)) == text, "the text of the drawn graph is not read back as it was"
        trace = run(text, items, tally, check=True)
        assert run(text, items, tally, check=False) == trace, "two runs differ"
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n\n{text}\n# pipeline: {spec}\n") from error

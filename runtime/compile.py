"""The driver of ``compile``: configuration, graph, passes, calibration, schedules, artifact, reported step by step.

What it decides is which rooms run in which order; every transformation is a registered pass.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vacc_opt.backends.vacc import Program, Target, load_target, target_file
from vacc_opt.backends.vacc.timing import Timing
from vacc_opt.frontends.checkpoint import resolve_path
from vacc_opt.frontends.config_notes import notes
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Graph
from vacc_opt.passes.infra.instrument import Report
from vacc_opt.passes.infra.keep_origins import KeepOrigins
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.show.remarks import Entry, entries, to_yaml
from vacc_opt.passes.shard.split_tp import head_plans
from vacc_opt.runtime import plan as planning
from vacc_opt.runtime.artifact import REMARKS, TARGET, Artifact, is_artifact, write_artifact
from vacc_opt.runtime.cache import Cache, kept_graph, kept_schedule
from vacc_opt.runtime.calibrate import LAYERS_FILE, Calibrated, calibrate, layers_text
from vacc_opt.runtime.files import check_place, remove_abandoned, scratch_directory
from vacc_opt.runtime.kept_weights import KeptWeights
from vacc_opt.runtime.machine import machine
from vacc_opt.runtime.measure import cache_bytes, weight_bytes
from vacc_opt.runtime.memory import PeakMemory
from vacc_opt.runtime.models import describe, format_bytes, load_model
from vacc_opt.runtime.plan import Plan, plan_compilation
from vacc_opt.runtime.planned import made_up_scales, planned_files
from vacc_opt.runtime.progress import ByteProgress
from vacc_opt.runtime.report import REPORT, CompileReport, Fused, ModelFacts, PhaseSchedule, Step, TargetFacts
from vacc_opt.runtime.stamps import checkpoint_stamp
from vacc_opt.runtime.stored import PhaseModel, weight_file
from vacc_opt.runtime.tokenizer import Tokenizer, load_tokenizer
from vacc_opt.runtime.unchanged import Unchanged, artifact_key, remember_artifact, unchanged_artifact
from vacc_opt.runtime.workers import each

# passes whose counts people look for, by the word that the summary uses
COUNTED = {"fuse-gqa": "attention", "fuse-rotary": "rotary", "fuse-rms-norm": "norm", "fuse-swiglu": "swiglu"}
_SCRATCH = "vacc-opt-compile-"


class Listener(Protocol):
    """Hears how a compilation goes."""

    def line(self, text: str) -> None:
        """A line of its own: the name of what is compiled."""

    def running(self, text: str, done: int = 0, of: int | None = None) -> None:
        """What runs now, and how much of it is done where that is known."""

    def done(self, name: str, sentence: str, seconds: float | None = None) -> None:
        """A step ended."""


@dataclass
class _Run:
    """The state of one compilation: what was reported so far, and who hears it."""

    plan: Plan
    listener: Listener
    cache: Cache
    steps: list[Step] = field(default_factory=list)
    remarks: list[Entry] = field(default_factory=list)
    fused: dict[str, Fused] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str, running: str) -> Iterator[list[str]]:
        """Time a block; the lines that it appends become the step's sentence."""
        self.listener.running(f"{name}: {running}")
        started = time.perf_counter()
        said: list[str] = []
        yield said
        step = Step(name, "\n".join(said), time.perf_counter() - started)
        self.steps.append(step)
        self.listener.done(step.name, step.sentence, step.seconds)

    def passes(self, graph: Graph, pipeline: str) -> Report:
        """Run passes, keeping their remarks and counts."""
        report = run_pipeline(graph, pipeline, instruments=[KeepOrigins()])
        self.remarks += entries(report.records)
        for record in report.records:
            if record.name in COUNTED and record.fused is not None:
                self.fused[COUNTED[record.name]] = Fused(record.fused, record.candidates or record.fused)
        return report


@dataclass(frozen=True)
class _Lowered:
    """A phase with its program and predicted time."""

    graph: Graph
    program: Program
    timing: Any


def compile_model(
    file: Path,
    overrides: Sequence[str],
    listener: Listener,
    *,
    plan_only: bool = False,
    what_if: Sequence[str] = (),
) -> CompileReport:
    """Compile as the YAML ``file`` says, with ``dotted.key=value`` overrides, and write the artifact.

    With ``what_if``, ``KEY=VALUE`` numbers of the target, it is compiled for that machine, whose file is written.
    With ``plan_only`` everything is done but what reads weights: nothing is calibrated (scales have made-up values
    and every linear is taken for one that becomes int8, which is what sizes and times depend on), nothing is written.

    Raises:
        UserError: the configuration or the checkpoint cannot be used; nothing is written.
        CheckError: a pass, the verifier or a bound did not hold; nothing is written.
    """
    started = time.perf_counter()
    with PeakMemory() as peak:
        plan = plan_compilation(file, overrides)
        if not plan_only:
            check_place(plan.output, is_artifact)
        target = machine(plan.config.backend.target, what_if)
        run = _Run(plan, listener, Cache.of(plan.config.workspace.path, keeps=not plan_only))
        listener.line(plan.config.name)
        _note_keys(run)
        key = "" if plan_only else artifact_key(plan, target)
        unchanged = None if plan_only else unchanged_artifact(plan, run.cache, key)
        if unchanged is not None:
            return _unchanged(run, unchanged, peak, started)
        graph, tokenizer = _export(run)
        with run.step("recognize", "fuse") as said:
            run.passes(graph, plan.recognize)
            said.append("   ".join(f"{name} {count}" for name, count in run.fused.items()))
        temporary = Path(tempfile.gettempdir())
        remove_abandoned(temporary, _SCRATCH)
        with scratch_directory(temporary, _SCRATCH) as scratch:
            calibrated = Calibrated() if plan_only else _calibrate(run, graph, tokenizer, scratch)
            run.passes(graph, plan.interface)
            if plan_only and plan.cache_int8:
                calibrated = Calibrated(scales=made_up_scales(graph, scratch))
            _quantize(run, graph, calibrated)
            _split(run, graph)
            lowered = _schedule(run, graph, target)
            facts = _facts(run, graph, lowered, target)
            if plan_only:
                files = planned_files([_phase_model(one) for one in lowered])
            else:
                files = _write(run, lowered, facts, target, tokenizer, calibrated).files
        if not plan_only:
            remember_artifact(plan, run.cache, key, [step.name for step in run.steps if step.name != "config"])
    seconds = time.perf_counter() - started
    return CompileReport(
        name=plan.config.name,
        path=None if plan_only else str(plan.output),
        facts=facts,
        files=files,
        steps=tuple(run.steps),
        peak_memory_bytes=peak.bytes,
        seconds=seconds,
    )


def _unchanged(run: _Run, found: Unchanged, peak: PeakMemory, started: float) -> CompileReport:
    """Say of each step that nothing was to be done."""
    for name in found.steps:
        with run.step(name, "cached") as said:
            said.append("cached")
    made = found.artifact
    return CompileReport(
        name=made.name,
        path=str(run.plan.output),
        facts=made.facts,
        files=made.files,
        steps=tuple(run.steps),
        peak_memory_bytes=peak.bytes,
        seconds=time.perf_counter() - started,
    )


def _note_keys(run: _Run) -> None:
    """Say what keys of the file mean here that mean something else upstream, or steer only its compiler."""
    found = notes(run.plan.config)
    if found:
        width = max(len(key) for key, _ in found)
        with run.step("config", "keys") as said:
            said += [f"{key:<{width}}  {text}" for key, text in found]


def _export(run: _Run) -> tuple[Graph, Tokenizer | None]:
    frontend = run.plan.config.frontend
    with run.step("export", frontend.checkpoint) as said:
        graph, kept = _load(run)
        layers = run.plan.model.get("num_hidden_layers")
        kind = [frontend.attention] if frontend.type == "huggingface" else []
        cached = ["cached"] if kept else []
        said.append(", ".join([*cached, describe(graph), *([f"{layers} layers"] if layers else []), *kind]))
        tokenizer = find_tokenizer(
            frontend.checkpoint, lambda why: said.append(f"{why}: the artifact cannot `generate` from text")
        )
    return graph, tokenizer


def _load(run: _Run) -> tuple[Graph, bool]:
    """The graph of the checkpoint, and whether it was kept from an earlier export.

    Code that comes with a checkpoint may depend on anything, and an .onnx file is read as fast as what would be kept.
    """
    frontend = run.plan.config.frontend

    def load() -> Graph:
        return load_model(
            frontend.checkpoint,
            attention=frontend.attention,
            trust_remote_code=frontend.trust_remote_code,
            progress=lambda stage: run.listener.running(f"export: {stage}"),
        )

    if frontend.trust_remote_code or frontend.type == "onnx":
        return load(), False
    path = resolve_path(frontend.checkpoint)
    inputs = {"path": str(path), "stamp": checkpoint_stamp(path), "attention": frontend.attention}
    return kept_graph(run.cache, inputs, load)


def find_tokenizer(checkpoint: str, say: Callable[[str], None] = lambda why: None) -> Tokenizer | None:
    """The tokenizer that belongs to a checkpoint; None when it has none in a form that is read, and ``say`` hears why.

    Raises UserError for a tokenizer.json that is damaged.
    """
    from vacc_opt.frontends.checkpoint import resolve_path
    from vacc_opt.runtime.gguf_tokenizer import gguf_tokenizer

    path = resolve_path(checkpoint)
    if path.suffix == ".gguf":
        try:
            return gguf_tokenizer(path)
        except UserError as error:
            say(error.message.removeprefix(f"{path}: "))
            return None
    directory = path if path.is_dir() else path.parent
    if (directory / "tokenizer.json").is_file():
        return load_tokenizer(directory)
    say("no tokenizer beside the checkpoint")
    return None


def _calibrate(run: _Run, graph: Graph, tokenizer: Tokenizer | None, scratch: Path) -> Calibrated:
    """KV scales and codes of GPTQ, made here unless the configuration names them or the cache has them."""
    plan = run.plan
    if not plan.calibrates:
        return calibrate(plan, graph, tokenizer, scratch, run.listener.running)
    assert plan.config.dataset is not None  # plan_compilation refuses it
    with run.step("calibrate", plan.config.dataset.path) as said:
        found = calibrate(plan, graph, tokenizer, scratch, run.listener.running)
        said += found.sentences
    return found


def calibrate_model(file: Path, overrides: Sequence[str], listener: Listener) -> Calibrated:
    """Learn what ``compile`` would learn from calibration text, and keep it in the cache of the workspace.

    Raises:
        UserError: the configuration cannot be used, or has nothing to calibrate.
    """
    plan = plan_compilation(file, overrides)
    if not plan.calibrates:
        raise UserError(f"{file}: nothing is calibrated", "w8a16_gptq and kv8 without `kv_scales` learn from text")
    run = _Run(plan, listener, Cache.of(plan.config.workspace.path))
    listener.line(plan.config.name)
    graph, tokenizer = _export(run)
    with run.step("recognize", "fuse") as said:
        run.passes(graph, plan.recognize)
        said.append("   ".join(f"{name} {count}" for name, count in run.fused.items()))
    assert plan.config.dataset is not None
    with run.step("calibrate", plan.config.dataset.path) as said, tempfile.TemporaryDirectory() as scratch:
        found = calibrate(plan, graph, tokenizer, Path(scratch), listener.running)
        said += found.sentences
    return found


def _quantize(run: _Run, graph: Graph, calibrated: Calibrated) -> None:
    files = (calibrated.scales, calibrated.codes, calibrated.ranges)
    pipeline = run.plan.quantize(*(str(file or "") for file in files))
    if pipeline:
        with run.step("quantize", pipeline) as said:
            report = run.passes(graph, pipeline)
            said += [record.summary for record in report.records]


def _split(run: _Run, graph: Graph) -> None:
    with run.step("split", run.plan.split) as said:
        kwargs = run.plan.config.frontend.model_kwargs
        aligned = alignment(graph, kwargs.tp) if kwargs.align_qkv else ""
        report = run.passes(graph, run.plan.split)
        said += [line for line in (report.records[0].summary, aligned) if line]


def alignment(graph: Graph, tp: int) -> str:
    """What became of ``align_qkv``: heads are aligned wherever they do not divide over the ranks, asked for or not."""
    uneven = [plan for plan in head_plans(graph, tp) if not plan.even]
    return "align_qkv: needed and done" if uneven else f"align_qkv: not needed, heads divide by tp {tp}"


def _schedule(run: _Run, graph: Graph, target: Target) -> list[_Lowered]:
    lowered: list[_Lowered] = []
    with run.step("schedule", target.name) as said:
        run.passes(graph, run.plan.specialize)
        phases = list(graph.phases.items())
        run.listener.running(f"schedule: {', '.join(graph.phases)}")

        def one(index: int) -> tuple[Program, Timing, bool]:
            phase, bound = phases[index]
            return kept_schedule(run.cache, bound, target, phase)

        made = each(one, range(len(phases)), run.plan.config.workspace.workers)
        for (phase, bound), (program, timing, kept) in zip(phases, made, strict=True):
            lowered.append(_Lowered(bound, program, timing))
            facts = f"{'cached, ' if kept else ''}{_phase_facts(run, lowered[-1])}"
            said.append(f"{phase:<{max(map(len, graph.phases))}}  {facts}")
    return lowered


def _write(
    run: _Run,
    lowered: Sequence[_Lowered],
    facts: ModelFacts,
    target: Target,
    tokenizer: Tokenizer | None,
    calibrated: Calibrated,
) -> Artifact:
    from vacc_opt.backends.vacc.memory import memory_plan
    from vacc_opt.backends.vacc.report.html import LinearLoss, PhaseReport, render_report

    plan, kept = run.plan, KeptWeights(run.cache)
    with run.step("write", str(plan.output)) as said:
        phases = [PhaseReport(one.timing, memory_plan(one.program), one.program.kernels) for one in lowered]
        linears = [LinearLoss(**asdict(one)) for one in calibrated.layers]
        report = render_report(plan.config.name, phases, linears)
        artifact = write_artifact(
            plan.output,
            phases=[_phase_model(one) for one in lowered],
            facts={
                "entry_points": {one.name: one.to_json() for one in plan.entry_points},
                "model": dict(sorted(lowered[0].graph.metadata.items())),
                "made": facts.to_json(),
                **planning.input_facts(plan),
            },
            texts={
                REPORT: report,
                REMARKS: to_yaml(run.remarks),
                TARGET: _target_text(plan, target),
                **({LAYERS_FILE: layers_text(calibrated.layers)} if calibrated.layers else {}),
            },
            files=[calibrated.scales] if calibrated.scales is not None else [],
            tokenizer=tokenizer,
            progress=ByteProgress(run.listener.running, "write"),
            kept=kept,
        )
        cached = f", {len(kept.linked)} of them cached" if kept.linked else ""
        said.append(f"{artifact.ranks} ranks x {format_bytes(_rank_bytes(artifact))}{cached}")
    return artifact


def _target_text(plan: Plan, target: Target) -> str:
    """The file of the target as it was written; that of a changed machine is written here."""
    file = target_file(plan.config.backend.target)
    return file.read_text(encoding="utf-8") if load_target(file).sha == target.sha else target.to_yaml()


def _phase_model(one: _Lowered) -> PhaseModel:
    names = tuple(tensor.name for tensor in one.program.of_role("weight"))
    return PhaseModel(one.program.phase, one.graph, one.program.to_text(), names)


def _rank_bytes(artifact: Artifact) -> int:
    return int(artifact.manifest["files"][weight_file(0)]["bytes"])


def _phase_facts(run: _Run, one: _Lowered) -> PhaseSchedule:
    timing, program = one.timing, one.program
    entry = next(entry for entry in run.plan.entry_points if entry.name == program.phase)
    milliseconds = float(timing.milliseconds)
    return PhaseSchedule(
        phase=program.phase,
        kernels=len(program.kernels),
        calls=len(program.calls),
        text_bytes=len(program.to_text().encode()),
        tokens=entry.tokens,
        cycles=timing.cycles,
        bound_cycles=timing.bound.cycles,
        binds=timing.bound.binds,
        milliseconds=milliseconds,
        bound_milliseconds=timing.target.seconds(timing.bound.cycles) * 1e3,
        ddr_bytes=program.ddr_bytes,
    )


def _facts(run: _Run, graph: Graph, lowered: Sequence[_Lowered], target: Target) -> ModelFacts:
    linears, others = weight_bytes(graph)
    numbers = {path: value for path, value, source in target.numbers() if source == "assumed"}
    return ModelFacts(
        fused=dict(run.fused),
        ranks=graph.ranks,
        linears=linears,
        other_weights=others,
        kv_cache=cache_bytes(lowered[0].graph),
        phases=tuple(_phase_facts(run, one) for one in lowered),
        target=TargetFacts(target.name, target.version, target.sha, numbers),
    )

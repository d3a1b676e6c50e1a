"""Check an artifact again, as if nobody had: files, manifest, weights, graphs, target, schedules and their times.

Each check is a function from the artifact to what it says when all is well; what is wrong goes to a list. A check
rests on no other, so one damaged file is reported by what it breaks and hides nothing else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from vacc_opt.backends.vacc import Program, Target, load_target, verified_time
from vacc_opt.frontends import load_onnx
from vacc_opt.frontends.vamc_config import CompileConfig
from vacc_opt.ir.errors import UserError, VaccError
from vacc_opt.ir.storage import read_safetensors_header
from vacc_opt.ir.tensor import Source
from vacc_opt.passes.infra.pipeline import parse_pipeline
from vacc_opt.runtime.artifact import FORMAT_VERSION, MANIFEST, REMARKS, TARGET, is_artifact
from vacc_opt.runtime.integrity import damages
from vacc_opt.runtime.manifest import Manifest
from vacc_opt.runtime.models import format_bytes
from vacc_opt.runtime.progress import ByteProgress
from vacc_opt.runtime.report import REPORT, ModelFacts
from vacc_opt.runtime.stored import table_file, weight_file
from vacc_opt.runtime.tokenizer import load_tokenizer
from vacc_opt.runtime.workers import cores, each

Model = TypeVar("Model", bound=BaseModel)
_SHOWN = 8  # problems of one check that are said; the rest are counted


@dataclass(frozen=True)
class Check:
    """One check: what it found in order, or what is wrong."""

    name: str
    said: str
    problems: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    @property
    def sentence(self) -> str:
        """What a person reads of it."""
        if self.passed:
            return self.said
        rest = len(self.problems) - _SHOWN
        return "\n".join(["FAILED", *self.problems[:_SHOWN], *([f"and {rest} more"] if rest > 0 else [])])

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        return {**asdict(self), "passed": self.passed, "problems": list(self.problems)}


class Listener(Protocol):
    """Hears how the checks go."""

    def running(self, text: str, done: int = 0, of: int | None = None) -> None:
        """What runs now, and how much of it is done where that is known."""


@dataclass(frozen=True)
class Subject:
    """An artifact as it lies there; each part is read when a check asks for it."""

    path: Path
    listener: Listener

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """manifest.json, unchecked."""
        found: dict[str, Any] = json.loads((self.path / MANIFEST).read_bytes())
        return found

    @cached_property
    def target(self) -> Target:
        """The machine that it was compiled for."""
        return load_target(self.path / TARGET)

    @property
    def graphs(self) -> list[tuple[str, int]]:
        """(phase, rank) of every ONNX file."""
        return [(phase, rank) for phase in self.manifest["phases"] for rank in range(self.manifest["ranks"])]

    def header(self, rank: int) -> dict[str, Source]:
        """The stored weights of a rank."""
        return read_safetensors_header(self.path / weight_file(rank))

    def tables(self, phase: str, rank: int) -> dict[str, Source]:
        """What only one phase stores of a rank."""
        path = self.path / table_file(phase, rank)
        return read_safetensors_header(path) if path.name in self.manifest["files"] else {}


Problems = list[str]
CHECKS: dict[str, Callable[[Subject, Problems], str]] = {}


def _check(run: Callable[[Subject, Problems], str]) -> Callable[[Subject, Problems], str]:
    CHECKS[run.__name__.strip("_")] = run
    return run


def verify_artifact(path: Path, listener: Listener, names: Collection[str] = CHECKS) -> Iterator[Check]:
    """Run the checks of these names, by default all, one after the other; each is given as soon as it is done.

    Raises:
        UserError: there is no artifact at ``path``.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such artifact directory", "`vacc-opt compile CONFIG.yaml` makes one")
    if not is_artifact(path):
        raise UserError(f"{path}: not an artifact: no {MANIFEST} of ours", "give a directory that `compile` wrote")
    subject = Subject(path, listener)
    for name, run in CHECKS.items():
        if name not in names:
            continue
        listener.running(f"verify: {name}")
        started, problems, said = time.perf_counter(), Problems(), ""
        try:
            said = run(subject, problems)
        except VaccError as error:
            problems.append(error.message)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{type(error).__name__}: {error}")
        yield Check(name, said, tuple(problems), time.perf_counter() - started)


@_check
def _files(subject: Subject, problems: Problems) -> str:
    entries, started = subject.manifest["files"], time.perf_counter()
    found = damages(subject.path, entries, ByteProgress(subject.listener.running, "verify: files"))
    problems += [f"{name} {why}" for name, why in found.items()]
    more = sorted({p.name for p in subject.path.iterdir()} - set(entries) - {MANIFEST})
    total = sum(int(entry["bytes"]) for entry in entries.values())
    speed = total / max(time.perf_counter() - started, 1e-9)
    beside = f", beside them {', '.join(more)}" if more else ""
    return f"{len(entries)} files as they were written, {format_bytes(total)}, {format_bytes(speed)}/s{beside}"


@_check
def _manifest(subject: Subject, problems: Problems) -> str:
    manifest = _validated(Manifest, subject.manifest, "", problems)
    if manifest is None:
        return ""
    ranks = range(manifest.ranks)
    needed = {weight_file(rank) for rank in ranks} | {REPORT, REMARKS, TARGET}
    for phase in manifest.phases:
        needed |= {f"{phase}.schedule", *(f"{phase}.rank{rank}.onnx" for rank in ranks)}
    problems += [f"{MANIFEST}: does not list {name}" for name in sorted(needed - set(manifest.files))]
    if list(manifest.phases) != list(manifest.entry_points):
        problems.append(f"{MANIFEST}: phases are {list(manifest.phases)}, entry points {list(manifest.entry_points)}")
    if manifest.format_version != FORMAT_VERSION:
        problems.append(f"{MANIFEST}: format {manifest.format_version}, this vacc-opt reads {FORMAT_VERSION}")
    facts = ModelFacts.from_json(manifest.made)
    if [one.phase for one in facts.phases] != list(manifest.phases) or facts.ranks != manifest.ranks:
        problems.append(f"{MANIFEST}: what was made has other phases or ranks")
    config = {**manifest.config}
    if "dataset" in config:  # beside what the file said there is the digest of the text
        config["dataset"] = {key: value for key, value in config["dataset"].items() if key != "sha256"}
    _validated(CompileConfig, config, "config.", problems)
    passes = len(parse_pipeline(manifest.pipeline))
    kinds = ", ".join(manifest.phases)
    return f"{kinds}; {manifest.ranks} ranks; {passes} passes; vacc-opt {manifest.vacc_opt}"


def _validated(model: type[Model], data: Any, above: str, problems: Problems) -> Model | None:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems += [f"{MANIFEST}: {above}{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return None


@_check
def _weights(subject: Subject, problems: Problems) -> str:
    names = 0
    for rank in range(subject.manifest["ranks"]):
        file = subject.path / weight_file(rank)
        at: int | None = None
        for tensor in sorted(subject.header(rank).values(), key=lambda one: (one.offset, one.nbytes)):
            if at is not None and tensor.offset != at:
                problems.append(
                    f"{file.name}: {tensor.name} begins at byte {tensor.offset}, the one before ends at {at}"
                )
            at = tensor.offset + tensor.nbytes
            names += 1
        if at is not None and at != file.stat().st_size:
            problems.append(f"{file.name}: the last tensor ends at byte {at}, the file has {file.stat().st_size}")
    return f"{names} tensors side by side in {subject.manifest['ranks']} files"


@_check
def _graphs(subject: Subject, problems: Problems) -> str:
    graphs = subject.graphs

    def one(index: int) -> tuple[list[str], int]:
        return _graph(subject, *graphs[index])

    constants = 0
    for index, (found, count) in enumerate(each(one, range(len(graphs)), cores())):
        subject.listener.running("verify: graphs", index + 1, len(graphs))
        problems += found
        constants += count
    return f"{len(graphs)} ONNX files load; {constants} constants lie where their rank stores them"


def _graph(subject: Subject, phase: str, rank: int) -> tuple[list[str], int]:
    """What is wrong with an ONNX file, and how many constants it takes from the file of its rank."""
    file = subject.path / f"{phase}.rank{rank}.onnx"
    entry = subject.manifest["phases"][phase]
    try:
        graph, stored, tables = load_onnx(file), subject.header(rank), subject.tables(phase, rank)
    except (VaccError, OSError, ValueError) as error:
        return [f"{file.name}: {error}"], 0
    found = []
    for what, values in (("inputs", {v.name: v for v in graph.inputs}), ("outputs", graph.outputs)):
        if {name: str(value.type) for name, value in values.items()} != entry[what]:
            found.append(f"{file.name}: its {what} are not those of {MANIFEST}")
    sources = {v.name: v.const for v in graph.constants() if isinstance(v.const, Source)}
    for name, source in sources.items():
        home = table_file(phase, rank) if name in tables else weight_file(rank)
        place = tables.get(name) or stored.get(entry["weight_names"].get(name, name))
        if Path(source.file).name != home:
            found.append(f"{file.name}: {name} lies in {source.file}, not in {home}")
        elif place is None:
            found.append(f"{file.name}: {name} is not among the tensors of {home}")
        elif (place.offset, place.nbytes) != (source.offset, source.nbytes):
            found.append(f"{file.name}: {name} lies at byte {source.offset}, it is stored at {place.offset}")
    return found, len(sources)


@_check
def _target(subject: Subject, problems: Problems) -> str:
    target, made = subject.target, subject.manifest["made"]["target"]
    if (target.name, target.version, target.sha) != (made["name"], made["version"], made["sha"]):
        problems.append(f"{TARGET} is {target.name} v{target.version} ({target.sha}), compiled was for {made['sha']}")
    return f"{target.name} v{target.version} ({target.sha}), {len(target.assumed)} numbers assumed"


@_check
def _schedules(subject: Subject, problems: Problems) -> str:
    phases = list(subject.manifest["phases"])
    facts = {one.phase: one for one in ModelFacts.from_json(subject.manifest["made"]).phases}

    def one(index: int) -> tuple[list[str], str]:
        return _schedule(subject, phases[index], facts[phases[index]].cycles)

    said = []
    for found, sentence in each(one, range(len(phases)), cores()):
        problems += found
        said.append(sentence)
    return "\n".join(said)


def _schedule(subject: Subject, phase: str, cycles: int) -> tuple[list[str], str]:
    """What is wrong with the schedule of a phase, and what it is."""
    file = subject.path / f"{phase}.schedule"
    text = file.read_text(encoding="utf-8")
    try:
        program = Program.from_text(text)
        timing = verified_time(program, subject.target)
    except VaccError as error:
        return [f"{file.name}: {error.message}"], ""
    found = []
    if program.to_text() != text:
        found.append("is not what its program prints")
    if (program.phase, program.ranks) != (phase, subject.manifest["ranks"]):
        found.append(f"is of {program.phase} on {program.ranks} ranks")
    entry = subject.manifest["entry_points"][phase]
    sizes = (program.tensor["input_ids"].shape[-1], {t.shape[2] for t in program.of_role("cache") if len(t.shape) == 4})
    if sizes[0] != entry["tokens"] or sizes[1] - {entry["context"]}:
        found.append(f"takes {sizes[0]} tokens over buffers of {sorted(sizes[1])}, {MANIFEST} says {entry}")
    if timing.cycles != cycles:
        found.append(f"takes {timing.cycles} cycles, {MANIFEST} says {cycles}")
    found += _unstored(subject, phase, program)
    kernels = f"{len(program.kernels)} kernels, {len(program.calls)} calls"
    return [f"{file.name}: {one}" for one in found], f"{phase}: {kernels}, verified, {cycles} cycles as predicted"


def _unstored(subject: Subject, phase: str, program: Program) -> Sequence[str]:
    """Weights of a schedule that a rank does not store in as many bytes."""
    names = subject.manifest["phases"][phase]["weight_names"]
    found = []
    for rank in range(program.ranks):
        stored, tables = subject.header(rank), subject.tables(phase, rank)
        for tensor in program.of_role("weight"):
            place = tables.get(tensor.name) or stored.get(names.get(tensor.name, tensor.name))
            if place is None or place.nbytes != tensor.bytes:
                found.append(f"reads {tensor.name}, of which {weight_file(rank)} has not {tensor.bytes} bytes")
    return found


@_check
def _tokenizer(subject: Subject, problems: Problems) -> str:
    if not (subject.path / "tokenizer.json").is_file():
        return "none"
    text = "vacc-opt 0"
    tokenizer = load_tokenizer(subject.path)
    if text not in tokenizer.decode(tokenizer.encode(text)):
        problems.append(f"tokenizer.json: {text!r} does not come back from its tokens")
    return "text comes back from its tokens"

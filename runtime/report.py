"""What a compilation did, in numbers: steps, fusions, bytes, schedules, prediction, and what the prediction assumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vacc_opt.runtime.models import format_bytes

REPORT = "report.html"


@dataclass(frozen=True)
class Step:
    """A finished step: a sentence (its lines are separate facts) and seconds."""

    name: str
    sentence: str
    seconds: float


@dataclass(frozen=True)
class Fused:
    """How many places a pass rewrote, of how many where it was to be expected."""

    done: int
    of: int

    def __str__(self) -> str:
        return f"{self.done}/{self.of}"


@dataclass(frozen=True)
class Bytes:
    """Bytes as stored over all ranks, and of the same numbers in fp16; ``dtype`` of most of them."""

    dtype: str
    stored: int
    fp16: int

    def __str__(self) -> str:
        return f"{self.dtype}, {format_bytes(self.stored)} ({format_bytes(self.fp16)} in fp16)"


@dataclass(frozen=True)
class PhaseSchedule:
    """The schedule of a phase and its predicted time, with the lower bound that no schedule on the target beats."""

    phase: str
    kernels: int
    calls: int
    text_bytes: int
    tokens: int
    cycles: int
    bound_cycles: int
    binds: str
    milliseconds: float
    bound_milliseconds: float
    ddr_bytes: int

    @property
    def ratio(self) -> float:
        """Predicted time over the lower bound."""
        return self.cycles / self.bound_cycles if self.bound_cycles else 1.0

    def __str__(self) -> str:
        return f"{self.kernels} kernels, {self.calls} calls, {self.ratio:.2f} x bound ({self.binds})"


@dataclass(frozen=True)
class TargetFacts:
    """The machine that was compiled for, and its numbers that nobody published or measured, by dotted path."""

    name: str
    version: int
    sha: str
    assumed: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.name} v{self.version}: {len(self.assumed)} numbers assumed" if self.assumed else self.name


@dataclass(frozen=True)
class ModelFacts:
    """What was made: the same for equal inputs, and so part of the artifact's manifest."""

    fused: Mapping[str, Fused]
    ranks: int
    linears: Bytes
    other_weights: Bytes
    kv_cache: Bytes
    phases: tuple[PhaseSchedule, ...]
    target: TargetFacts

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``; ratios are included."""
        found = asdict(self)
        for entry, phase in zip(found["phases"], self.phases, strict=True):
            entry["ratio"] = round(phase.ratio, 4)
        return found

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ModelFacts:
        """Read :meth:`to_json` back."""
        phases = [{name: value for name, value in phase.items() if name != "ratio"} for phase in data["phases"]]
        return ModelFacts(
            fused={name: Fused(**count) for name, count in data["fused"].items()},
            ranks=data["ranks"],
            linears=Bytes(**data["linears"]),
            other_weights=Bytes(**data["other_weights"]),
            kv_cache=Bytes(**data["kv_cache"]),
            phases=tuple(PhaseSchedule(**phase) for phase in phases),
            target=TargetFacts(**data["target"]),
        )

    def summary(self) -> list[tuple[str, str]]:
        """(label, fact) pairs in the order in which people ask."""
        each = (self.linears.stored + self.other_weights.stored) // self.ranks
        rows = [("fused", "   ".join(f"{name} {count}" for name, count in self.fused.items()))]
        rows.append(("ranks", f"{self.ranks}, {format_bytes(each)} of weights each"))
        if self.linears.stored:
            rows.append(("linears", str(self.linears)))
        rows.append(("other weights" if self.linears.stored else "weights", str(self.other_weights)))
        rows.append(("KV cache", str(self.kv_cache)))
        times = [f"{p.milliseconds / p.tokens:.3f} ms a token" for p in self.phases]
        width = max(map(len, times))
        rows += [(p.phase, f"{time:>{width}}   {p}") for p, time in zip(self.phases, times, strict=True)]
        rows.append(("target", str(self.target)))
        return rows


@dataclass(frozen=True)
class CompileReport:
    """All of a compilation: what was made, and what it took; ``peak_memory_bytes`` is of the process tree.

    ``files``: bytes by name. Without a ``path`` nothing was written, and they are those that would be.
    """

    name: str
    path: str | None
    facts: ModelFacts
    files: Mapping[str, int]
    steps: tuple[Step, ...]
    peak_memory_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``, the facts among them; ``bytes`` are those of all ``files``."""
        found = asdict(self)
        del found["facts"]
        return {**found, "bytes": sum(self.files.values()), **self.facts.to_json()}

    def summary(self) -> list[tuple[str, str]]:
        """(label, fact) pairs in the order in which people ask."""
        weights = {size for name, size in self.files.items() if name.startswith("rank") and not name.endswith(".onnx")}
        each = f"{self.facts.ranks} ranks x {format_bytes(max(weights))} of weights"
        total = f"{len(self.files)} files, {format_bytes(sum(self.files.values()))}"
        slowest = sorted(self.steps, key=lambda step: -step.seconds)[:3]
        shares = ", ".join(f"{step.name} {step.seconds:.1f} s" for step in slowest)
        rows = [("written", f"{total}, {each}") if self.path is not None else ("to write", each)]
        rows.append(("time", f"{self.seconds:.1f} s ({shares})"))
        rows.append(("peak memory", f"{format_bytes(self.peak_memory_bytes)} (compiler and its child processes)"))
        if self.path is not None:
            rows.append(("report", f"{self.path}/{REPORT}"))
        return [*self.facts.summary(), *rows]

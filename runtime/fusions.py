"""What each fusion behind linears gains: a model is lowered and timed with all of them, and without each in turn."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vacc_opt.runtime.sweep import Progress, source_of

if TYPE_CHECKING:
    from vacc_opt.backends.vacc import Target
    from vacc_opt.backends.vacc.fusion import Fusion
    from vacc_opt.ir.graph import Graph

ALL, NONE = "all", "none"


@dataclass(frozen=True)
class FusedTime:
    """A phase lowered with some fusions: predicted cycles, DDR bytes of a rank, kernels and calls of its program.

    `fusions` is `all`, `none`, or `no NAME`: all but one.
    """

    phase: str
    fusions: str
    cycles: int
    ddr_bytes: int
    kernels: int
    calls: int


@dataclass(frozen=True)
class FusionGains:
    """The phases of a model on a target, each with all fusions first, then without each, last without any."""

    model: str
    target: str
    times: tuple[FusedTime, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        return asdict(self)

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Phase, choice, cycles and DDR bytes, each also over those with all fusions, kernels, calls."""
        whole = {one.phase: one for one in self.times if one.fusions == ALL}
        for one in self.times:
            best = whole[one.phase]
            times = f"{one.cycles / best.cycles:.4f}", f"{one.ddr_bytes / best.ddr_bytes:.4f}"
            shown = one.phase, one.fusions, str(one.cycles), times[0], str(one.ddr_bytes), times[1]
            yield (*shown, str(one.kernels), str(one.calls))


HEAD = ("phase", "fusions", "cycles", "x all", "DDR bytes", "x all", "kernels", "calls")


def fusion_gains(source: Path, overrides: Sequence[str], progress: Progress) -> FusionGains:
    """Lower and time the phases of an artifact or a configuration for each choice of fusions; no weight is read.

    `overrides` set keys of a configuration. Raises UserError as :func:`sweep` does.
    """
    name, target, load = source_of(source, overrides, progress)
    times = tuple(one for phase, graph in load().items() for one in fused_times(graph, target, phase, progress))
    return FusionGains(name, f"{target.name} v{target.version} ({target.sha})", times)


def fused_times(graph: Graph, target: Target, phase: str, progress: Progress = lambda _: None) -> Iterator[FusedTime]:
    """The graph of a phase, lowered and timed with all fusions, without each, and without any."""
    from vacc_opt.backends.vacc import lower, verified_time
    from vacc_opt.backends.vacc.fusion import EVERY

    choices: dict[str, Collection[Fusion]] = {ALL: EVERY}
    choices |= {f"no {one.value}": [other for other in EVERY if other is not one] for one in EVERY}
    for name, fusions in (choices | {NONE: ()}).items():
        progress(f"{phase}, {name}")
        program = lower(graph, target, phase=phase, fusions=fusions)
        timing = verified_time(program, target)
        moved = sum(one.bytes * one.calls for one in timing.kernels.values())
        yield FusedTime(phase, name, timing.cycles, moved, len(program.kernels), len(program.calls))

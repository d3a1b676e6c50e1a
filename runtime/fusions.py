"""What each fusion behind linears gains: a model is lowered and timed with all of them, and without each in turn."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vacc_opt.runtime.sweep import Progress, source_of

if TYPE_CHECKING:
    from vacc_opt.backends.vacc import Program, Target
    from vacc_opt.backends.vacc.fusion import Fusion
    from vacc_opt.ir.graph import Graph

ALL, NONE = "all", "none"


@dataclass(frozen=True)
class FusedTime:
    """A phase lowered with some fusions: predicted cycles, DDR bytes of a rank, kernels and calls of its program.

    `activation_bytes` are those of tensors between calls, each once a call that reads or writes it. `fusions` is `all`,
    `none`, or `no NAME`: all but one.
    """

    phase: str
    fusions: str
    cycles: int
    ddr_bytes: int
    activation_bytes: int
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
        """Phase, choice; cycles, DDR bytes, those of activations, each over that of all fusions; kernels, calls."""
        whole = {one.phase: one for one in self.times if one.fusions == ALL}
        for one in self.times:
            best = whole[one.phase]
            shown = [one.phase, one.fusions]
            for name in ("cycles", "ddr_bytes", "activation_bytes"):
                number, least = getattr(one, name), getattr(best, name)
                shown += [str(number), f"{number / least:.4f}"]
            yield (*shown, str(one.kernels), str(one.calls))


HEAD = ("phase", "fusions", "cycles", "x all", "DDR bytes", "x all", "of activations", "x all", "kernels", "calls")


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
        between = activation_bytes(program)
        yield FusedTime(phase, name, timing.cycles, moved, between, len(program.kernels), len(program.calls))


def activation_bytes(program: Program) -> int:
    """DDR bytes of what calls hand to each other: of every call the operands that are neither weight nor cache."""
    return sum(
        program.kernel[call.kernel].param[one.name].bytes
        for call in program.calls
        for one in call.arguments
        if program.tensor[one.tensor].role not in ("weight", "cache")
    )

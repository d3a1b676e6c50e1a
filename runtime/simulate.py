"""Time a phase of an artifact: its schedule text, verified again, on the target that it was compiled for."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vacc_opt.ir.errors import UserError
from vacc_opt.passes.infra.show.files import check_place
from vacc_opt.runtime.artifact import TARGET, open_artifact
from vacc_opt.runtime.entry_points import DECODE
from vacc_opt.runtime.machine import changed


@dataclass(frozen=True)
class KernelTime:
    """One kernel: its calls, their cycles together, and the bound of one call."""

    name: str
    calls: int
    cycles: int
    bound_cycles: int
    binds: str


@dataclass(frozen=True)
class Simulation:
    """Predicted time of one call of a phase with ``context`` tokens cached, and where the cycles went.

    ``tiles_of`` is the machine that the schedule was made for, when the one that it is timed on is another.
    """

    phase: str
    ranks: int
    context: int
    cycles: int
    milliseconds: float
    bound_cycles: int
    binds: str
    ratio: float
    kernels: tuple[KernelTime, ...]
    account: dict[str, int]
    target: str
    assumed: int
    tiles_of: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        return asdict(self)

    def text(self) -> str:
        """A table for people, kernels with most cycles first."""
        head = (
            f"{self.phase}: {self.milliseconds:.3f} ms, {self.cycles} cycles, {self.ratio:.2f} x bound ({self.binds})"
        )
        width = max((len(k.name) for k in self.kernels), default=6)
        lines = [head, f"  {'kernel':<{width}}  calls    cycles  share  x bound  binds"]
        for kernel in self.kernels:
            bound = kernel.bound_cycles * kernel.calls
            ratio = f"{kernel.cycles / bound:7.2f}" if bound else f"{'-':>7}"
            share = kernel.cycles / max(self.cycles, 1)
            lines.append(
                f"  {kernel.name:<{width}}  {kernel.calls:>5} {kernel.cycles:>9} {share:>6.1%}  {ratio}  {kernel.binds}"
            )
        lines.append(f"  target {self.target}, {self.assumed} of its numbers are assumed")
        if self.tiles_of is not None:
            lines.append(f"  tiles are those that were chosen for {self.tiles_of}: `sweep` and `compile` choose anew")
        return "\n".join(lines)


def simulate(
    path: Path,
    phase: str,
    *,
    context: int | None = None,
    trace: Path | None = None,
    what_if: Sequence[str] = (),
) -> Simulation:
    """Predict the time of a phase; ``trace`` receives a Chrome trace.

    ``context`` tokens are cached before the call: by default none in a prefill, as many as fit in a decode.
    With ``what_if``, ``KEY=VALUE`` numbers of the target, the schedule is timed on that machine as it stands.

    Raises:
        UserError: no such artifact or phase, a context that does not fit, or no such number of the target.
        ScheduleError: the schedule breaks a rule on its target or on the changed one.
    """
    from vacc_opt.backends.vacc import Program, load_target, verified_time, write_trace

    if trace is not None:
        check_place(trace)
    artifact = open_artifact(path)
    entry = artifact.find_phase(phase)
    program = Program.from_text(artifact.schedule(entry.name))
    most = entry.most_cached
    cached = context if context is not None else most if entry.kind == DECODE else 0
    if not 0 <= cached <= most:
        raise UserError(
            f"context {cached} does not fit: {entry.name} starts after 0 to {most} of {entry.context} tokens"
        )
    compiled_for = load_target(artifact.path / TARGET)
    target = changed(compiled_for, what_if)
    if what_if and program.target_sha == compiled_for.sha:  # the same text, for the machine that it is timed on
        program = replace(program, target=target.name, target_sha=target.sha)
    timing = verified_time(program, target, context=cached)
    if trace is not None:
        with tempfile.TemporaryDirectory(prefix=".vacc-opt-", dir=trace.absolute().parent) as scratch:
            write_trace(timing, Path(scratch) / trace.name)
            (Path(scratch) / trace.name).replace(trace)
    kernels = [
        KernelTime(k.name, k.calls, k.cycles * k.calls, k.bound.cycles, k.bound.binds) for k in timing.kernels.values()
    ]
    return Simulation(
        phase=entry.name,
        ranks=timing.ranks,
        context=cached,
        cycles=timing.cycles,
        milliseconds=timing.milliseconds,
        bound_cycles=timing.bound.cycles,
        binds=timing.bound.binds,
        ratio=timing.ratio,
        kernels=tuple(sorted(kernels, key=lambda k: (-k.cycles, k.name))),
        account=dict(timing.account),
        target=f"{target.name} v{target.version}",
        assumed=len(target.assumed),
        tiles_of=None if target.sha == compiled_for.sha else f"{compiled_for.name} v{compiled_for.version}",
    )

"""Render the report from its template; every figure in it is read from a Timing or a MemoryPlan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vacc_opt.backends.vacc.memory import MemoryPlan
from vacc_opt.backends.vacc.report import charts
from vacc_opt.backends.vacc.schedule import Kernel
from vacc_opt.backends.vacc.timing import KernelTiming, Timing


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """One phase of a model: its timing, its DDR plan, and the kernels whose SRAM is shown."""

    timing: Timing
    memory: MemoryPlan
    kernels: tuple[Kernel, ...] = ()


@dataclass(frozen=True, slots=True)
class LinearLoss:
    """What int8 costs a linear [N, K]: the share of its output's energy that is lost, by GPTQ and by rounding.

    ``kept``: it stays float.
    """

    name: str
    shape: tuple[int, int]
    loss: float
    rounding_loss: float
    kept: bool


@dataclass(frozen=True, slots=True)
class _Row:
    kernel: KernelTiming
    total: int
    share: float
    bar: Markup


def render_report(title: str, phases: Sequence[PhaseReport], linears: Sequence[LinearLoss] = ()) -> str:
    """The report of `phases` (at least one, all on one target) as one HTML page without external assets.

    With `linears` it says what GPTQ measured.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "size": size}
    target = phases[0].timing.target
    return environment.get_template("report.html.jinja").render(
        title=title,
        target=target,
        phases=[_phase(phase) for phase in phases],
        colors=charts.COLORS,
        linears=linears,
    )


def count(value: float) -> str:
    """A number with thousands separators: 1234567 is 1,234,567."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,g}"


def size(value: int) -> str:
    """Bytes as B, KiB, MiB or GiB with three significant digits."""
    amount = float(value)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.3g} GiB"


def _phase(phase: PhaseReport) -> dict[str, object]:
    timing = phase.timing
    rows = [
        _Row(kernel, kernel.cycles * kernel.calls, kernel.cycles * kernel.calls / max(timing.cycles, 1), _bar(kernel))
        for kernel in timing.kernels.values()
    ]
    rows.sort(key=lambda row: (-row.total, row.kernel.name))
    kernels = [one for one in phase.kernels if one.buffers]
    account = [(name, cycles, cycles / max(timing.cycles, 1)) for name, cycles in timing.account.items()]
    return {
        "timing": timing,
        "memory": phase.memory,
        "rows": rows,
        "account": sorted(account, key=lambda one: (-one[1], one[0])),
        "roofline": Markup(charts.roofline(timing)),
        "ddr_map": Markup(charts.ddr_map(phase.memory, len(timing.calls))),
        "sram_map": Markup(charts.sram_map(kernels, timing.target.core.sram)) if kernels else "",
    }


def _bar(kernel: KernelTiming) -> Markup:
    return Markup(charts.account_bar(kernel.busiest.cycles, kernel.cycles))

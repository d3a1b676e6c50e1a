"""Inline SVG charts of the report: roofline, maps of DDR and SRAM, bars of cycle accounts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

from vacc_opt.backends.vacc.memory import MemoryPlan, Region
from vacc_opt.backends.vacc.schedule import Kernel
from vacc_opt.backends.vacc.target import Sram
from vacc_opt.backends.vacc.timing import Timing

COLORS = {
    "busy": "#2a7f62",
    "data": "#d08c2e",
    "slot": "#b5533c",
    "outstanding": "#8a4f7d",
    "latency": "#4a7bb0",
    "drained": "#b9bec6",
}
WIDTH, HEIGHT, LEFT, BOTTOM, PAD = 720, 320, 70, 40, 16


def account_bar(account: Mapping[str, int], total: int, width: int = 180) -> str:
    """A bar of `width` pixels split as the account splits `total` cycles."""
    parts, x = [], 0.0
    for reason, cycles in account.items():
        length = width * cycles / max(total, 1)
        if cycles:
            title = f"<title>{escape(reason)}: {cycles:,} cycles</title>"
            parts.append(
                f'<rect x="{x:.2f}" y="0" width="{length:.2f}" height="12" fill="{COLORS[reason]}">{title}</rect>'
            )
        x += length
    return f'<svg class="bar" width="{width}" height="12" role="img">{"".join(parts)}</svg>'


def roofline(timing: Timing) -> str:
    """MACs a DDR byte against MACs a cycle, both logarithmic, a point a kernel that uses the array."""
    target = timing.target
    peak = max(target.core.matrix.macs_per_cycle.values()) * target.die.cores
    rate = target.die.ddr.effective_bytes_per_cycle
    kernels = [one for one in timing.kernels.values() if one.macs and one.bytes and one.cycles]
    ridge = peak / rate
    intensities = [one.macs / one.bytes for one in kernels] + [ridge]
    speeds = [one.macs / one.cycles for one in kernels] + [peak]
    low_x, high_x = decades(min(intensities), max(intensities) * 2)
    low_y, high_y = decades(min([*speeds, rate * 10**low_x]), peak)
    x, y = axis(low_x, high_x, LEFT, WIDTH - PAD), axis(low_y, high_y, HEIGHT - BOTTOM, PAD)
    parts = [_grid(low_x, high_x, low_y, high_y)]
    for dtype, macs in target.core.matrix.macs_per_cycle.items():
        top = macs * target.die.cores
        roof = [(10.0**low_x, rate * 10**low_x), (top / rate, top), (10.0**high_x, top)]
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in roof)
        parts.append(f'<polyline class="roof" points="{points}"/>')
        parts.append(f'<text x="{WIDTH - PAD}" y="{y(top) + 14:.1f}" text-anchor="end">{dtype}</text>')
    parts += _points([(one.name, one.macs / one.bytes, one.macs / one.cycles) for one in kernels], x, y)
    return svg("roofline", "".join(parts), "MAC / DDR byte", "MAC / cycle of a die")


def _points(
    kernels: Sequence[tuple[str, float, float]], x: Callable[[float], float], y: Callable[[float], float]
) -> Iterator[str]:
    """A point a kernel (name, MAC/B, MAC/cycle), its label moved down until it is clear of the others."""
    labels: list[tuple[float, float]] = []
    for name, intensity, speed in sorted(kernels, key=lambda one: (-one[2], one[0])):
        across, down = x(intensity), y(speed)
        title = escape(f"{name}: {intensity:.3g} MAC/B, {speed:,.0f} MAC/cycle")
        yield f'<circle cx="{across:.1f}" cy="{down:.1f}" r="5"><title>{title}</title></circle>'
        place = down + 4
        while any(abs(across - a) < 110 and abs(place - b) < 12 for a, b in labels):
            place += 4
        labels.append((across, place))
        yield f'<text x="{across + 9:.1f}" y="{place:.1f}">{escape(name)}</text>'


def ddr_map(plan: MemoryPlan, calls: int) -> str:
    """Address against call: what is kept for good (one band) and the intermediate tensors while they are alive."""
    top = max(plan.bytes - plan.persistent_bytes, 1)

    def x(call: float) -> float:
        return LEFT + (WIDTH - LEFT - PAD) * call / max(calls, 1)

    def y(address: float) -> float:
        return PAD + (HEIGHT - BOTTOM - PAD - 24) * (1 - (address - plan.persistent_bytes) / top)

    parts = [
        _region(region, x(region.first), x(region.last + 1), y(region.end), y(region.offset))
        for region in plan.regions
        if not region.persistent
    ]
    floor = y(plan.persistent_bytes)
    parts.append(f'<rect class="kept" x="{LEFT}" y="{floor:.1f}" width="{WIDTH - LEFT - PAD}" height="24"/>')
    kept = f"weights, KV cache, inputs: {plan.persistent_bytes:,} bytes (not to scale)"
    parts.append(f'<text x="{LEFT + 8}" y="{floor + 16:.1f}">{kept}</text>')
    return svg("ddr", "".join(parts), f"call 0 to {max(calls - 1, 0)}", f"{top:,} bytes")


def _region(region: Region, left: float, right: float, top: float, bottom: float) -> str:
    title = f"{region.name}: {region.bytes:,} bytes at {region.offset:#x}, calls {region.first} to {region.last}"
    box = f'x="{left:.2f}" y="{top:.2f}" width="{right - left:.2f}" height="{max(bottom - top, 0.5):.2f}"'
    return f'<rect class="live" {box}><title>{escape(title)}</title></rect>'


def sram_map(kernels: Sequence[Kernel], sram: Sram) -> str:
    """Where the buffers of each kernel lie in the SRAM of a core, a row a kernel, and the bounds of the banks."""
    left, row = 3 * LEFT, 22
    bottom = PAD + row * len(kernels)

    def x(address: int) -> float:
        return left + (WIDTH - left - PAD) * address / sram.bytes

    parts = []
    for index, kernel in enumerate(kernels):
        top = PAD + row * index
        parts.append(f'<text x="{left - 8}" y="{top + 13}" text-anchor="end">{escape(kernel.name)}</text>')
        for one in kernel.buffers:
            to = f" -> {', '.join(one.consumers)}" if one.is_ring else ""
            told = f"{one.name}: {one.depth} x {one.slot_bytes:,} bytes at {one.offset:#x}, {one.producer}{to}"
            box = f'x="{x(one.offset):.2f}" y="{top}" width="{max(x(one.end) - x(one.offset), 0.5):.2f}" height="16"'
            parts.append(f'<rect class="live" {box}><title>{escape(told)}</title></rect>')
    ends = range(0, sram.bytes + 1, sram.bank_bytes or sram.bytes)
    parts += [f'<line class="bank" x1="{x(end):.2f}" x2="{x(end):.2f}" y1="{PAD - 6}" y2="{bottom}"/>' for end in ends]
    banks = f", {sram.banks} banks of {sram.bank_bytes:,} bytes" if sram.banks else ""
    label = f"{sram.bytes:,} bytes of a core{banks}"
    parts.append(f'<text class="axis" x="{WIDTH / 2}" y="{bottom + 20}" text-anchor="middle">{label}</text>')
    return f'<svg class="sram" viewBox="0 0 {WIDTH} {bottom + 28}" role="img">{"".join(parts)}</svg>'


def svg(kind: str, body: str, across: str, up: str) -> str:
    """A chart of the report's size with the names of its axes."""
    turned = f'transform="translate(14 {HEIGHT / 2}) rotate(-90)"'
    labels = (
        f'<text class="axis" x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>'
        f'<text class="axis" {turned} text-anchor="middle">{escape(up)}</text>'
    )
    return f'<svg class="{kind}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{body}{labels}</svg>'


def decades(low: float, high: float) -> tuple[int, int]:
    """Powers of ten below and above; at least one decade apart."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return first, max(last, first + 1)


def axis(low: int, high: int, start: float, stop: float) -> Callable[[float], float]:
    """A logarithmic axis from 10**low to 10**high: value to pixel."""
    scale = (stop - start) / (high - low)
    return lambda value: start + (math.log10(value) - low) * scale


def _grid(low_x: int, high_x: int, low_y: int, high_y: int) -> str:
    x, y = axis(low_x, high_x, LEFT, WIDTH - PAD), axis(low_y, high_y, HEIGHT - BOTTOM, PAD)
    parts = []
    for power in range(low_x, high_x + 1):
        place = x(10.0**power)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{PAD}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{place:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">1e{power}</text>')
    for power in range(low_y, high_y + 1):
        place = y(10.0**power)
        parts.append(f'<line class="grid" y1="{place:.1f}" y2="{place:.1f}" x1="{LEFT}" x2="{WIDTH - PAD}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">1e{power}</text>')
    return "".join(parts)

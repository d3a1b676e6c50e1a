"""Write a Timing as a Chrome trace (JSON) that Perfetto and chrome://tracing open.

Tracks: the calls, and each engine of each core; what collectives move in DDR, while the links go on, has its own. The
first call of a kernel shows every operation; later ones, which repeat it cycle by cycle, one span an engine. Counters:
DDR bytes a cycle and transfers in flight. Times are microseconds at the core clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vacc_opt.backends.vacc.timing import CallTiming, EngineAccount, KernelTiming, Timing

Event = dict[str, Any]
_MOVED = "link transfers"


def write_trace(timing: Timing, path: Path) -> None:
    """Write the trace of `timing` to `path`."""
    with path.open("w", encoding="utf-8") as stream:
        json.dump(trace(timing), stream, separators=(",", ":"))


def trace(timing: Timing) -> dict[str, Any]:
    """The trace as the JSON object that viewers expect: `traceEvents`, `displayTimeUnit`, `otherData`."""
    target = timing.target
    other = {"target": f"{target.name} v{target.version} {target.sha}", "phase": timing.phase, "ranks": timing.ranks}
    events = [*_tracks(timing), *_events(timing)]
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": other}


def _tracks(timing: Timing) -> Iterator[Event]:
    yield _meta("process_name", 0, 0, f"{timing.phase}: calls")
    yield _meta("thread_name", 0, 0, "calls")
    lanes = {(one.core, one.engine) for kernel in timing.kernels.values() for one in kernel.engines}
    lanes |= {(core, _MOVED) for core, engine in lanes if engine == "link"}
    order = _order(timing)
    for core in sorted({core for core, _ in lanes}):
        yield _meta("process_name", core + 1, 0, f"core {core}")
    for core, engine in sorted(lanes):
        yield _meta("thread_name", core + 1, order[engine], engine)


def _order(timing: Timing) -> Mapping[str, int]:
    """The number of each track of a core."""
    engines = sorted({one.engine for kernel in timing.kernels.values() for one in kernel.engines})
    return {name: index for index, name in enumerate([*engines, _MOVED], 1)}


def _events(timing: Timing) -> Iterator[Event]:
    clock = timing.target.clock_mhz
    order = _order(timing)
    seen: set[str] = set()
    for call in timing.calls:
        kernel = timing.kernels[call.kernel]
        bound = {"call": call.index, "cycles": kernel.cycles, "bound": kernel.bound.cycles, "binds": kernel.bound.binds}
        yield _span(call.kernel, 0, 0, call.start, call.end, clock, bound)
        detailed = call.kernel not in seen
        seen.add(call.kernel)
        for engine in kernel.engines:
            if engine.records:
                yield from _engine_spans(engine, call, order, clock, detailed)
        yield from _counters(kernel, call, clock, detailed)


def _engine_spans(
    engine: EngineAccount, call: CallTiming, order: Mapping[str, int], clock: float, detailed: bool
) -> Iterator[Event]:
    pid, lane = engine.core + 1, order[engine.engine]
    if not detailed:
        start, end = call.start + engine.records[0].spans[0][0], call.start + engine.records[-1].end
        yield _span(call.kernel, pid, lane, start, end, clock, dict(engine.cycles))
        return
    for record in engine.records:
        args = {"bytes": record.bytes} if record.bytes else {}
        *linked, worked = record.spans
        for first, last in linked:
            yield _span(record.label, pid, lane, call.start + first, call.start + last, clock, {})
        own = order[_MOVED] if linked else lane
        yield _span(record.label, pid, own, call.start + worked[0], call.start + worked[1], clock, args)


def _counters(kernel: KernelTiming, call: CallTiming, clock: float, detailed: bool) -> Iterator[Event]:
    """DDR traffic and transfers in flight: at every change in the first call, else the mean of the call."""
    if not detailed:
        rate = kernel.bytes / max(call.end - call.start, 1)
        yield _counter("DDR bytes a cycle", call.start, clock, rate)
        return
    changes: dict[int, list[float]] = {}
    for engine in kernel.engines:
        for record in engine.records:
            if record.bytes and record.end > record.start:
                rate = record.bytes / (record.end - record.start)
                for time, sign in ((record.start, 1), (record.end, -1)):
                    entry = changes.setdefault(time, [0.0, 0.0])
                    entry[0] += sign * rate
                    entry[1] += sign
    rate = in_flight = 0.0
    for time in sorted(changes):
        rate, in_flight = rate + changes[time][0], in_flight + changes[time][1]
        yield _counter("DDR bytes a cycle", call.start + time, clock, rate)
        yield _counter("DDR transfers", call.start + time, clock, in_flight)


def _meta(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _span(name: str, pid: int, tid: int, start: int, end: int, clock: float, args: Event) -> Event:
    times = {"ts": round(start / clock, 4), "dur": round((end - start) / clock, 4)}
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "args": args} | times


def _counter(name: str, time: int, clock: float, value: float) -> Event:
    return {"ph": "C", "name": name, "pid": 0, "ts": round(time / clock, 4), "args": {"value": round(abs(value), 3)}}

"""Predicted times of a model over numbers of its target: it is lowered, verified and timed anew for each point.

No weight is read. A configuration is planned with rounded codes and made-up KV scales, which have the sizes of
calibrated ones; an artifact is taken as its ONNX files say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vacc_opt.ir.errors import UserError, VaccError
from vacc_opt.ir.graph import Graph

if TYPE_CHECKING:
    from vacc_opt.backends.vacc import Target

Progress = Callable[[str], None]


@dataclass(frozen=True)
class PhaseTime:
    """One phase at one point: times of a call, prefill from an empty cache, decode with a full one."""

    phase: str
    milliseconds: float
    cycles: int
    bound_milliseconds: float
    bound_cycles: int
    ratio: float
    binds: str


@dataclass(frozen=True)
class Point:
    """The values of the keys, and what they make of each phase; `reason` says why the machine cannot run the model."""

    values: dict[str, int | float]
    target: str
    sha: str
    phases: tuple[PhaseTime, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Sweep:
    """Points in the order of the grid, the last key fastest; `keys` are dotted paths of target numbers."""

    model: str
    target: str
    keys: tuple[str, ...]
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        return asdict(self)

    def rows(self) -> Iterator[tuple[str, ...]]:
        """A line a point and phase: values, phase, ms, bound, ratio, what binds; or the reason."""
        for point in self.points:
            values = tuple(_shown(value) for value in point.values.values())
            if point.reason is not None:
                yield (*values, "-", "-", "-", "-", f"not possible: {point.reason}")
            for one in point.phases:
                times = f"{one.milliseconds:.3f}", f"{one.bound_milliseconds:.3f}", f"{one.ratio:.3f}"
                yield (*values, one.phase, *times, one.binds)

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the columns of `rows`."""
        return (*self.keys, "phase", "ms", "bound ms", "x bound", "binds")

    def html(self) -> str:
        """One page with a chart and the table."""
        from vacc_opt.backends.vacc.report.sweep import render_sweep

        title = f"{self.model} on {self.target}: {', '.join(self.keys)}"
        return render_sweep(title, self.keys[0], _lines(self), self.head, list(self.rows()))


def _lines(found: Sweep) -> list[Any]:
    from vacc_opt.backends.vacc.report.sweep import Line

    lines: dict[str, list[tuple[str, float, float, str]]] = {}
    for point in found.points:
        first, *others = point.values.items()
        fixed = ", ".join(f"{key}={_shown(value)}" for key, value in others)
        for one in point.phases:
            label = f"{one.milliseconds:.3f} ms, {one.ratio:.3f} x bound ({one.binds})"
            name = f"{one.phase} {fixed}".strip()
            at = _shown(first[1]), one.milliseconds, one.bound_milliseconds, label
            lines.setdefault(name, []).append(at)
    return [Line(name, tuple(points)) for name, points in lines.items()]


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def parse_over(texts: Sequence[str]) -> dict[str, tuple[int | float, ...]]:
    """The values of each key of ``ddr.bytes_per_cycle=50,100,200``; sizes may be `2MiB`. Raises UserError.

    >>> parse_over(["sram.bytes=1MiB,2MiB", "die.cores=8"])
    {'sram.bytes': (1048576, 2097152), 'die.cores': (8,)}
    """
    found: dict[str, tuple[int | float, ...]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--over {text}: no KEY=VALUE,VALUE", "such as --over ddr.bytes_per_cycle=50,100,200")
        if key.strip() in found:
            raise UserError(f"--over {key.strip()} is given twice", "write all of its values behind one")
        found[key.strip()] = tuple(dict.fromkeys(_number(text, one.strip()) for one in values.split(",")))
    if not found:
        raise UserError("nothing to sweep over", "such as --over ddr.bytes_per_cycle=50,100,200")
    return found


def _number(text: str, value: str) -> int | float:
    from vacc_opt.backends.vacc.target import parse_bytes

    size = parse_bytes(value)
    if isinstance(size, int):
        return size
    try:
        return float(value)
    except ValueError:
        raise UserError(f"--over {text}: `{value}` is no number", "numbers and sizes such as 2MiB") from None


def sweep(
    source: Path,
    over: Mapping[str, Sequence[int | float]],
    overrides: Sequence[str] = (),
    progress: Progress = lambda text: None,
) -> Sweep:
    """Times of the model of an artifact directory or a YAML file at every combination of the values in ``over``.

    Raises:
        UserError: the source cannot be used, or a key is no number of its target, or one of several.
    """
    from vacc_opt.backends.vacc.target import number_path, overlay

    name, target, load = source_of(source, overrides, progress)
    paths = [number_path(target, key) for key in over]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice:
        raise UserError(f"`{twice}` is swept over twice", "write all of its values behind one --over")
    graphs = load()
    points = []
    for values in product(*over.values()):
        named = dict(zip(over, values, strict=True))
        progress(", ".join(f"{key}={_shown(value)}" for key, value in named.items()))
        given = dict(zip(paths, values, strict=True))
        label = "+".join((target.name, ",".join(f"{key}={_shown(value)}" for key, value in named.items())))
        try:
            changed = overlay(target, given)
            points.append(Point(given, label, changed.sha, tuple(_times(graphs, changed))))
        except VaccError as error:
            points.append(Point(given, label, "", reason=error.message))
    return Sweep(name, f"{target.name} v{target.version} ({target.sha})", tuple(paths), tuple(points))


def source_of(
    source: Path, overrides: Sequence[str], progress: Progress
) -> tuple[str, Target, Callable[[], Mapping[str, Graph]]]:
    """Name, target, and what makes the graphs of the phases: keys are checked before that, it may take long."""
    from vacc_opt.backends.vacc import load_target
    from vacc_opt.runtime.artifact import TARGET, open_artifact

    if source.is_dir():
        if overrides:
            raise UserError("an artifact is compiled already: -D changes nothing", "name its configuration instead")
        artifact = open_artifact(source)
        progress("artifact")
        return (
            artifact.name,
            load_target(artifact.path / TARGET),
            lambda: {phase: artifact.rank_graph(phase, 0) for phase in artifact.phases},
        )
    from vacc_opt.runtime.plan import plan_compilation
    from vacc_opt.runtime.tp_plan import quantized_graph, split_graph

    plan = plan_compilation(source, overrides)
    target = load_target(plan.config.backend.target)
    return plan.config.name, target, lambda: split_graph(quantized_graph(plan, progress), plan, plan.tp)[1]


def _times(graphs: Mapping[str, Graph], target: Target) -> Iterator[PhaseTime]:
    from vacc_opt.backends.vacc import lower, verified_time

    for phase, graph in graphs.items():
        program = lower(graph, target, phase=phase)
        timing = verified_time(program, target)
        yield PhaseTime(
            phase=phase,
            milliseconds=timing.milliseconds,
            cycles=timing.cycles,
            bound_milliseconds=target.seconds(timing.bound.cycles) * 1e3,
            bound_cycles=timing.bound.cycles,
            ratio=timing.ratio,
            binds=timing.bound.binds,
        )

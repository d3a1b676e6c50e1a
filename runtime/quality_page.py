"""The page of an evaluation: the figures of every model, and a plot of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vacc_opt.runtime.quality import LayerQuality, ModelQuality

COLORS = ("#2a7f62", "#d08c2e", "#4a7bb0", "#b5533c", "#8a4f7d", "#5b6675")
_LEFT, _PAD, _FOOT = 52, 8, 18
_STEP = 20  # dB between lines of the grid
Point = tuple[float, float | None]


def render_page(title: str, facts: dict[str, Any], models: Sequence[ModelQuality]) -> str:
    """One HTML page without external assets; ``facts`` are those of the text and the reference."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": lambda value: f"{100 * value:+.3f} %", "kl": lambda value: f"{value:.3g}"}
    return environment.get_template("quality.html.jinja").render(
        title=title,
        facts=facts,
        models=[(model, COLORS[i % len(COLORS)]) for i, model in enumerate(models)],
        depth=Markup(_by_depth(models)),
        divergence=Markup(_by_position(models)),
        layers=[(layer, Markup(_of_layer(models, layer, _span(models)))) for layer in _layers(models)],
    )


def _layers(models: Sequence[ModelQuality]) -> list[int]:
    return sorted({one.layer for model in models for one in model.layers})


def _span(models: Sequence[ModelQuality]) -> Sequence[float]:
    """Every SNR by position: the plots of all layers share one scale, so that they can be compared."""
    return [y for model in models for one in model.layers for y in one.by_position if y is not None]


def _by_depth(models: Sequence[ModelQuality]) -> str:
    """SNR of the residual stream against the layer, a line a model."""
    lines = [[(one.layer, one.decibels) for one in model.layers if one.signal == "residual"] for model in models]
    title, last = "SNR of the residual stream in dB, from layer 0", max(_layers(models), default=0)
    return _plot(lines, [False] * len(lines), 720, 220, title, f"layer {last}")


def _by_position(models: Sequence[ModelQuality]) -> str:
    """KL divergence against the position in the window."""
    lines: list[list[Point]] = [[((low + high) / 2, kl) for low, high, kl in model.by_position] for model in models]
    title, last = (
        "KL divergence in nats, by position in the window",
        max((x for line in lines for x, _ in line), default=0),
    )
    return _plot(lines, [False] * len(lines), 720, 180, title, f"position {last:.0f}", step=None)


def _of_layer(models: Sequence[ModelQuality], layer: int, span: Sequence[float]) -> str:
    """SNR against the position: the residual stream behind the layer, and dashed what its attention gives."""
    lines: list[list[Point]] = []
    dashed: list[bool] = []
    for model in models:
        for signal in ("residual", "attention"):
            lines.append(
                [p for one in model.layers if (one.layer, one.signal) == (layer, signal) for p in _points(one)]
            )
            dashed.append(signal == "attention")
    return _plot(lines, dashed, 330, 140, f"layer {layer}: SNR in dB, by position", span=span)


def _points(one: LayerQuality) -> Iterator[Point]:
    yield from ((i, value) for i, value in enumerate(one.by_position))


def _plot(
    lines: Sequence[Sequence[Point]],
    dashed: Sequence[bool],
    width: int,
    height: int,
    title: str,
    end: str = "",
    *,
    step: float | None = _STEP,
    span: Sequence[float] = (),
) -> str:
    """A line chart; two lines of a model follow each other, the second dashed, and share its colour.

    ``end`` names the right end of the axis; numbers in ``span`` are inside the vertical scale too.
    """
    points = [(x, y) for line in lines for x, y in line if y is not None]
    if not points:
        return f"<p>{escape(title)}: no difference, or nothing to compare</p>"
    heights = [*(y for _, y in points), *span]
    right, low, high = max(x for x, _ in points) or 1, min(heights), max(heights)
    grid = step or max(high / 4, 1e-12)
    low, high = (grid * (low // grid), grid * (high // grid + 1)) if step else (0.0, high * 1.05 or 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        down = (high - y) / (high - low)
        return _LEFT + (width - _LEFT - _PAD) * x / right, _PAD + (height - _FOOT - _PAD) * down

    parts = [f'<text class="axis" x="{_LEFT}" y="{height - 4}">{escape(title)}</text>']
    parts.append(f'<text class="axis" x="{width - _PAD}" y="{height - 4}" text-anchor="end">{escape(end)}</text>')
    mark = low
    while mark <= high:
        y = place(0, mark)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _PAD}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{mark:.2g}</text>')
        mark += grid
    model = -1
    for line, is_dashed in zip(lines, dashed, strict=True):
        model += not is_dashed
        color = COLORS[model % len(COLORS)]
        drawn = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line if y is not None)
        style = ' stroke-dasharray="4 3"' if is_dashed else ""
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.6"{style} points="{drawn}"/>')
    return f'<svg class="plot" viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(parts)}</svg>'

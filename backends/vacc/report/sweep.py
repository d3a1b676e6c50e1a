"""The page of a sweep: a chart of predicted times over target numbers, and the table behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from vacc_opt.backends.vacc.report.charts import BOTTOM, HEIGHT, LEFT, PAD, WIDTH, axis, decades, svg

_COLORS = ("#2a7f62", "#d08c2e", "#4a7bb0", "#b5533c", "#8a4f7d", "#5b6675")
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #1c2430; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #e6e9ee; }
svg { width: 100%; max-width: 860px; } svg text { font: 11px system-ui, sans-serif; fill: #1c2430; }
.grid { stroke: #e6e9ee; } polyline { fill: none; stroke-width: 2; } .bound { stroke-dasharray: 3 3; stroke-width: 1; }
"""


@dataclass(frozen=True, slots=True)
class Line:
    """Times of one phase over the values of the first key, the others fixed: (value, milliseconds, bound, label)."""

    name: str
    points: tuple[tuple[str, float, float, str], ...]


def render_sweep(
    title: str, across: str, lines: Sequence[Line], head: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
    """One HTML page without external assets: `across` names the first key, `head` and `rows` are the table."""
    cells = "".join(f"<th>{escape(one)}</th>" for one in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<p>Predicted time of one call; dotted: the lower bound. The model is lowered again for each point.</p>\n"
        f"{sweep_chart(across, lines) if lines else ''}\n"
        f"<table><thead><tr>{cells}</tr></thead><tbody>\n{body}</tbody></table>\n</body>\n</html>\n"
    )


def sweep_chart(across: str, lines: Sequence[Line]) -> str:
    """Milliseconds (logarithmic) over the values of a key, which stand evenly spaced in the order given."""
    values = list(dict.fromkeys(value for line in lines for value, *_ in line.points))
    times = [time for line in lines for _, *both, _ in line.points for time in both if time > 0]
    low, high = decades(min(times), max(times))
    y = axis(low, high, HEIGHT - BOTTOM, PAD)
    x = {value: LEFT + (WIDTH - LEFT - PAD) * (place + 0.5) / len(values) for place, value in enumerate(values)}
    parts = [
        f'<line class="grid" y1="{y(10.0**n):.1f}" y2="{y(10.0**n):.1f}" x1="{LEFT}" x2="{WIDTH - PAD}"/>'
        f'<text x="{LEFT - 6}" y="{y(10.0**n) + 4:.1f}" text-anchor="end">{10.0**n:g}</text>'
        for n in range(low, high + 1)
    ]
    parts += [
        f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(value)}</text>'
        for value, at in x.items()
    ]
    for place, line in enumerate(lines):
        color = _COLORS[place % len(_COLORS)]
        for kind, index in (("time", 1), ("bound", 2)):
            points = " ".join(
                f"{x[one[0]]:.1f},{y(float(one[index])):.1f}" for one in line.points if float(one[index]) > 0
            )
            parts.append(f'<polyline class="{kind}" stroke="{color}" points="{points}"/>')
        for value, time, _, label in line.points:
            dot = f'<circle cx="{x[value]:.1f}" cy="{y(time):.1f}" r="4" fill="{color}">'
            parts.append(f"{dot}<title>{escape(f'{line.name}: {label}')}</title></circle>")
        last = line.points[-1]
        parts.append(
            f'<text x="{x[last[0]] + 8:.1f}" y="{y(last[1]) - 6:.1f}" fill="{color}">{escape(line.name)}</text>'
        )
    return svg("sweep", "".join(parts), across, "ms")

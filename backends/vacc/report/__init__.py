"""A self-contained HTML report of a program on a target: time by kernel with bounds, roofline, DDR map, assumptions."""

from vacc_opt.backends.vacc.report.html import PhaseReport, render_report

__all__ = ["PhaseReport", "render_report"]

"""What tests record under `summary` is printed after the results, also when they ran in another process."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, [])]
    for report in reports:
        for name, text in report.user_properties:
            if name == "summary":
                terminalreporter.write_line(f"{text}")

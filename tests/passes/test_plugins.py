"""Passes of other distributions: found by entry point, listed with the rest, and a clear word when one is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PASS = """
from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.passes.api import Capture, Kind, Match, Pattern, PatternPass, Rewriter, Value, op, register


@register
@dataclass(frozen=True)
class DoubleNeg(PatternPass):
    \"\"\"Drop a double negation.\"\"\"

    name: ClassVar[str] = "double-neg"
    kind: ClassVar[Kind] = Kind.EXACT

    def pattern(self, x: Capture) -> Pattern:
        return op.Neg(op.Neg(x))

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return m.x
"""


def run(site: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def install(site: Path, module: str, entry: str) -> None:
    (site / "extra_passes.py").write_text(module)
    info = site / "extra_passes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-passes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vacc_opt.passes]\nextra = {entry}\n")


OPT = "import sys; from vacc_opt.cli.main import main; sys.exit(main(sys.argv[1:]))"


def test_a_pass_of_another_distribution_runs_by_its_name(tmp_path: Path) -> None:
    install(tmp_path, PASS, "extra_passes")
    model = tmp_path / "m.vacc"
    model.write_text("g (float[2] x) => (float[2] y) { a = Neg (x) b = Neg (a) y = Exp (b) }")
    done = run(tmp_path, OPT, "opt", str(model), "-p", "double-neg{expect=1}")
    assert done.returncode == 0, done.stderr
    assert "y = Exp (x)" in done.stdout
    assert "Neg" not in done.stdout


def test_an_entry_point_may_name_the_class(tmp_path: Path) -> None:
    install(tmp_path, PASS.replace("@register\n", ""), "extra_passes:DoubleNeg")
    done = run(tmp_path, OPT, "passes", "double-neg")
    assert done.returncode == 0, done.stderr
    assert "Drop a double negation." in done.stdout


def test_a_distribution_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    install(tmp_path, "import no_such_module_at_all\n", "extra_passes")
    done = run(tmp_path, OPT, "passes")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: extra-passes: its passes 'extra_passes' cannot be loaded: ModuleNotFoundError"
    )
    assert "repair or uninstall extra-passes" in done.stderr


def test_a_name_that_is_taken_names_both(tmp_path: Path) -> None:
    install(tmp_path, PASS.replace('"double-neg"', '"simplify"'), "extra_passes")
    done = run(tmp_path, OPT, "passes")
    assert done.returncode == 2
    assert "two passes are called 'simplify'" in done.stderr

"""The command line as a person uses it: the files of this directory, run by lit and checked by filecheck."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from vacc_opt.passes.infra.registry import all_passes

HERE = Path(__file__).parent
LIMIT = 300  # seconds one file may take, which is a hundred times what it does take


def test_the_command_line_prints_what_the_files_say(tmp_path: Path) -> None:
    lit = "import sys; from lit.main import main; sys.argv[0] = 'lit'; main()"
    command = [sys.executable, "-c", lit, "-v", "-j2", "--order", "lexical", "--timeout", str(LIMIT), str(HERE)]
    environment = {**os.environ, "LIT_EXEC_ROOT": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [path for suffix in ("test", "vacc") for path in HERE.rglob(f"*.{suffix}") if "Inputs" not in path.parts]
    assert f"Passed: {len(found)} (100.00%)" in done.stdout


def test_every_pass_is_run_on_text() -> None:
    ours = {name for name, cls in all_passes().items() if cls.__module__.startswith("vacc_opt.passes.")}
    assert {path.stem for path in (HERE / "passes").iterdir()} == ours

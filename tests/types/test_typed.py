"""What our users' type checkers see: nearly every public symbol has a type that no checker has to guess."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vacc_opt

ENOUGH = 0.95
ROOT = Path(vacc_opt.__file__).parent
PARTS = (
    "__init__.py",
    "_version.py",
    "py.typed",
    "ir",
    "passes",
    "frontends",
    "backends",
    "calibration",
    "runtime",
    "cli",
)


@pytest.mark.full
def test_nearly_every_public_symbol_is_typed(tmp_path: Path) -> None:
    # the package as it is installed: pyright does not follow the finder of an editable install
    package = tmp_path / "vacc_opt"
    package.mkdir()
    for part in PARTS:
        (package / part).symlink_to(ROOT / part)
    arguments = ["--verifytypes", "vacc_opt", "--ignoreexternal", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [sys.executable, "-m", "pyright", *arguments],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)["typeCompleteness"]
    loose = [symbol["name"] for symbol in report["symbols"] if symbol["isExported"] and not symbol["isTypeKnown"]]
    share = report["completenessScore"]
    symbols = report["exportedSymbolCounts"]["withKnownType"] + len(loose)
    sys.stdout.write(f"{share:.1%} of {symbols:,} public symbols are typed\n")
    assert share >= ENOUGH, f"{share:.1%} typed; not typed:\n" + "\n".join(loose)

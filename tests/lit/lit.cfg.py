"""How lit runs the files here: each in a directory of its own, with this vacc-opt and filecheck on the path."""

# ruff: noqa: F821
import os
import sys
from pathlib import Path

import lit.formats

HERE = Path(__file__).parent

config.name = "vacc-opt"
config.test_format = lit.formats.ShTest(execute_external=False)
config.suffixes = [".test", ".vacc"]
config.excludes = ["Inputs"]
config.test_source_root = str(HERE)
config.test_exec_root = os.environ.get("LIT_EXEC_ROOT", str(HERE.parents[1] / "build/lit"))
config.environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
config.environment["NO_COLOR"] = "1"
for name in ("PYTHONPATH", "COLUMNS"):
    config.environment.pop(name, None)
config.substitutions.append(("%inputs", str(HERE / "Inputs")))

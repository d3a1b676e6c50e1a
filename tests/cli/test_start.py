"""The command line starts quickly: what is heavy is imported by what needs it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

VERY_HEAVY = ("torch", "onnxruntime", "transformers", "onnxsim", "onnxscript", "onnx_graphsurgeon", "pydantic")
HEAVY = (*VERY_HEAVY, "numpy", "onnx", "networkx", "rich", "jinja2")
MODEL = "g (float[B,8] x) => (float[B,8] y) <float zero = {0}> { a = Add (x, zero) s = Sigmoid (a) y = Mul (a, s) }"


def imported(arguments: list[str]) -> set[str]:
    """The packages that a run of the command line has imported when it ends."""
    code = (
        "import sys; from vacc_opt.cli.main import main; code = main(sys.argv[1:]); "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["opt", "--help"], ["passes", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert imported(arguments).isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "arguments",
    [
        ["passes"],
        ["passes", "fuse-gqa"],
        ["opt", "-p", "vacc-default{tp=2}", "--dump-pipeline"],
        ["opt", "MODEL", "-p", "simplify,fuse-swiglu", "--why-not", "fuse-swiglu", "--timing", "-o", "OUT.vacc"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_passes_on_text_import_no_engine_and_no_exporter(arguments: list[str], tmp_path: Path) -> None:
    model = tmp_path / "model.vacc"
    model.write_text(MODEL)
    places = {"MODEL": str(model), "OUT.vacc": str(tmp_path / "out.vacc")}
    assert imported([places.get(a, a) for a in arguments]).isdisjoint(VERY_HEAVY)


def test_help_takes_a_few_times_what_an_empty_program_takes() -> None:
    def seconds(*arguments: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        return time.perf_counter() - started

    # in turns, so that a load on the machine is one on both; measured: 3 times
    pairs = [(seconds("-c", "pass"), seconds("-m", "vacc_opt.cli.main", "--help")) for _ in range(5)]
    assert min(help for _, help in pairs) < 8 * min(empty for empty, _ in pairs)

"""`vacc-opt schedule`: what it prints is a schedule that is verified, executed and timed again, also when hand-written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from vacc_opt.backends.vacc.schedule import Program
from vacc_opt.backends.vacc.single import execute
from vacc_opt.cli.main import main

TARGET = "peer-64x64-1mib-64bpc"
SIZES = ["--m", "17", "--n", "203", "--k", "129"]


def gemm(*more: str) -> list[str]:
    return ["schedule", "gemm", *SIZES, "--target", TARGET, *more]


@pytest.mark.parametrize("weights", ["float16", "int8"])
def test_the_json_of_a_product_holds_its_time_its_bound_and_a_text_that_computes_it(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gemm.schedule"
    assert main(gemm("--weights", weights, "--json", "-o", str(file))) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"cycles", "bound", "ratio", "dram_bytes", "search_s", "schedule"} <= set(found)
    bytes_moved = 17 * 129 * 2 + 203 * 129 * (2 if weights == "float16" else 1) + 17 * 203 * 2
    bytes_moved += 203 * 4 * (weights == "int8")
    assert found["bound"] == max(math.ceil(bytes_moved / 64), 3 * 4 * 17)
    assert found["ratio"] == found["cycles"] / found["bound"] >= 1
    assert found["dram_bytes"] >= bytes_moved
    assert file.read_text() == found["schedule"]

    random = np.random.default_rng(0)
    x = random.standard_normal((17, 129)).astype(np.float16)
    w = random.integers(-127, 128, (203, 129)).astype(np.int8 if weights == "int8" else np.float16)
    s = random.random(203).astype(np.float32)
    (result,) = execute(Program.from_text(found["schedule"]), [{"X": x, "W": w, "S": s}])
    want = x.astype(np.float64) @ w.astype(np.float64).T * (s if weights == "int8" else 1)
    np.testing.assert_allclose(result["Y"], want, rtol=2e-3, atol=1e-2)

    assert main(["schedule", "check", str(file), "--target", TARGET, "--execute", "--json"]) == 0
    printed = capsys.readouterr()
    again = json.loads(printed.out)
    assert printed.err == f"executed: {17 * 203} elements, equal in 4 interleavings\n"
    same = ("cycles", "bound", "ratio", "dram_bytes", "schedule", "target")
    assert {key: again[key] for key in same} == {key: found[key] for key in same}


def test_the_text_goes_to_stdout_and_the_time_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(gemm()) == 0
    printed = capsys.readouterr()
    assert Program.from_text(printed.out).to_text() == printed.out
    assert " x bound (" in printed.err
    assert printed.err.count("\n") == 1


def test_a_what_if_makes_another_machine_that_the_schedule_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice the rate of the DDR; the schedule is for that machine and is refused on the target itself.

    What binds then is the port that all loads go through, still at 64 bytes a cycle.
    """
    file, change = tmp_path / "gemm.schedule", ("--what-if", "ddr.bytes_per_cycle=128")
    assert main(gemm("--json", *change, "-o", str(file))) == 0
    fast = json.loads(capsys.readouterr().out)
    assert fast["target"].startswith(f"{TARGET}+ddr.bytes_per_cycle=128 v2 (")
    assert main(gemm("--json")) == 0
    slow = json.loads(capsys.readouterr().out)
    loads = 2 * (17 * 129 + 203 * 129)
    assert slow["bound"] == -(-(loads + 2 * 17 * 203) // 64)
    assert fast["bound"] == max(-(-loads // 64), 3 * 4 * 17)
    assert fast["cycles"] < slow["cycles"]
    assert main(["schedule", "check", str(file), "--target", TARGET, *change]) == 0
    assert main(["schedule", "check", str(file), "--target", TARGET]) == 1
    assert "made for " in capsys.readouterr().err


def test_a_wrong_schedule_is_refused_with_the_rule_that_it_breaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(gemm())
    text = capsys.readouterr().out
    file = tmp_path / "lost.schedule"
    file.write_text(text.replace("for k in 0:129:", "for k in 0:128:"))
    assert main(["schedule", "check", str(file), "--target", TARGET]) == 1
    assert "uncovered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["schedule", "gemm", "--m", "0", "--n", "1", "--k", "1", "--target", TARGET], "0 x 1 x 1 is empty"),
        (["schedule", "gemm", *SIZES, "--target", "peer-64x64-1mib"], "unknown target `peer-64x64-1mib`"),
        (gemm("--weights", "int4"), "'int4' is not one of"),
        (gemm("-o", "no/such/directory.schedule"), "not a file in an existing directory"),
        (["schedule", "check", "none.schedule", "--target", TARGET], "none.schedule cannot be read"),
        (gemm("--what-if", "ddr.latancy=3"), "did you mean `ddr.latency`?"),
        (gemm("--what-if", "ddr.latency"), "no KEY=VALUE"),
        (gemm("--what-if", "ddr.latency=1", "--what-if", "ddr.latency=2"), "given twice"),
        (gemm("--what-if", "ddr.efficiency=2"), "ddr.efficiency = 2"),
    ],
    ids=["empty", "target", "weights", "directory", "file", "path", "value", "twice", "range"],
)
def test_what_cannot_be_scheduled_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""

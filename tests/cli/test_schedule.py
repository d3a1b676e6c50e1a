"""`vacc-opt schedule`: what it prints is a schedule that is verified, executed and timed again, also when hand-written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vacc_opt.backends.vacc.schedule import Program
from vacc_opt.backends.vacc.single import execute, single
from vacc_opt.backends.vacc.target import load_target
from vacc_opt.backends.vacc.text import parse_kernel
from vacc_opt.cli.main import main
from vacc_opt.ir.errors import UserError
from vacc_opt.runtime.schedule import check_schedule, run_orders

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
        (gemm("-o", "no/such/directory.schedule"), "no/such does not exist"),
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


SUMS = """
kernel sums(in X f32[4, 8], in W f32[6, 8], out Y f32[4, 6], out R f32[4, 1]) {
  ring x f32[4, 8] x1 @0 dma_in -> matrix, vector
  ring w f32[6, 8] x1 @128 dma_in -> matrix
  ring s f32[4, 6] x1 @320 matrix -> vector
  ring y f32[4, 6] x1 @448 vector -> dma_out
  ring r f32[4, 1] x1 @576 vector -> dma_out
  scratch z f32[] x1 @640 vector
  engine dma_in {
    fill x {
      x[0:4, 0:8] <- load(X[0:4, 0:8])
    }
    fill w {
      w[0:6, 0:8] <- load(W[0:6, 0:8])
    }
  }
  engine matrix {
    use x, w {
      fill s {
        s[0:4, 0:6] <- mma(x[0:4, 0:8], w[0:6, 0:8], first=0)
      }
    }
  }
  engine vector {
    use x, s {
      fill y, r {
        z[] <- constant(value=1.0)
        y[0:4, 0:6] <- mul(s[0:4, 0:6], z[])
        r[0:4, 0:1] <- row_mean(x[0:4, 0:8])
      }
    }
  }
  engine dma_out {
    use y, r {
      Y[0:4, 0:6] <- store(y[0:4, 0:6])
      R[0:4, 0:1] <- store(r[0:4, 0:1])
    }
  }
}
"""
ROW = """
kernel select_row(in X f16[5, 64], out Y f16[1, 64]) with valid {
  ring row f16[1, 64] x1 @0 dma_in -> dma_out
  engine dma_in {
    fill row {
      row[0:1, 0:64] <- load(X[valid-1:valid, 0:64])
    }
  }
  engine dma_out {
    use row {
      Y[0:1, 0:64] <- store(row[0:1, 0:64])
    }
  }
}
"""
RANKS = """
kernel ranks(in X f32[4, 2], out Y f32[4, 1, 2]) {
  engine link {
    Y[0:4, 0:1, 0:2] <- all_gather(X[0:4, 0:2])
  }
}
"""


def text_of(kernel: str) -> str:
    """A program of one call."""
    return single(parse_kernel(kernel), load_target(TARGET)).to_text()


def checked(text: str, directory: Path, *more: str) -> int:
    (directory / "by-hand.schedule").write_text(text)
    return main(["schedule", "check", str(directory / "by-hand.schedule"), "--target", TARGET, *more])


@pytest.mark.parametrize("kernel", [SUMS, ROW, RANKS])
def test_a_small_kernel_is_checked_and_executed(kernel: str, tmp_path: Path) -> None:
    """Run-time scalars are the smallest that they can be: `valid` is 1."""
    assert checked(text_of(kernel), tmp_path, "--execute") == 0


@pytest.mark.parametrize(
    ("kernel", "changes", "code", "message"),
    [
        (SUMS, {"in X f32[4, 8]": "in X f32[4 8]"}, 2, "`[4 8]` is not a list of sizes"),
        (SUMS, {"in X f32[4, 8]": "in X f32[4, 8,]"}, 2, "`[4, 8,]` is not a list of sizes"),
        (SUMS, {"in X f32[4, 8]": "in X f32[4, 8]/[8]"}, 2, "`[8]` are not strides of 2 axes"),
        (SUMS, {"load(X[0:4, 0:8])": "load()"}, 1, "op: sums: dma_in: `load` has the wrong operands or attributes"),
        (SUMS, {"w f32[6, 8]": "w f32[48]", "w[0:6, 0:8]": "w[0:48]"}, 1, "w[0:48], first=0)`: tiles [4, 6] <- [4, 8], [48]"),
        (SUMS, {"r f32[4, 1]": "r f32[1]", "r[0:4, 0:1]": "r[0:1]", "row_mean(x[0:4, 0:8])": "row_mean(z[])"}, 1, "row_mean(z[])`: tiles [1] <- []"),
        (SUMS, {"mul(s": "add_share(s"}, 1, "op: sums: vector: `add_share` has the wrong operands or attributes"),
        (RANKS, {"Y f32[4, 1, 2]": "Y f32[8]", "Y[0:4, 0:1, 0:2]": "Y[0:8]"}, 1, "tiles [8] <- [4, 2]"),
        (RANKS, {"all_gather(X[0:4, 0:2])": "reduce_scatter()"}, 1, "op: ranks: link: `reduce_scatter` has the wrong"),
        (ROW, {"Y f16[1, 64]": "Y f16[64]", "Y[0:1, 0:64]": "Y[0:64]"}, 1, "parameters are not those of a select_row"),
        (ROW, {"tensor valid": "tensor input_ids i64[] input @4096\ntensor valid"}, 1, "`input_ids` has no axis of tokens"),
    ],
)  # fmt: skip
def test_what_anyone_may_write_is_refused_by_what_is_wrong_with_it(
    kernel: str, changes: dict[str, str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = text_of(kernel)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    assert checked(text, tmp_path) == code
    assert message in capsys.readouterr().err


def test_a_program_of_several_calls_is_not_executed(tmp_path: Path) -> None:
    assert checked(text_of(RANKS), tmp_path) == 0
    found = check_schedule(tmp_path / "by-hand.schedule", target=TARGET)
    twice = replace(found, schedule=f"{found.schedule}call 1 ranks(X=X, Y=Y)\n")
    with pytest.raises(UserError, match="has 2 calls of 1 kernels"):
        run_orders(twice)

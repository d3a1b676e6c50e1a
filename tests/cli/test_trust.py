"""`opt --check-numerics`, reproducers, `bisect` and `reduce` from the command line: what a person types and reads."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from vacc_opt.cli.main import main
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.passes.infra import registry
from vacc_opt.tests.passes import planted


@pytest.fixture(autouse=True)
def planted_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.all_passes()
    for item in planted.ALL:
        monkeypatch.setitem(registry._PASSES, item.name, item)


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.vacc"
    path.write_text(to_text(planted.chain()))
    return str(path)


Capture = pytest.CaptureFixture[str]


def test_each_pass_is_followed_by_what_its_check_found(model: str, capsys: Capture) -> None:
    assert main(["opt", model, "-p", "simplify,subtract-from-zero", "--check-numerics", "-o", f"{model}.onnx"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "numerics" in line]
    assert lines[0] == "    numerics (real weights): nothing changed"
    assert lines[1].startswith("    numerics: equal bit for bit in 1 output; values in [")


def test_a_wrong_pass_ends_the_run_with_where_and_a_reproducer(model: str, capsys: Capture, tmp_path: Path) -> None:
    out, reproducer = tmp_path / "out.onnx", tmp_path / "r.vacc"
    arguments = ["opt", model, "-p", "simplify,wrong-at", "-o", str(out), "--check-numerics"]
    assert main([*arguments, "--reproducer", str(reproducer)]) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[0].startswith("error: wrong-at: an exact pass, but y differs by 0.0032 on a scale of ")
    assert error[1] == "  first wrong at application 7 of 20: n6 [layers.6 model.py:16]"
    assert error[2].startswith("  first value that differs: n6_Sub differs by 0.0001 on a scale of ")
    assert error[-1] == f"  reproducer: vacc-opt opt --run-reproducer {reproducer}"
    assert not out.exists()


def test_a_tolerance_is_given_behind_an_equals_sign(model: str, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["opt", model, "-p", "wrong-scale", "-o", str(tmp_path / "o.vacc")]
    assert main([*arguments, "--check-numerics=0.03"]) == 0
    assert main([*arguments, "--check-numerics=0.01", "--reproducer", str(tmp_path / "r")]) == 1
    capsys.readouterr()
    assert main([*arguments, "--check-numerics=much"]) == 2
    assert "error: --check-numerics=much: the tolerance is a number, such as 1e-5" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", ["batch", "batch=0", "batch=two"])
def test_a_size_that_is_no_number_is_refused(model: str, sizes: str, capsys: Capture) -> None:
    assert main(["opt", model, "--check-numerics", "--numerics-sizes", sizes]) == 2
    assert "a size is NAME=NUMBER, such as seq=7" in capsys.readouterr().err


def test_a_reproducer_replays_in_another_directory_until_the_pass_is_mended(
    model: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    first, moved = tmp_path / "here" / "r.vacc", tmp_path / "moved.vacc"
    assert main(["opt", model, "-p", "wrong-at", "--check-numerics", "--reproducer", str(first)]) == 1
    first.rename(moved)
    shutil.rmtree(tmp_path / "here")
    Path(model).unlink()
    capsys.readouterr()
    assert main(["opt", "--run-reproducer", str(moved)]) == 1
    assert "error: it fails the same way: wrong-at: an exact pass, but y differs" in capsys.readouterr().err
    monkeypatch.setattr(planted.WrongAt, "make", planted.SubtractFromZero.make)
    assert main(["opt", "--run-reproducer", str(moved)]) == 0
    assert "result     the pipeline runs without an error; then it failed" in capsys.readouterr().out


def test_a_run_without_a_failure_can_be_written_down(model: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "run.vacc"
    assert main(["opt", model, "-p", "simplify", "--generate-reproducer", str(path)]) == 0
    assert main(["opt", "--run-reproducer", str(path)]) == 0
    assert "the pipeline runs without an error, as it did then" in capsys.readouterr().out


def test_a_defect_says_where_its_reproducer_is(model: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "r.vacc"
    assert main(["opt", model, "-p", "raises-at", "--reproducer", str(path)]) == 70
    error = capsys.readouterr().err.splitlines()[-2:]
    assert error[0].startswith(
        "error: a defect of vacc-opt, not of your input: ValueError: boom in the pass raises-at at "
    )
    assert error[1] == f"  reproducer: vacc-opt opt --run-reproducer {path}"
    assert main(["opt", "--run-reproducer", str(path)]) == 1


SCRIPT = """
import sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
sys.exit(int(np.abs(session.run(None, {"x": x})[0] - x.sum(1, keepdims=True)).max() > 1e-4))
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "check.py").write_text(SCRIPT)
    return f"{sys.executable} {tmp_path}/check.py"


def test_bisect_names_pass_application_and_line(model: str, script: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "r.vacc"
    arguments = [
        "bisect",
        model,
        "-p",
        "simplify,wrong-at{at=4},simplify",
        "--script",
        script,
        "--reproducer",
        str(path),
    ]
    assert main(arguments) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "bisect     wrong-at{at=4} is the first bad pass (pass 2)" in lines
    assert "application 4 of 20: n3 [layers.3 model.py:13]" in lines
    assert any(line.startswith("+ n3_Sub: float[batch,32] = Sub(1e-04, n2_Sub)") for line in lines)
    assert f"write      {path}   (vacc-opt opt --run-reproducer {path})" in lines
    assert from_text(path.read_text()).op_counts()["Neg"] == 20


@pytest.mark.parametrize(("pipeline", "check", "why"), [
    ("breaks-types{at=4}", ["--check", "verify"], "because"),
    ("wrong-at{at=4}", ["--check", "numerics"], "because n3_Sub differs by 0.0001"),
    ("wrong-at{at=4}", ["--check-numerics"], "because n3_Sub differs by 0.0001"),
])  # fmt: skip
def test_bisect_checks_by_itself(
    model: str, tmp_path: Path, capsys: Capture, pipeline: str, check: list[str], why: str
) -> None:
    of = "" if "verify" in check else " of 20"  # a pass that goes wrong does not get to its end
    assert main(["bisect", model, "-p", pipeline, *check, "--reproducer", str(tmp_path / "r.vacc")]) == 0
    out = capsys.readouterr().out
    assert f"application 4{of}: n3 [layers.3 model.py:13]" in out
    assert why in out
    assert main(["opt", "--run-reproducer", str(tmp_path / "r.vacc")]) == 1


def test_bisect_without_a_bug_says_so(model: str, script: str, capsys: Capture) -> None:
    assert main(["bisect", model, "-p", "simplify", "--script", script]) == 2
    assert "error: the model is good after the whole pipeline: there is nothing to find" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["bisect", "-p", "simplify"], ["reduce", "-o", "out.vacc"]])
def test_without_a_test_the_choices_are_named(model: str, command: list[str], capsys: Capture) -> None:
    assert main([command[0], model, *command[1:]]) == 2
    assert "error: give one of --script CMD, " in capsys.readouterr().err


def test_reduce_writes_a_small_model_and_a_test(model: str, tmp_path: Path, capsys: Capture) -> None:
    out, test = tmp_path / "small.vacc", tmp_path / "test_small.py"
    arguments = ["reduce", model, "-p", "simplify,wrong-at{at=1}", "--check-numerics", "-o", str(out)]
    assert main([*arguments, "--emit-test", str(test)]) == 0
    said = capsys.readouterr().out
    assert "reduce     wrong-at{at=1}: an exact pass, but y differs by " in said
    assert "21 nodes to 1 in " in said
    assert from_text(out.read_text()).op_counts() == {"Neg": 1}
    assert 'run_pipeline(from_text(GRAPH), "wrong-at{at=1}", instruments=[CheckNumerics()])' in test.read_text()


def test_reduce_by_the_words_of_an_error(model: str, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "small.vacc"
    assert main(["reduce", model, "-p", "raises-at{at=2}", "--error", "boom", "-o", str(out)]) == 0
    assert from_text(out.read_text()).op_counts() == {"Neg": 2}


def test_reduce_by_a_script(model: str, tmp_path: Path, capsys: Capture) -> None:
    out, script = tmp_path / "small.onnx", tmp_path / "sum.py"
    script.write_text(
        "import sys, onnx\nsys.exit('ReduceSum' in [n.op_type for n in onnx.load(sys.argv[1]).graph.node])"
    )
    assert main(["reduce", model, "--script", f"{sys.executable} {script}", "-o", str(out)]) == 0
    assert "21 nodes to 1 in " in capsys.readouterr().out
    assert out.exists()


def test_reduce_by_a_pass_needs_the_pipeline(model: str, capsys: Capture) -> None:
    assert main(["reduce", model, "--check-numerics", "-o", "out.vacc"]) == 2
    assert "need the pipeline that fails: -p PIPELINE" in capsys.readouterr().err

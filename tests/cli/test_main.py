"""The command line: fast help, short forms, exit codes, one line an error, nothing written on failure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vacc_opt.cli.main import COMMANDS, main
from vacc_opt.ir.text import from_text

HEAVY = ("torch", "onnx", "onnxruntime", "numpy", "transformers", "networkx", "rich", "pydantic")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Y = relu((x + 0) w), with a weight large enough to lie outside the model."""
    weight = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "zero"], ["shifted"]),
            helper.make_node("MatMul", ["shifted", "w"], ["product"]),
            helper.make_node("Relu", ["product"], ["y"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(1, np.float32), "zero")],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


def run(path: Path, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


@pytest.mark.parametrize("arguments", ["--help", "--version"])
def test_help_imports_none_of_the_heavy_packages(arguments: str) -> None:
    code = (
        "import sys; from vacc_opt.cli.main import main; "
        f"code = main([{arguments!r}]); print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_help_names_every_command_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, (line, _) in COMMANDS.items():
        assert name in out
        assert line in out
    assert "Exit codes: 0 done, 1 a check failed, 2 the input cannot be used, 70 a defect" in out


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_whose_options_are_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert "Usage: vacc-opt " + name in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complie"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: no command 'complie': did you mean `compile`?"


def test_an_unknown_option_says_where_to_look(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", "model.onnx", "--outptu", "x"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: no such option '--outptu'")
    assert second == "  `vacc-opt opt --help` shows what it takes"


def test_a_model_in_place_of_a_command_means_opt(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert main([str(model), "-p", "simplify", "-o", str(out)]) == 0
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    np.testing.assert_array_equal(run(out, x), run(model, x))
    assert out.with_suffix(".safetensors").is_file()


def test_every_step_says_what_it_did(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", str(model), "-p", "simplify", "-o", str(tmp_path / "out.onnx")]) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines() if line[2] != " "] == ["load", "simplify", "write"]
    assert captured.err == ""  # no progress bars in a pipe
    assert "out.safetensors  8.36 kB" in captured.out  # 32 x 64 fp32, and a header with a digest


def test_without_an_output_the_text_goes_to_stdout_alone(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", str(model), "-p", "simplify"]) == 0
    captured = capsys.readouterr()
    assert from_text(captured.out).op_counts() == {"MatMul": 1, "Relu": 1}
    assert "simplify" in captured.err


def test_text_can_be_written_and_read_again(model: Path, tmp_path: Path) -> None:
    text, again = tmp_path / "model.vacc", tmp_path / "again.vacc"
    assert main(["opt", str(model), "-o", str(text)]) == 0
    assert main(["opt", str(text), "-o", str(again)]) == 0
    assert text.read_text() == again.read_text()


def test_the_input_may_be_replaced_by_its_output(model: Path) -> None:
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    before = run(model, x)
    assert main(["opt", str(model), "-p", "simplify", "-o", str(model)]) == 0
    assert main(["opt", str(model), "-p", "simplify", "-o", str(model)]) == 0  # now its weights lie beside it
    np.testing.assert_array_equal(run(model, x), before)


@pytest.mark.parametrize(
    ("pipeline", "message", "hint"),
    [
        ("simplify,fuse-gpa", "pipeline, column 10: unknown pass 'fuse-gpa'", "did you mean `fuse-gqa`?"),
        ("fuse-gqa{expcet=3}", "'fuse-gqa' has no option 'expcet'", "did you mean `expect`?"),
        ("fuse-gqa{expect=many}", "option 'expect' of 'fuse-gqa' takes", "fail unless exactly this many"),
        ("simplify fuse-gqa", "',' or the end is expected here", "^"),
    ],
)
def test_a_mistake_in_the_pipeline_is_shown_at_its_place(
    pipeline: str, message: str, hint: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(model.parent.iterdir())
    assert main(["opt", str(model), "-p", pipeline, "-o", str(model.parent / "out.onnx")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[0]
    assert hint in captured.err
    assert captured.out == ""
    assert sorted(model.parent.iterdir()) == before


def test_an_unmet_expectation_fails_with_one_and_writes_nothing(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(model.parent.iterdir())
    assert main(["opt", str(model), "-p", "fuse-gqa{expect=1}", "-o", str(model.parent / "out.onnx")]) == 1
    assert "error: fuse-gqa: 0 rewritten, 1 expected" in capsys.readouterr().err
    assert sorted(model.parent.iterdir()) == before


def test_a_missing_model_and_a_missing_directory_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "no.onnx")]) == 2
    assert "no.onnx: no such file or directory" in capsys.readouterr().err
    assert main(["opt", "x.onnx", "-o", str(tmp_path / "no" / "out.onnx")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_truncated_gguf_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x02")
    assert main(["export", str(tmp_path / "model.gguf"), "-o", str(tmp_path / "out.onnx")]) == 2
    captured = capsys.readouterr()
    assert "damaged or truncated GGUF header" in captured.err.splitlines()[0]
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_a_defect_is_ours_and_its_traceback_lies_in_a_file(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("vacc_opt.runtime.models.describe", broken)
    monkeypatch.setattr("tempfile.tempdir", str(model.parent))
    assert main(["opt", str(model)]) == 70
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert err.startswith("error: a defect of vacc-opt, not of your input: KeyError: 'surprise' at test_main.py:")
    report = Path(err.strip().rpartition(" ")[2])
    assert "def broken" not in err
    assert 'raise KeyError("surprise")' in report.read_text()


def test_a_read_only_place_is_the_users_matter(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(*args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied", "/there")

    monkeypatch.setattr("tempfile.mkdtemp", denied)
    assert main(["opt", str(model), "-o", str(model.parent / "out.onnx")]) == 2
    assert capsys.readouterr().err == "error: /there: Permission denied\n"


def test_passes_lists_all_and_describes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"simplify", "fuse-gqa", "w8a16", "kv8", "split-tp", "legalize"} <= set(listed)
    assert main(["passes", "split-tp"]) == 0
    assert "tp: int = 1" in capsys.readouterr().out
    assert main(["passes", "--json"]) == 0
    assert [p["name"] for p in json.loads(capsys.readouterr().out)] == listed
    assert main(["passes", "splt-tp"]) == 2
    assert "did you mean `split-tp`?" in capsys.readouterr().err


def test_the_reference_page_has_a_section_for_each_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", "--markdown"]) == 0
    page = capsys.readouterr().out
    from vacc_opt.passes.infra.registry import all_passes

    for name, cls in all_passes().items():
        assert f"\n## {name}\n" in page
        assert cls.help_line() in page
        for option in cls.options():
            assert f"| `{option.name}` |" in page


def test_on_a_terminal_the_bar_stays_off_standard_output(model: Path) -> None:
    import pty

    _, terminal = pty.openpty()
    arguments = [sys.executable, "-m", "vacc_opt.cli.main", "opt", str(model), "-p", "simplify", "-o", f"{model}.vacc"]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=terminal, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["load", "simplify", "write"]
    assert "\x1b" not in done.stdout  # no control sequences where a log may be


def test_a_defect_on_a_full_disk_is_still_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    def broken(*args: object, **kwargs: object) -> None:
        monkeypatch.setattr("tempfile.mkdtemp", full)
        raise KeyError("surprise")

    monkeypatch.setattr("vacc_opt.runtime.models.describe", broken)
    assert main(["opt", str(model)]) == 70
    err = capsys.readouterr().err
    assert err.endswith("; the traceback could not be written: No space left on device\n")

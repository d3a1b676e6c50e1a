"""What ``vacc-opt opt`` shows of a run: which flags print what, where it goes, and how mistakes are told."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from vacc_opt.cli.main import main
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.show.remarks import read_remarks

TEXT = """
    net (float[batch,seq] x) => (float[batch,seq] y) <float zero = {0.0}> {
        shifted = Add(x, zero)
        gate = Sigmoid(shifted)
        silu = Mul(gate, shifted)
        y = Neg(silu)
    }"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.vacc"
    path.write_text(TEXT)
    return path


def test_help_lists_the_flags_by_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", "--help"]) == 0
    out = capsys.readouterr().out
    headings = [line.rstrip(":") for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings[:5] == ["Options", "Show the graph", "Show the run", "Remarks", "Checks"]
    assert "--print-ir-before[=PASS]" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_flag_without_its_value_does_not_take_the_model_for_one(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["opt", "--print-ir-after", str(model), "-p", "simplify"]) == 0
    assert "=== after 1 simplify (3 nodes) ===" in capsys.readouterr().err


def test_a_flag_names_one_pass_or_several(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-p", "simplify,simplify,fuse-swiglu", "--print-ir-before=fuse-swiglu", "--print-ir-before=simplify"]
    assert main(["opt", str(model), *arguments]) == 0
    headings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("===")]
    assert [heading.split()[2:4] for heading in headings] == [
        ["1", "simplify"],
        ["2", "simplify"],
        ["3", "fuse-swiglu"],
    ]


@pytest.mark.parametrize("flag", ["--print-ir-before", "--print-ir-after"])
def test_a_mistyped_pass_is_told_before_anything_is_loaded(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", "missing.onnx", "-p", "fuse-swiglu", f"{flag}=fuse-swglu"]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {flag}=fuse-swglu: unknown pass 'fuse-swglu'\n  did you mean `fuse-swiglu`?\n"
    assert captured.out == ""


def test_what_is_printed_goes_to_stderr_when_the_model_goes_to_stdout(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--print-ir-diff", "--print-ir-after-change", "--timing", "--stats", "--remarks"]
    assert main(["opt", str(model), "-p", "simplify", *flags]) == 0
    captured = capsys.readouterr()
    assert from_text(captured.out).op_counts() == {"Mul": 1, "Neg": 1, "Sigmoid": 1}
    for text in ("=== 1 simplify (-1 ~2 nodes; 4 -> 3) ===", "=== after 1 simplify", "statistics\n", "timing "):
        assert text in captured.err


def test_what_is_printed_goes_to_stdout_when_the_model_goes_to_a_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-p", "simplify", "-o", str(tmp_path / "out.vacc"), "--print-ir-diff", "--timing"]
    assert main(["opt", str(model), *arguments]) == 0
    captured = capsys.readouterr()
    assert "- shifted: float[batch,seq] = Add(x, 0.0)\n" in captured.out
    assert captured.out.index("  write ") < captured.out.index("timing ")
    assert captured.err == ""


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_diff_is_colored_on_a_terminal_unless_no_color_is_set(model: Path, no_color: str) -> None:
    import os
    import pty

    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "vacc_opt.cli.main", "opt", str(model), "-p", "simplify", "--print-ir-diff"]
    environment = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm"}
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=terminal, check=True, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            block = os.read(controller, 65536)
        except OSError:  # the other end is closed
            break
        shown += block
    assert b"shifted: float[batch,seq] = Add(x, 0.0)" in shown
    assert (b"\x1b[31m- shifted" in shown) is not bool(no_color)


def test_a_pipeline_is_printed_with_its_presets_written_out_and_no_model_is_needed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        main(["opt", "-p", "fixpoint( vacc-interface{context=64} ),prefill{seq=8}(simplify)", "--dump-pipeline"]) == 0
    )
    assert capsys.readouterr().out == ("fixpoint(slice-last-token,kv-cache{context=64}),prefill{seq=8}(simplify)\n")


def test_without_a_model_the_usage_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", "-p", "simplify"]) == 2
    assert capsys.readouterr().err.startswith("error: missing argument 'MODEL'")


def test_a_dump_of_a_pass_can_be_run_on(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ir"
    assert main(["opt", str(model), "-p", "simplify,fuse-swiglu", "--print-ir-dir", str(folder)]) == 0
    assert f"-> {folder}  3 graphs" in capsys.readouterr().err
    assert main(["opt", str(folder / "001-simplify.vacc"), "-p", "simplify"]) == 0
    assert from_text(capsys.readouterr().out).op_counts() == {"Mul": 1, "Neg": 1, "Sigmoid": 1}


def test_remarks_can_be_printed_by_kind(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.write_text("g (float[4,8] x) => (float[4,8] y) { a = Softmax(x) y = Neg(a) }")
    arguments = ["opt", str(model), "-p", "legalize{strict=false}"]
    assert main([*arguments, "--remarks"]) == 0
    everything = capsys.readouterr().err
    assert main([*arguments, "--remarks-filter=missed"]) == 0
    assert "    missed: legalize: no kernel for Softmax" in capsys.readouterr().err
    assert "    missed: legalize: no kernel for Softmax" in everything
    assert main([*arguments, "--remarks-filter", "passed"]) == 0
    assert "missed" not in capsys.readouterr().err


def test_a_failed_run_writes_its_remarks_and_its_view_but_no_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, html, remarks = (tmp_path / name for name in ("out.vacc", "run.html", "remarks.yaml"))
    arguments = ["-p", "simplify,fuse-swiglu{expect=7}", "--html", str(html), "--remarks-file", str(remarks)]
    assert main(["opt", str(model), "-o", str(out), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: fuse-swiglu: 0 rewritten, 7 expected")
    assert f"  -> {html}" in captured.out
    assert "0 rewritten, 7 expected" in html.read_text()
    assert isinstance(read_remarks(remarks), list)
    assert not out.exists()


@pytest.mark.parametrize("flag", ["--html", "--remarks-file", "--print-ir-dir"])
def test_a_place_that_does_not_exist_is_told_before_the_run(
    flag: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["opt", str(model), "-p", "simplify", flag, str(tmp_path / "no" / "file")]) == 2
    captured = capsys.readouterr()
    assert "does not exist" in captured.err
    assert captured.out == ""


def test_verification_can_be_turned_off(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", str(model), "-p", "simplify", "--no-verify-each", "--check-analyses", "--timing"]) == 0
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("  verification")]
    assert float(line.split()[1]) < 0.001  # two readings of the clock


def test_phases_are_written_as_a_file_each_over_weights_that_are_stored_once(tmp_path: Path) -> None:
    import onnxruntime

    weight = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", "seq", 64])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", "seq", 64])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opset = [onnx.helper.make_opsetid("", 23)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "model.onnx")
    out = tmp_path / "phases"
    arguments = ["-p", "prefill{seq=8}(simplify),decode(simplify)", "-o", str(out)]
    assert main(["opt", str(tmp_path / "model.onnx"), *arguments]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["decode.rank0.onnx", "prefill.rank0.onnx", "rank0.safetensors"]
    assert (out / "rank0.safetensors").stat().st_size < 64 * 64 * 4 + 1000
    for phase, tokens in (("prefill", 8), ("decode", 1)):
        session = onnxruntime.InferenceSession(out / f"{phase}.rank0.onnx", providers=["CPUExecutionProvider"])
        assert session.get_inputs()[0].shape == [1, tokens, 64]
        x = np.ones((1, tokens, 64), np.float32)
        np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight, rtol=1e-6)
    assert main(["opt", str(tmp_path / "model.onnx"), "-p", "decode(simplify)", "-o", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["decode.rank0.onnx", "rank0.safetensors"]


def test_the_text_of_each_phase_stands_under_a_comment(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", str(model), "-p", "prefill{seq=8}(simplify),decode(simplify)"]) == 0
    before, prefill, decode = capsys.readouterr().out.split("# phase ")
    assert before == ""
    for name, text, shape in (("prefill", prefill, (1, 8)), ("decode", decode, (1, 1))):
        assert text.startswith(f"{name}\n")
        assert from_text(text.removeprefix(f"{name}\n")).inputs[0].shape == shape


@pytest.mark.parametrize("name", ["out.onnx", "out.vacc"])
def test_phases_do_not_fit_into_one_file(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["opt", str(model), "-p", "decode(simplify)", "-o", str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert f"error: {tmp_path / name}: the model has phases (decode)" in captured.err
    assert "name a directory (a file a phase and rank)" in captured.err
    assert not (tmp_path / name).exists()


def test_an_input_that_is_not_valid_is_refused_before_any_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "bad.vacc"
    model.write_text("g (float[2,8] x) => (float[2,8] y) { y = Negg (x) }")
    assert main(["opt", str(model), "-p", "simplify", "-o", str(tmp_path / "out.vacc")]) == 2
    said = capsys.readouterr().err
    assert f"error: {model}: the graph 'g' is not valid" in said
    assert "the model was like this before any pass" in said
    assert not (tmp_path / "out.vacc").exists()


def test_a_dash_reads_standard_input_and_writes_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("g (float[2] x) => (float[2] y) { a = Identity (x) y = Neg (a) }"))
    assert main(["opt", "-", "-p", "simplify", "-o", "-"]) == 0
    assert "y = Neg (x)" in capsys.readouterr().out
    assert not Path("-").exists()


def test_bytes_that_are_no_text_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8", errors="surrogateescape"))
    assert main(["opt", "-", "-p", "simplify"]) == 2
    assert capsys.readouterr().err.startswith("error: standard input: not text: ")

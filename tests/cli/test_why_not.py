"""``opt --why-not PASS``: the explanation beside the result, and wrong names refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from vacc_opt.cli.main import main

CLAMPED = """
g (float[B,8,S,16] q, float[B,8,S,16] k, float[B,8,S,16] v) => (float[B,8,S,16] y) {
    low = Constant <value = float {-1024.0}> ()
    high = Constant <value = float {1024.0}> ()
    kt = Transpose <perm = [0, 1, 3, 2]> (k)
    s = MatMul (q, kt)
    c = Elu <alpha = 0.5> (s)
    w = Softmax <axis = -1> (c)
    y = MatMul (w, v)
}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.vacc"
    path.write_text(CLAMPED)
    return path


def test_the_explanation_goes_to_stderr_when_the_text_goes_to_stdout(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["opt", str(model), "-p", "simplify,fuse-gqa", "--why-not", "fuse-gqa"]) == 0
    said = capsys.readouterr()
    assert "Softmax w  deepest partial match 2 of " in said.err
    assert "Elu(alpha=0.5) c: float[B,8,S,S] between MatMul and Softmax" in said.err
    assert "deepest" not in said.out


def test_a_wrong_name_is_refused_before_the_model_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", "no/such/model.vacc", "-p", "simplify,fuse-gqa", "--why-not", "fuse-gpa"]) == 2
    assert capsys.readouterr().err == (
        "error: --why-not fuse-gpa: the pipeline holds no such pass\n  did you mean `fuse-gqa`?\n"
    )

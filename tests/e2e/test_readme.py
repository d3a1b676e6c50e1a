"""Every command that the README and the other documents show is run, in order, in one scratch directory."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from vacc_opt import frontends
from vacc_opt.cli.main import main
from vacc_opt.ir.copy import copy

ROOT = Path(__file__).parents[2]


def commands(document: str) -> list[list[str]]:
    """The `$ vacc-opt ...` lines of the console blocks; `make` lines are what runs this test."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    found = [shlex.split(line, comments=True) for line in lines]
    assert all(words[0] in ("vacc-opt", "make") for words in found)
    return [words[1:] for words in found if words[0] == "vacc-opt"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def test_every_command_of_the_readme_runs(
    smollm2_graph: Any, scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(scratch)
    monkeypatch.setattr(frontends, "export_checkpoint", lambda *_, **__: copy(smollm2_graph))
    shown = commands("README.md")
    assert [words[0] for words in shown] == ["compile", "generate", "export", "smollm2.onnx"]
    for words in shown:
        assert main(words) == 0, words
        printed = capsys.readouterr().out
        if words[0] == "compile":
            assert "norm 61/61   rotary 60/60   attention 30/30" in printed
            assert "17 kernels, 576 calls, 1.31 x bound (DDR)" in printed
        if words[0] == "generate":
            assert "The capital of France is Paris." in printed
    assert (scratch / "fused.onnx").stat().st_size > 0


def test_the_readme_opens_the_model_as_it_says(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scratch)
    block = re.search(r"```python\n(import onnxruntime.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert block is not None
    names: dict[str, Any] = {}
    exec(block[1], names)
    assert {i.name for i in names["session"].get_inputs()} >= {"input_ids", "attention_mask", "position_ids"}


def test_the_commands_of_write_a_pass_run(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(scratch)
    for name in ("onnx", "safetensors"):
        (scratch / f"model.{name}").symlink_to(scratch / f"smollm2.{name}")
    for words in commands("docs/write_a_pass.md"):
        assert main(words) == 0, capsys.readouterr().err

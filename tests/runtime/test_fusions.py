"""fusions: each choice is lowered and timed; with all of them a model is no slower and moves no more."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vacc_opt.backends.vacc import load_target
from vacc_opt.backends.vacc.fusion import Fusion
from vacc_opt.cli.main import main
from vacc_opt.ir import DType
from vacc_opt.runtime.artifact import Artifact
from vacc_opt.runtime.fusions import fused_times
from vacc_opt.tests.backends.llama import Llama

TINY = Llama(
    layers=1, length=256, context=256, hidden=128, ffn=384, width=64, kv_heads=1, vocab=64, dtype=DType.FLOAT16
)

CHOICES = len(Fusion) + 2  # all, all but one, none


def test_all_fusions_together_are_the_fastest_and_none_the_slowest() -> None:
    found = {one.fusions: one for one in fused_times(TINY.graph(), load_target("vacc-reference"), "prefill")}
    assert list(found) == ["all", *(f"no {one.value}" for one in Fusion), "none"]
    best, worst = found.pop("all"), found.pop("none")
    for one in (Fusion.ALL_REDUCE, Fusion.NORM, Fusion.ROW_SCALE):  # one rank, sums without a norm, norms with a weight
        assert replace(found.pop(f"no {one.value}"), fusions="all") == best
    for one in found.values():
        assert best.cycles < one.cycles < worst.cycles
        assert best.ddr_bytes < one.ddr_bytes < worst.ddr_bytes
        assert best.activation_bytes < one.activation_bytes < worst.activation_bytes
    assert best.calls < worst.calls


def test_the_command_lists_every_choice_of_an_artifact(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fusions", str(artifact.path)]) == 0
    _, head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["phase", "fusions", "cycles"]
    assert [line.split()[0] for line in lines] == ["prefill"] * CHOICES + ["decode"] * CHOICES
    assert lines[0].split()[1:4:2] == ["all", "1.0000"]
    assert main(["fusions", str(artifact.path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["times"]) == 2 * CHOICES


def test_what_is_no_model_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fusions", "missing.yaml"]) == 2
    assert len(capsys.readouterr().err.splitlines()) <= 2

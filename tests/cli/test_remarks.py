"""``vacc-opt remarks``: two runs compared by exit code, text and JSON, and the remarks of one run listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vacc_opt.cli.main import main
from vacc_opt.passes.infra.base import Remark
from vacc_opt.passes.infra.show.remarks import Entry, to_yaml


def write(path: Path, kinds: str) -> Path:
    """Remarks of fuse-gqa, one a layer: ``p`` passed, ``m`` missed."""
    said = {"p": ("passed", "MatMul rewritten"), "m": ("missed", "found Clip, expected MatMul")}
    found = [
        Entry(Remark(said[k][0], "fuse-gqa", said[k][1], f"n{i} (layers.{i}.attn model.py:7)"))
        for i, k in enumerate(kinds)
    ]
    path.write_text(to_yaml(found))
    return path


def test_equal_runs_end_with_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a.yaml", "ppm"), write(tmp_path / "b.yaml", "ppm")
    assert main(["remarks", "diff", str(a), str(b)]) == 0
    assert capsys.readouterr().out == "fuse-gqa  2 passed  1 missed\n"


def test_a_pass_that_rewrites_fewer_places_ends_with_one_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path / "a.yaml", "ppp"), write(tmp_path / "b.yaml", "pmm")
    assert main(["remarks", "diff", str(a), str(b)]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "fuse-gqa  3 -> 1 passed  0 -> 2 missed, first reason: found Clip, expected MatMul",
        "",
        "fuse-gqa: not rewritten any more, 2 places",
        "  before  passed: MatMul rewritten",
        "  after   missed: found Clip, expected MatMul",
        "    layers.1.attn model.py:7",
        "    layers.2.attn model.py:7",
    ]
    assert captured.err.startswith("error: fewer places are rewritten: fuse-gqa 3 -> 1\n")


def test_a_pass_that_rewrites_more_places_ends_with_zero(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.yaml", "pm"), write(tmp_path / "b.yaml", "pp")
    assert main(["remarks", "diff", str(a), str(b)]) == 0


def test_json_names_every_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a.yaml", "p" * 9), write(tmp_path / "b.yaml", "m" * 9)
    assert main(["remarks", "diff", "--json", str(a), str(b)]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found["pass"] == "fuse-gqa"
    assert found["passed"] == {"before": 9, "after": 0}
    assert found["worse"] is True
    assert len(found["lost"]) == 9
    assert found["lost"][8] == {
        "place": "layers.8.attn model.py:7",
        "before": {"kind": "passed", "message": "MatMul rewritten", "where": "n8 (layers.8.attn model.py:7)"},
        "after": {"kind": "missed", "message": "found Clip, expected MatMul", "where": "n8 (layers.8.attn model.py:7)"},
    }


def test_artifacts_are_compared_by_the_remarks_inside(tmp_path: Path) -> None:
    for name, kinds in (("old", "pp"), ("new", "pm")):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "remarks.yaml", kinds)
    assert main(["remarks", "diff", str(tmp_path / "old"), str(tmp_path / "new")]) == 1


def test_a_damaged_file_ends_with_two_and_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a.yaml", "p"), tmp_path / "b.yaml"
    b.write_text("- kind: passed\n  pass: fuse-gqa\n")
    assert main(["remarks", "diff", str(a), str(b)]) == 2
    assert capsys.readouterr().err == f"error: {b}:1: a remark without message\n"


def test_remarks_are_listed_by_kind_and_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.yaml", "pmp")
    assert main(["remarks", "show", str(path), "--kind", "missed", "--pass", "fuse-gqa"]) == 0
    out = capsys.readouterr().out
    assert out == "missed: fuse-gqa: found Clip, expected MatMul [n1 (layers.1.attn model.py:7)]\n"


def test_a_mistyped_pass_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["remarks", "show", str(write(tmp_path / "a.yaml", "p")), "--pass", "fuse-gpa"]) == 2
    assert "did you mean `fuse-gqa`?" in capsys.readouterr().err

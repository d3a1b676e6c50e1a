"""Compiling: what is reported, what is refused before any work, and that equal inputs give equal bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vacc_opt.backends.vacc import target_file
from vacc_opt.cli.main import main
from vacc_opt.ir.errors import UserError
from vacc_opt.runtime.artifact import open_artifact
from vacc_opt.runtime.compile import compile_model
from vacc_opt.runtime.engines import make_engine
from vacc_opt.runtime.generate import prefill
from vacc_opt.runtime.report import CompileReport
from vacc_opt.runtime.simulate import simulate
from vacc_opt.tests.listener import Silent


def test_the_steps_come_in_the_order_of_the_work(compiled: tuple[CompileReport, Any]) -> None:
    assert list(compiled[1].said) == ["export", "recognize", "calibrate", "quantize", "split", "schedule", "write"]


def test_align_qkv_is_answered_by_the_step_that_splits(
    compiled: tuple[CompileReport, Any], config: Callable[..., Path], tmp_path: Path
) -> None:
    asked = compile_model(config(tmp_path), ["frontend.model_kwargs.align_qkv=true"], type(compiled[1])())
    with_it, without = (next(s.sentence for s in r.steps if s.name == "split") for r in (asked, compiled[0]))
    assert with_it == f"{without}\nalign_qkv: not needed, heads divide by tp {compiled[0].facts.ranks}"


def test_every_attention_rotary_norm_and_gated_unit_is_fused(compiled: tuple[CompileReport, Any]) -> None:
    counts = {name: str(count) for name, count in compiled[0].facts.fused.items()}
    assert counts == {"attention": "2/2", "rotary": "4/4", "norm": "5/5", "swiglu": "2/2"}


def test_linears_are_reported_at_about_half_of_fp16(compiled: tuple[CompileReport, Any]) -> None:
    linears = compiled[0].facts.linears
    assert linears.dtype == "int8"
    assert linears.fp16 == 2 * 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 96 * 64)  # every linear but lm_head, once
    assert linears.fp16 / 2 < linears.stored < linears.fp16 * 0.6  # and one fp32 scale for each row of 64 or 96


def test_the_cache_takes_half_the_bytes_of_fp16(compiled: tuple[CompileReport, Any]) -> None:
    cache = compiled[0].facts.kv_cache
    assert (cache.dtype, cache.stored) == ("int8", 2 * 2 * 2 * 48 * 16)  # layers, K and V, heads, context, head dim
    assert cache.fp16 == 2 * cache.stored


def test_every_phase_names_its_bound_and_does_not_beat_it(compiled: tuple[CompileReport, Any]) -> None:
    for phase in compiled[0].facts.phases:
        assert phase.cycles >= phase.bound_cycles > 0
        assert phase.binds in {"compute", "DDR", "vector", "link", "latency"}


def test_peak_memory_counts_this_process(compiled: tuple[CompileReport, Any]) -> None:
    assert compiled[0].peak_memory_bytes > 50e6  # numpy, onnx and onnxruntime alone take more


def test_the_report_is_valid_json(compiled: tuple[CompileReport, Any]) -> None:
    found = json.loads(json.dumps(compiled[0].to_json()))
    assert found["fused"]["attention"] == {"done": 2, "of": 2}
    assert found["target"]["name"] == "vacc-reference"
    assert found["phases"][0]["ratio"] >= 1
    sizes = {p.name: p.stat().st_size for p in Path(compiled[0].path).iterdir() if p.name != "manifest.json"}
    assert found["files"] == sizes
    assert found["bytes"] == sum(sizes.values())
    assert {"name", "sentence", "seconds"} == set(found["steps"][0])


def test_equal_inputs_give_equal_bytes_in_another_process(
    compiled: tuple[CompileReport, Any], config: Callable[..., Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "vacc_opt.cli.main", "compile", str(config(tmp_path))]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}, stdout=subprocess.DEVNULL)
    first, second = Path(compiled[0].path), tmp_path / "out" / "tiny"
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_no_file_of_the_artifact_names_a_place_of_this_machine(
    compiled: tuple[CompileReport, Any], exported: Path, data: Path
) -> None:
    for path in Path(compiled[0].path).iterdir():
        content = path.read_bytes()
        for place in (exported.parent, data.parent, Path(compiled[0].path).parent, Path(__file__).parents[2]):
            assert str(place).encode() not in content, path.name


def test_the_command_compiles_a_checkpoint_directory(
    checkpoint: Path, config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, checkpoint=checkpoint, type="huggingface", dtype="fp32", tp=1)
    assert main(["compile", str(file), "-D", "frontend.model_kwargs.tp=4"]) == 0
    out = capsys.readouterr().out
    assert "attention 2/2" in out
    assert "4, " in next(line for line in out.splitlines() if line.startswith("  ranks"))
    assert (tmp_path / "out" / "tiny" / "rank3.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp": 16}, ":8: frontend.model_kwargs.tp = 16, but the model has 4 query heads"),
        ({"prefill": 20}, "20 is not a positive multiple of 16"),
        ({"context": 16, "prefill": 32}, "shorter than the prefill length"),
        ({"checkpoint": "missing/model"}, "missing/model: no such file or directory"),
        ({"data": "missing.json"}, ":12: missing.json: no such file"),
        ({"context": 256}, "context 256, but the model was trained for 128 positions"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_in_one_line(
    changes: dict[str, Any],
    message: str,
    checkpoint: Path,
    config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = config(tmp_path, **{"checkpoint": checkpoint, "type": "huggingface", **changes})
    assert main(["compile", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err.splitlines()[0]
    assert len(captured.err.splitlines()) <= 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml"]  # nothing written


def test_an_override_is_named_as_the_place_of_a_mistake(
    checkpoint: Path, config: Callable[..., Path], tmp_path: Path
) -> None:
    file = config(tmp_path, checkpoint=checkpoint, type="huggingface")
    with pytest.raises(UserError, match=r"^-D frontend\.model_kwargs\.tp=9: .* 4 query heads"):
        compile_model(file, ["frontend.model_kwargs.tp=9"], None)  # type: ignore[arg-type]


def test_a_failure_while_writing_leaves_the_former_artifact(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: tuple[CompileReport, Any]
) -> None:
    target = tmp_path / "out" / "tiny"
    target.mkdir(parents=True)
    (target / "manifest.json").write_bytes((Path(compiled[0].path) / "manifest.json").read_bytes())
    before = sorted(tmp_path.rglob("*"))

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vacc_opt.runtime.artifact.save_onnx", fail)
    with pytest.raises(UserError, match="tiny: cannot be written: No space left on device"):
        compile_model(config(tmp_path, dtype="fp32"), (), Silent())
    assert {p.name for p in target.parent.iterdir()} <= {"tiny", ".cache", ".calibration"}
    assert sorted(target.rglob("*")) == [path for path in before if path.parent == target]


def test_an_artifact_carries_its_own_target_and_scales_without_their_places(
    config: Callable[..., Path], compiled: tuple[CompileReport, Any], tmp_path: Path
) -> None:
    machine, scales = tmp_path / "mine.yaml", tmp_path / "scales.safetensors"
    machine.write_text(target_file("vacc-reference").read_text())
    scales.write_bytes((Path(compiled[0].path) / "kv_scales.safetensors").read_bytes())
    overrides = [f"backend.target={machine}", f"frontend.quantize.kv_scales={scales}"]
    report = compile_model(config(tmp_path), overrides, Silent())
    manifest = (Path(report.path) / "manifest.json").read_text()
    assert str(tmp_path) not in manifest
    machine.unlink()  # elsewhere the file is not there
    assert simulate(Path(report.path), "decode").cycles > 0


def test_a_prefill_that_fills_the_context_compiles(config: Callable[..., Path], tmp_path: Path) -> None:
    report = compile_model(config(tmp_path, prefill=16, context=16), (), Silent())
    assert [phase.phase for phase in report.facts.phases] == ["prefill", "decode"]


def test_calibration_texts_are_cut_to_the_context(config: Callable[..., Path], tmp_path: Path) -> None:
    long = tmp_path / "long.json"
    long.write_text(json.dumps([{"instruction": "Say one. " * 40, "input": "", "output": "one " * 40}] * 4))
    report = compile_model(config(tmp_path, data=long), ["dataset.seqlen=512"], Silent())
    assert report.facts.kv_cache.dtype == "int8"


def test_ranks_share_the_sequence_where_the_configuration_says_so(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefill scatters its sums; a decode has one token, which cannot be shared.

    onnxruntime answers with the same bits. The schedule adds the residual stream to the parts of the ranks before they
    are rounded to float16, or to their scattered sums behind: within 2 % of the largest logit.
    """
    monkeypatch.chdir(tmp_path)
    found = {}
    for name, keys in (("plain", []), ("shared", ["backend.sequence_parallel=true"])):
        (tmp_path / name).mkdir()
        report = compile_model(config(tmp_path / name), keys, Silent())
        artifact = open_artifact(Path(report.path))
        text = {phase: (artifact.path / f"{phase}.schedule").read_text() for phase in ("prefill", "decode")}
        assert ("reduce_scatter" in text["prefill"]) == (name == "shared")
        assert "reduce_scatter" not in text["decode"]
        found[name] = [
            prefill(make_engine(engine, artifact), list(range(40, 56))) for engine in ("schedule", "onnxruntime")
        ]
    np.testing.assert_allclose(
        found["plain"][0], found["shared"][0], rtol=0, atol=0.02 * np.max(np.abs(found["plain"][0]))
    )
    np.testing.assert_array_equal(found["plain"][1], found["shared"][1])


def test_norms_are_folded_where_the_configuration_says_so(config: Callable[..., Path], tmp_path: Path) -> None:
    """Weights with their norm in them are rounded to float16 and int8 anew: logits within 5 % of their scale."""
    found = {}
    for name, keys in (("plain", []), ("folded", ["backend.fold_norm_weights=true"])):
        (tmp_path / name).mkdir()
        artifact = open_artifact(Path(compile_model(config(tmp_path / name), keys, Silent()).path or ""))
        text = {phase: (artifact.path / f"{phase}.schedule").read_text() for phase in ("prefill", "decode")}
        assert all(("+row_scale" in one) == (name == "folded") for one in text.values())
        for engine in ("schedule", "onnxruntime"):
            found[name, engine] = prefill(make_engine(engine, artifact), list(range(40, 56)))
    scale = np.max(np.abs(found["plain", "onnxruntime"]))
    for (name, engine), logits in found.items():
        assert np.max(np.abs(logits - found["plain", engine])) <= 0.05 * scale, name
    close = found["folded", "schedule"] - found["folded", "onnxruntime"]
    assert np.max(np.abs(close)) <= 0.01 * scale


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("frontend.quantize.type=w8a16_gptq", "GPTQ rounds the weights as they are"),
        ("backend.guard_fp16_range=true", "guard_fp16_range profiles the norms as they are"),
    ],
)
def test_what_has_seen_other_weights_cannot_be_folded(
    config: Callable[..., Path], tmp_path: Path, key: str, why: str
) -> None:
    with pytest.raises(UserError, match=f"backend.fold_norm_weights = true, but {why}"):
        compile_model(config(tmp_path), ["backend.fold_norm_weights=true", key], Silent())


def test_a_prefill_that_does_not_divide_over_the_ranks_cannot_share_its_sequence(
    config: Callable[..., Path], tmp_path: Path
) -> None:
    keys = ["backend.sequence_parallel=true", "frontend.model_kwargs.tp=3"]
    with pytest.raises(
        UserError, match=r"16 tokens of a prefill are not in 3 equal parts\n  the next length that is: 48"
    ):
        compile_model(config(tmp_path), keys, Silent())

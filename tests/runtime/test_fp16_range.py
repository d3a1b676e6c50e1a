"""The fp16 range guard, on the engine that really computes in fp16: what overflowed without it is right with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vacc_opt.frontends import export_checkpoint
from vacc_opt.ir.errors import UserError
from vacc_opt.runtime.artifact import open_artifact
from vacc_opt.runtime.compile import compile_model
from vacc_opt.runtime.engines import ScheduleEngine, make_engine
from vacc_opt.runtime.generate import prefill
from vacc_opt.runtime.models import write_model
from vacc_opt.tests.listener import Silent
from vacc_opt.tests.runtime.conftest import write_tokenizer

PROMPT = list(range(40, 56))
GUARD = "backend.guard_fp16_range=true"


def louder(checkpoint: Path, root: Path, factors: dict[str, float]) -> Path:
    """The small model with these weights made larger in all layers."""
    shutil.copytree(checkpoint, root / "model")
    file = root / "model/model.safetensors"
    tensors = load_file(file)
    for name, factor in factors.items():
        for found in [one for one in tensors if f"{name}.weight" in one]:
            tensors[found] *= np.float32(factor)
    save_file(tensors, file)
    write_model(export_checkpoint(root / "model"), root / "model.onnx")
    write_tokenizer(root)
    return root / "model.onnx"


@pytest.fixture(scope="module")
def loud(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a gated product and a residual stream far beyond 65504, as some real models have."""
    return louder(checkpoint, tmp_path_factory.mktemp("loud"), {"up_proj": 3e4, "gate_proj": 8, "o_proj": 3e4})


def logits(
    config: Callable[..., Path], directory: Path, model: Path, *overrides: str, engine: str = "schedule"
) -> np.ndarray:
    directory.mkdir()
    listener = Silent()
    report = compile_model(config(directory, checkpoint=model, tp=1), overrides, listener)
    artifact = open_artifact(Path(report.path))
    return prefill(make_engine(engine, artifact), PROMPT).astype(np.float64)


@pytest.mark.filterwarnings("ignore:.*(overflow|invalid value)")
@pytest.mark.parametrize("kind", ["w8a16", pytest.param("w8kv8", marks=pytest.mark.full)])
def test_a_model_that_overflows_in_fp16_is_right_with_the_guard(
    config: Callable[..., Path], loud: Path, tmp_path: Path, kind: str
) -> None:
    quantized = f"frontend.quantize.type={kind}"
    exact = logits(config, tmp_path / "fp32", loud, "backend.dtype=fp32", engine="onnxruntime")
    broken = logits(config, tmp_path / "off", loud, quantized)
    guarded = logits(config, tmp_path / "on", loud, quantized, GUARD)
    assert not np.isfinite(broken).all()
    assert np.isfinite(guarded).all()
    # int8 weights of a random model of two layers; an overflow is off by more than the scale
    assert np.abs(guarded - exact).max() < 0.05 * np.abs(exact).max()
    assert guarded.argmax() == exact.argmax()


@pytest.mark.filterwarnings("ignore:.*(overflow|invalid value)")
@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.full)])
def test_what_no_factor_passes_is_right_in_islands_of_fp32(
    config: Callable[..., Path], checkpoint: Path, tmp_path: Path, tp: int
) -> None:
    """A gate is behind a nonlinearity, and logits are an output."""
    model = louder(checkpoint, tmp_path, {"gate_proj": 3e6, "model.norm": 1e5})
    options = ["frontend.quantize.type=w8a16", f"frontend.model_kwargs.tp={tp}"]
    exact = logits(config, tmp_path / "fp32", model, "backend.dtype=fp32", engine="onnxruntime")
    broken = logits(config, tmp_path / "off", model, *options)
    guarded = logits(config, tmp_path / "on", model, *options, GUARD)
    assert np.abs(exact).max() > 65504
    assert not np.isfinite(broken).all()
    assert np.abs(guarded - exact).max() < 0.05 * np.abs(exact).max()  # of int8 weights
    (artifact,) = (path for path in (tmp_path / "on").rglob("remarks.yaml"))
    assert "stays in fp32" in artifact.read_text()


@pytest.mark.full
def test_what_was_folded_is_among_the_remarks(config: Callable[..., Path], loud: Path, tmp_path: Path) -> None:
    listener = Silent()
    report = compile_model(config(tmp_path, checkpoint=loud, tp=2), [GUARD], listener)
    assert "0 of them still" in listener.said["quantize"]
    assert "guard-fp16-range" in (Path(report.path) / "remarks.yaml").read_text()
    assert np.isfinite(prefill(ScheduleEngine(open_artifact(Path(report.path))), PROMPT)).all()


def test_ranges_need_text(config: Callable[..., Path], tmp_path: Path) -> None:
    file = config(tmp_path)
    text = file.read_text()
    file.write_text(text[: text.index("dataset:")] + text[text.index("backend:") :])
    with pytest.raises(UserError, match=r"config\.yaml|guard_fp16_range.*: ranges need text"):
        compile_model(file, [GUARD, "frontend.quantize.type=w8a16"], Silent())

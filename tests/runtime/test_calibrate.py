"""Calibration of a configuration: what compile takes from it, the cache, and upstream's ways to name scales and data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vacc_opt.calibration import gptq_model
from vacc_opt.cli.main import main
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.storage import read_safetensors_header
from vacc_opt.runtime.artifact import open_artifact
from vacc_opt.runtime.compile import calibrate_model, compile_model
from vacc_opt.runtime.eval import EvalOptions, evaluate_models
from vacc_opt.tests.listener import Silent

GPTQ = "frontend.quantize.type=w8a16_gptq"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = ["one", "two", "six", "ten", "and", "the", "sea", "sky"]
    rng = np.random.default_rng(0)
    path.write_text("\n\n".join(" ".join(rng.choice(words, 30)) for _ in range(40)))
    return path


def overrides(text: Path, *more: str) -> list[str]:
    return ["dataset.name=text", f"dataset.path={text}", "dataset.nsamples=12", "dataset.seqlen=48", *more]


@pytest.fixture(scope="module")
def solved(config: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Silent]:
    """An artifact of GPTQ codes, and what its compilation said."""
    listener = Silent()
    file = config(tmp_path_factory.mktemp("gptq"), tp=1)
    report = compile_model(file, overrides(text, GPTQ), listener)
    return Path(report.path), listener


def test_gptq_codes_reach_the_artifact_and_their_losses_its_report(solved: tuple[Path, Silent]) -> None:
    path, listener = solved
    assert "GPTQ of 14 linears" in listener.said["calibrate"]
    layers = json.loads((path / "gptq_layers.json").read_text())
    assert len(layers) == 14
    assert all(one["loss"] < one["rounding_loss"] for one in layers)
    page = (path / "report.html").read_text()
    assert all(f"<td>{one['name']}</td>" in page for one in layers)
    (cache,) = (path.parent / ".calibration").iterdir()
    assert {p.name for p in cache.iterdir()} == {"gptq_codes.safetensors", "gptq_layers.json"}
    made, stored = (read_safetensors_header(p) for p in (cache / "gptq_codes.safetensors", path / "rank0.safetensors"))
    name = "model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(stored[f"{name}.qweight"].read(), made[f"{name}.weight.codes"].read())
    np.testing.assert_array_equal(stored[f"{name}.scale"].read(), made[f"{name}.weight.scales"].read())
    assert "w8a16{codes=" in open_artifact(path).manifest["pipeline"]
    assert str(path.parent) not in (path / "manifest.json").read_text()


def test_gptq_is_nearer_to_the_model_than_rounding(
    solved: tuple[Path, Silent], config: Callable[..., Path], exported: Path, text: Path, tmp_path: Path
) -> None:
    nearest = compile_model(config(tmp_path, tp=1), ["frontend.quantize.type=w8a16"], Silent())
    models = (str(solved[0]), nearest.path)
    words = tmp_path / "other.txt"
    words.write_text(" ".join(text.read_text().split()[::-1]))
    gptq, rounded = evaluate_models(EvalOptions(models, words, str(exported), tokens=480, threads=1)).models
    assert (gptq.kl or 0) < 0.7 * (rounded.kl or 0)


def test_what_was_calibrated_is_not_calibrated_again(
    config: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = overrides(text, "frontend.quantize.type=w8kv8_gptq")
    made = calibrate_model(config(tmp_path), both, Silent())
    assert made.scales is not None
    assert made.codes is not None
    before = {path: path.read_bytes() for path in (made.scales, made.codes)}

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a layer was solved again")

    monkeypatch.setattr(gptq_model, "solve", never)
    monkeypatch.setattr("vacc_opt.runtime.calibrate.calibrate_kv", never)
    report = compile_model(config(tmp_path), both, Silent())
    assert (Path(report.path) / "kv_scales.safetensors").read_bytes() == before[made.scales]
    assert {path: path.read_bytes() for path in before} == before
    # other text, or another option, is another result
    for change in ("dataset.seed=1", "frontend.quantize.calib_args.damping=0.02"):
        with pytest.raises(AssertionError, match="solved again"):
            compile_model(config(tmp_path), [*both, change], Silent())


def test_the_configured_meaning_of_new_tokens_and_symmetry_reach_the_pass(
    config: Callable[..., Path], tmp_path: Path
) -> None:
    args = ["frontend.quantize.kv_args.new_tokens=quantised", "frontend.quantize.kv_args.symmetric=true"]
    report = compile_model(config(tmp_path), args, Silent())
    assert "new_tokens=quantized" in open_artifact(Path(report.path)).manifest["pipeline"]
    stored = read_safetensors_header(Path(report.path) / "kv_scales.safetensors")
    assert not any(source.read().any() for name, source in stored.items() if name.endswith("zero"))


def test_the_upstream_pair_int8_and_w16kv8_is_fp16_weights_and_an_int8_cache(
    config: Callable[..., Path], tmp_path: Path
) -> None:
    report = compile_model(config(tmp_path), ["frontend.quantize.type=w16kv8"], Silent())
    assert report.facts.linears.stored == 0
    assert report.facts.other_weights.dtype == "float16"
    assert report.facts.kv_cache.dtype == "int8"


def test_scales_come_from_upstreams_file_that_config_json_names(
    checkpoint: Path, config: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    arrays = [torch.full((2, 16), value) for value in (0.25, 0.5)]
    torch.save({f"transformer.encoder.layers.{i}": arrays for i in range(2)}, model / "kv_scales.pth")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "kv_cache_path": "kv_scales.pth"}))
    listener = Silent()
    report = compile_model(config(tmp_path, checkpoint=model, type="huggingface"), (), listener)
    assert "calibrate" not in listener.said
    stored = read_safetensors_header(Path(report.path) / "kv_scales.safetensors")
    assert set(stored["layers.1.key.scale"].read().flat) == {0.25}
    assert set(stored["layers.0.value.scale"].read().flat) == {0.5}
    (model / "kv_scales.pth").unlink()
    with pytest.raises(UserError, match=r"kv_scales\.pth: no such file of KV scales"):
        compile_model(config(tmp_path, checkpoint=model, type="huggingface"), (), Silent())


def test_the_command_writes_scales_in_upstreams_form(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = config(tmp_path), tmp_path / "kv_scales.pth"
    assert main(["calibrate", str(file), "--kv-scales", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "KV ranges of 2 layers over 4 texts" in shown
    assert f"-> {out}" in shown
    assert len(torch.load(out, weights_only=True)["transformer.encoder.layers.1"]) == 4
    assert main(["calibrate", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0].endswith("kv_scales.safetensors")
    assert main(["calibrate", str(file), "-D", "frontend.quantize.type=w8a16"]) == 2
    assert "nothing is calibrated" in capsys.readouterr().err
    assert main(["calibrate", str(file), "--kv-scales", str(tmp_path / "a.bin")]) == 2
    assert "no form of KV scales" in capsys.readouterr().err


def test_gptq_without_text_is_refused(config: Callable[..., Path], tmp_path: Path) -> None:
    file = config(tmp_path)
    text = file.read_text()
    file.write_text(text[: text.index("dataset:")] + text[text.index("backend:") :])
    with pytest.raises(UserError, match="GPTQ needs text, and there is no `dataset`"):
        compile_model(file, [GPTQ], Silent())

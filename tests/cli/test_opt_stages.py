"""`vacc-opt opt` stopped after any pass of the default pipeline writes a model that stock onnxruntime runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vacc_opt.cli.main import main
from vacc_opt.frontends import export_checkpoint
from vacc_opt.ir import Literal
from vacc_opt.ir.storage import write_safetensors
from vacc_opt.ir.text import to_text

SIZES = {"batch": 1, "seq": 4, "past": 3, "past + seq": 7}
PIPELINE = (
    "simplify",
    "fuse-rms-norm{expect=5}",
    "fuse-rotary{positions=32,expect=4}",
    "fuse-gqa{expect=2}",
    "fuse-swiglu{expect=2}",
    "slice-last-token",
    "kv-cache{context=32}",
    "w8a16",
    "kv8{scales=kv.safetensors}",
    "cast-float",
    "split-tp{tp=2}",
    "fuse-residual-norm{expect=3}",
    "legalize",
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.vacc (an exported Llama of 2 layers, 4 query and 2 KV heads) and kv.safetensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("opt")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    module = LlamaForCausalLM(config).eval()
    (folder / "config.json").write_text(json.dumps(config.to_diff_dict()))
    save_file({n: p.detach().contiguous() for n, p in module.named_parameters()}, folder / "model.safetensors")
    (folder / "model.vacc").write_text(to_text(export_checkpoint(folder, isolated=False)))
    names = [f"layers.{i}.{what}" for i in range(2) for what in ("key", "value")]
    scales = {f"{n}.scale": Literal(np.full((2, 8), 0.05, np.float32)) for n in names}
    zeros = {f"{n}.zero": Literal(np.zeros((2, 8), np.float32)) for n in names}
    write_safetensors(folder / "kv.safetensors", {**scales, **zeros})
    return folder


def feed(session: Any) -> dict[str, Any]:
    """Small inputs for whatever interface the stage has."""
    types = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
    fixed = {"pos": [0], "valid": [4], "input_ids": [[5, 6, 7, 8]], "position_ids": [[3, 4, 5, 6]]}
    feeds: dict[str, Any] = {}
    for one in session.get_inputs():
        shape = [d if isinstance(d, int) else SIZES[d.replace("_plus_", " + ")] for d in one.shape]
        if one.name in fixed:
            feeds[one.name] = np.array(fixed[one.name], np.int64)
        elif one.name == "attention_mask":
            feeds[one.name] = np.ones(shape, np.int64)
        else:
            feeds[one.name] = np.zeros(shape, types.get(one.type, np.int8))
    return feeds


@pytest.mark.parametrize("count", range(len(PIPELINE) + 1))
def test_the_model_after_each_pass_runs_on_stock_onnxruntime(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    import onnxruntime

    monkeypatch.chdir(workplace)
    stages = list(PIPELINE[:count])
    if "split-tp{tp=2}" in stages:
        stages.append("expand-ranks")
    out = tmp_path / "model.onnx"
    assert main(["opt", "model.vacc", "-p", ",".join(stages), "-o", str(out)]) == 0
    session = onnxruntime.InferenceSession(out)  # default options, as a stranger opens it
    logits = session.run(["logits"], feed(session))[0]
    assert logits.shape == (1, 1 if "slice-last-token" in stages else 4, 64)
    assert np.isfinite(logits).all()
    assert np.ptp(logits.astype(np.float32)) > 0


def test_after_split_tp_the_output_is_a_directory_with_a_file_a_rank(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    assert main(["opt", "model.vacc", "-p", ",".join(PIPELINE), "-o", str(tmp_path / "ranks")]) == 0
    assert len(list((tmp_path / "ranks").glob("*.onnx"))) == 2
    assert len(list((tmp_path / "ranks").glob("*.safetensors"))) == 2

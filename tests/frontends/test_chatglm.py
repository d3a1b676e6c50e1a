"""A ChatGLM2 checkpoint, under its published tensor names, exports and computes what the module computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vacc_opt.frontends import export_checkpoint
from vacc_opt.frontends.models import ChatGLM, ChatGLMConfig
from vacc_opt.ir import Graph, UserError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.testing import assert_close

# entries of the published config.json, small, with some that say nothing of the structure
CONFIG = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True,
    "ffn_hidden_size": 48, "fp32_residual_connection": False, "hidden_size": 32, "kv_channels": 8, "layernorm_epsilon": 1e-5,
    "multi_query_attention": True, "multi_query_group_num": 2, "num_attention_heads": 6, "num_layers": 2, "original_rope": True,
    "padded_vocab_size": 64, "post_layer_norm": True, "rmsnorm": True, "seq_length": 128, "use_cache": True,
}  # fmt: skip
TENSORS = {
    "transformer.embedding.word_embeddings.weight": [64, 32],
    "transformer.encoder.layers.0.input_layernorm.weight": [32],
    "transformer.encoder.layers.0.self_attention.query_key_value.weight": [80, 32],
    "transformer.encoder.layers.0.self_attention.query_key_value.bias": [80],
    "transformer.encoder.layers.0.self_attention.dense.weight": [32, 48],
    "transformer.encoder.layers.0.post_attention_layernorm.weight": [32],
    "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight": [96, 32],
    "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight": [32, 48],
    "transformer.encoder.final_layernorm.weight": [32],
    "transformer.output_layer.weight": [64, 32],
}


def write(path: Path, config: dict[str, Any] = CONFIG) -> ChatGLM:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    module = ChatGLM(ChatGLMConfig.read(config)).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    tensors = {n: p.detach().contiguous() for n, p in module.named_parameters()}
    # published checkpoints hold this buffer too
    tensors["transformer.rotary_pos_emb.inv_freq"] = module.transformer.rotary_pos_emb.inv_freq
    save_file(tensors, path / "model.safetensors")
    return module


def test_tensors_have_their_published_names(tmp_path: Path) -> None:
    module = write(tmp_path / "m")
    shapes = {n: list(p.shape) for n, p in module.named_parameters()}
    assert {n: s for n, s in shapes.items() if ".layers.1." not in n} == TENSORS


def feeds(seq: int, past: int, pads: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seq)
    keep = np.ones((2, past + seq), np.int64)
    keep[0, :pads] = 0
    made = {
        "input_ids": rng.integers(0, 64, (2, seq)),
        "attention_mask": keep,
        "position_ids": np.clip(np.cumsum(keep, 1) - 1, 0, None)[:, past:],
    }
    for name in (f"past_key_values.{i}.{w}" for i in range(2) for w in ("key", "value")):
        made[name] = rng.standard_normal((2, 2, past, 8)).astype(np.float32)
    return made


def reference(module: Any, given: dict[str, np.ndarray]) -> np.ndarray:
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    for i in range(2):
        cache.update(*(torch.from_numpy(given[f"past_key_values.{i}.{w}"]).double() for w in ("key", "value")), i)
    with torch.no_grad():
        ids, mask, positions = (torch.from_numpy(given[n]) for n in ("input_ids", "attention_mask", "position_ids"))
        logits: np.ndarray = module(ids, mask, positions, cache).logits.numpy()
    return logits


def check(graph: Graph, module: Any) -> None:
    for seq, past, pads in ((5, 0, 0), (5, 0, 2), (3, 4, 2), (1, 6, 0)):
        given = feeds(seq, past, pads)
        # fp32 sums of a few hundred terms
        assert_close(
            Executable(graph).run(given)[0]["logits"], reference(module, given), 1e-5, f"{seq}, {past}, {pads}"
        )


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.full)])
def test_a_checkpoint_exports_and_is_recognized(tmp_path: Path, attention: str) -> None:
    module = write(tmp_path / "m").double()
    graph = export_checkpoint(tmp_path / "m", attention=attention, isolated=False)
    check(graph, module)
    fused = (
        "fuse-rms-norm{expect=5},fuse-rotary{positions=128,expect=4},split-packed-linear{expect=4},fuse-gqa{expect=2}"
    )
    run_pipeline(graph, f"simplify,{fused},fuse-swiglu{{expect=2}}")
    check(graph, module)
    names = [v.name for v in graph.constants() if ".0.self_attention" in v.name and v.name.endswith("weight")]
    stem = "transformer.encoder.layers.0.self_attention"
    assert names == [f"{stem}.dense.weight", *(f"{stem}.query_key_value.{i}.weight" for i in range(3))]


def test_a_call_without_a_cache_is_a_prefill(tmp_path: Path) -> None:
    import torch

    module = write(tmp_path / "m").double()
    given = feeds(5, 0, 0)
    with torch.no_grad():
        logits = module(torch.from_numpy(given["input_ids"])).logits.numpy()
    np.testing.assert_array_equal(logits, reference(module, given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multi_query_attention": False}, "config.json: multi_query_attention is False"),
        ({"add_bias_linear": True}, "config.json: add_bias_linear is True"),
        ({"quantization_bit": 4}, "config.json: quantization_bit is 4"),
        ({"num_attention_heads": 5}, "5 query heads do not divide into 2 KV groups"),
    ],
)
def test_another_structure_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChatGLMConfig.read({**CONFIG, **change})


def test_a_checkpoint_of_its_own_quantize_8_keeps_its_codes(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    write(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    tensors = load_file(file)
    codes: dict[str, np.ndarray] = {}
    for name in [n for n in tensors if ".layers." in n and n.endswith("weight") and tensors[n].ndim == 2]:
        weight = tensors[name]
        scale = (np.abs(weight).max(1) / 127).astype(np.float16)  # stored in half precision, and rounded with it
        codes[name] = np.rint(weight / scale[:, None].astype(np.float32)).clip(-127, 127).astype(np.int8)
        tensors |= {name: codes[name], f"{name}_scale": scale}
    save_file(tensors, file)
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "quantization_bit": 8}))
    graph = export_checkpoint(tmp_path / "m")
    run_pipeline(
        graph, "simplify,fuse-rms-norm,fuse-rotary{positions=64},split-packed-linear,fuse-gqa,fuse-swiglu,w8a16"
    )
    found = {v.name: v.const.read() for v in graph.constants() if v.name.endswith("qweight") and v.const is not None}
    packed = codes["transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"]
    halves = [found[n] for n in sorted(found) if "layers.1.mlp.dense_h_to_4h" in n]
    assert sorted(one.tobytes() for one in halves) == sorted(one.tobytes() for one in (packed[:48], packed[48:]))
    name = "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"
    stem = name.removesuffix(".weight")
    np.testing.assert_array_equal(found[f"{stem}.qweight"], codes[name])
    scales = graph.values[f"{stem}.scale"]
    assert scales.const is not None
    assert scales.type.dtype.value == "float"
    np.testing.assert_array_equal(scales.const.read(), tensors[f"{name}_scale"].astype(np.float32))

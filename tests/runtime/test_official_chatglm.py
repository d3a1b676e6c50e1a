"""A checkpoint in the official ChatGLM2 layout and an upstream configuration: compiled without its code, to torch's logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from vacc_opt.cli.main import main
from vacc_opt.frontends.models import ChatGLM, ChatGLMConfig
from vacc_opt.runtime.artifact import Artifact, open_artifact
from vacc_opt.runtime.engines import Engine, OnnxRuntimeEngine, ScheduleEngine
from vacc_opt.runtime.lint import lint

# the entries of the published config.json, small; `auto_map` names files that a deployment does not have
CONFIG = {
    "_name_or_path": "THUDM/chatglm2-6b", "model_type": "chatglm", "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True,
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "bias_dropout_fusion": True, "ffn_hidden_size": 96,
    "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 64, "kv_channels": 16, "layernorm_epsilon": 1e-05,
    "multi_query_attention": True, "multi_query_group_num": 2, "num_attention_heads": 8, "num_layers": 2, "original_rope": True,
    "padded_vocab_size": 160, "post_layer_norm": True, "rmsnorm": True, "seq_length": 128, "use_cache": True,
    "torch_dtype": "float16", "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
YAML = """\
name: chatglm2-6b-fp32-tp4-16-32
frontend:
  checkpoint: {checkpoint}
  type: huggingface
  shape:
    input_ids: [[16], [32]]
  model_kwargs:
    tp: 4
    b2s: true
    model_arch: vacc
backend:
  type: tvm_vacc
  dtype: fp32
  merge_params: true
  compile:
    data_type: 0
    gather_data_vccl_dsp_enable: true
workspace:
  path: {out}
  workers: 4
"""
TOLERANCE = 1e-5  # of the logits' scale, fp32 against float64


def write(root: Path) -> ChatGLM:
    """Three .bin shards of fp16 weights with their index; the module that holds the same values, in float64."""
    torch.manual_seed(0)
    module = ChatGLM(ChatGLMConfig.read(CONFIG)).eval()
    state = {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
            parameter.copy_(parameter.half())
            state[name] = parameter.detach().half()
    state["transformer.rotary_pos_emb.inv_freq"] = module.transformer.rotary_pos_emb.inv_freq.half()
    root.mkdir()
    weight_map = {}
    for i in range(3):
        file, names = f"pytorch_model-0000{i + 1}-of-00003.bin", list(state)[i::3]
        torch.save({name: state[name] for name in names}, root / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (root / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (root / "config.json").write_text(json.dumps(CONFIG))
    return module.double()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Any]:
    """The artifact that the command made, and the torch module."""
    root = tmp_path_factory.mktemp("official")
    module = write(root / "chatglm2-6b")
    (root / "model.yaml").write_text(YAML.format(checkpoint=root / "chatglm2-6b", out=root / "out"))
    assert main(["compile", str(root / "model.yaml")]) == 0
    return open_artifact(root / "out" / "chatglm2-6b-fp32-tp4-16-32"), module


def test_lint_warns_of_what_upstream_needs_and_this_compiler_does_not(tmp_path: Path) -> None:
    write(tmp_path / "chatglm2-6b")
    (tmp_path / "model.yaml").write_text(YAML.format(checkpoint=tmp_path / "chatglm2-6b", out=tmp_path / "out"))
    found = lint(tmp_path / "model.yaml")
    assert [(one.rule, one.severity) for one in found] == [("auto-map", "warning"), ("align-qkv", "warning")]
    assert "configuration_chatglm.py, modeling_chatglm.py" in found[0].message
    assert "over which 2 KV heads do not divide" in found[1].message


@pytest.mark.parametrize("kind", [OnnxRuntimeEngine, ScheduleEngine])
def test_prefill_and_decode_give_the_logits_of_torch(compiled: tuple[Artifact, Any], kind: type[Engine]) -> None:
    artifact, module = compiled
    assert artifact.ranks == 4
    engine, cache = kind(artifact), DynamicCache()
    tokens = np.random.default_rng(0).integers(0, 160, (1, 13))
    prompt = np.zeros((1, 16), np.int64)
    prompt[:, :11] = tokens[:, :11]
    calls = [("prefill", prompt, 0, 11), ("decode", tokens[:, 11:12], 11, 1), ("decode", tokens[:, 12:], 12, 1)]
    for phase, ids, pos, valid in calls:
        actual = engine.run(phase, ids, np.array([pos]), np.array([valid]))[0, 0]
        with torch.no_grad():
            given = torch.from_numpy(ids[:, :valid])
            mask, positions = torch.ones(1, pos + valid, dtype=torch.int64), torch.arange(pos, pos + valid)[None]
            result = module(given, mask, positions, cache)
        cache, expected = result.past_key_values, result.logits[0, -1].numpy()
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max(), phase

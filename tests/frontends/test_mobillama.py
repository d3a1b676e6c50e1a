"""MobiLlama: a Llama whose layers share one feed-forward block, of which a checkpoint holds one copy or many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vacc_opt.frontends import export_checkpoint, open_checkpoint
from vacc_opt.frontends.shared_layers import find_shared_layers
from vacc_opt.ir import UserError
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.tests.frontends import families

# entries of the published config.json, small; its number of KV heads is not that of the weights
CONFIG = {
    "model_type": "llama", "architectures": ["MobiLlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 64, "max_position_embeddings": 64, "num_attention_heads": 6,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 80,
}  # fmt: skip
ALONE = CONFIG | {"share_mlp": False}
# names: the state of the published class (model_utils/modeling_mobillama.py of mbzuai-oryx/MobiLlama), those of Llama
TENSORS = {
    "model.embed_tokens.weight": [80, 48],
    "model.layers.0.input_layernorm.weight": [48],
    "model.layers.0.self_attn.q_proj.weight": [48, 48],
    "model.layers.0.self_attn.k_proj.weight": [48, 48],
    "model.layers.0.self_attn.v_proj.weight": [48, 48],
    "model.layers.0.self_attn.o_proj.weight": [48, 48],
    "model.layers.0.post_attention_layernorm.weight": [48],
    "model.layers.0.mlp.gate_proj.weight": [64, 48],
    "model.layers.0.mlp.up_proj.weight": [64, 48],
    "model.layers.0.mlp.down_proj.weight": [48, 64],
    "model.norm.weight": [48],
    "lm_head.weight": [80, 48],
}


def write(path: Path, config: dict[str, Any], copies: str) -> Any:
    """A checkpoint with the shared block under ``layers.0``, under ``layers.1`` or under both; and its module."""
    module = families.build(config)
    families.write(path, config | {"architectures": CONFIG["architectures"]}, module)
    tensors = {n: p.detach().float() for n, p in module.named_parameters(remove_duplicate=False)}
    kept = {n: t.clone() for n, t in tensors.items() if ".mlp." not in n or n.split(".")[2] in copies}
    save_file(kept, path / "model.safetensors")
    return module


def test_tensors_have_their_published_names_with_one_feed_forward_block() -> None:
    module = families.build(CONFIG)
    assert families.shapes(module) == TENSORS
    assert not any(".layers.1.mlp" in name for name, _ in module.named_parameters())


@pytest.mark.parametrize("config", [CONFIG, ALONE], ids=["05b", "1b"])
def test_it_is_a_llama_with_one_block_in_all_layers_or_one_in_each(config: dict[str, Any]) -> None:
    weights = families.build(config).state_dict()
    families.check_equals(config, families.llama(config, weights, num_key_value_heads=6))


def test_both_kinds_of_attention_agree() -> None:
    families.check_both_kinds_of_attention(CONFIG)


def test_a_prompt_in_pieces_equals_one_call() -> None:
    families.check_prefill_and_decode(CONFIG)


def test_padding_changes_nothing() -> None:
    families.check_padding(CONFIG)


@pytest.mark.parametrize("copies", ["0", "1", "01"])
def test_a_shared_block_is_one_constant_whatever_copies_the_file_holds(tmp_path: Path, copies: str) -> None:
    write(tmp_path / "m", CONFIG, copies)
    found = find_shared_layers(open_checkpoint(tmp_path / "m"))
    assert found.config["share_mlp"] is True
    assert {n for n in found.tensors if ".mlp." in n} == {n for n in TENSORS if ".mlp." in n}


def test_blocks_that_differ_stay_apart(tmp_path: Path) -> None:
    write(tmp_path / "m", ALONE, "01")
    opened = open_checkpoint(tmp_path / "m")
    found = find_shared_layers(opened)
    assert found.config["share_mlp"] is False
    assert found.tensors == opened.tensors


def test_another_architecture_is_left_as_it_is(tmp_path: Path) -> None:
    families.write(tmp_path / "m", CONFIG | {"architectures": ["LlamaForCausalLM"]}, families.build(CONFIG))
    opened = open_checkpoint(tmp_path / "m")
    assert find_shared_layers(opened) is opened


@pytest.mark.parametrize("copies", ["1", "01"])
def test_a_checkpoint_exports_and_is_recognized(tmp_path: Path, copies: str) -> None:
    module = write(tmp_path / "m", CONFIG, copies)
    graph = export_checkpoint(tmp_path / "m", attention="eager", isolated=False)
    families.check_graph(graph, module, 80)
    run_pipeline(graph, "simplify,fuse-rms-norm{expect=5},fuse-rotary{positions=64,expect=4},fuse-gqa{expect=2}")
    families.check_graph(graph, module, 80)
    assert sum(np.prod(v.shape) == 64 * 48 for v in graph.constants() if ".mlp." in v.name) == 3


def test_a_config_of_llama_stays_with_transformers() -> None:
    from vacc_opt.frontends.huggingface import build_module

    module, _ = build_module(CONFIG | {"architectures": ["LlamaForCausalLM"]})
    assert type(module).__name__ == "LlamaForCausalLM"
    assert isinstance(module, torch.nn.Module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share_mlp": "some"}, "config.json: share_mlp is 'some'\n  choices: False, True"),
        ({"attention_bias": True}, "config.json: attention_bias is True"),
        ({"rope_theta": 500000.0}, "config.json: rope_theta is 500000.0"),
    ],
)
def test_another_structure_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        families.build(CONFIG | change)

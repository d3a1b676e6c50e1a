"""InternLM3: published tensor names, and a Llama with its own head size, biases and dynamic NTK rotary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vacc_opt.ir import UserError
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.tests.frontends import families

# entries of the published config.json of internlm3-8b-instruct, small
CONFIG = {
    "model_type": "internlm3", "architectures": ["InternLM3ForCausalLM"], "attention_dropout": 0.0, "bias": False, "head_dim": 16,
    "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 64, "max_position_embeddings": 64,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "qkv_bias": False, "rms_norm_eps": 1e-5,
    "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}, "rope_theta": 50000000, "tie_word_embeddings": False, "vocab_size": 80,
}  # fmt: skip
PLAIN = CONFIG | {"rope_scaling": None}
# names: the state of the published class (modeling_internlm3.py), those of Llama
TENSORS = {
    "model.embed_tokens.weight": [80, 48],
    "model.layers.0.input_layernorm.weight": [48],
    "model.layers.0.self_attn.q_proj.weight": [64, 48],
    "model.layers.0.self_attn.k_proj.weight": [32, 48],
    "model.layers.0.self_attn.v_proj.weight": [32, 48],
    "model.layers.0.self_attn.o_proj.weight": [48, 64],
    "model.layers.0.post_attention_layernorm.weight": [48],
    "model.layers.0.mlp.gate_proj.weight": [64, 48],
    "model.layers.0.mlp.up_proj.weight": [64, 48],
    "model.layers.0.mlp.down_proj.weight": [48, 64],
    "model.norm.weight": [48],
    "lm_head.weight": [80, 48],
}


def biases(config: dict[str, Any]) -> set[str]:
    return {name.split(".")[-2] for name in families.shapes(families.build(config)) if name.endswith("bias")}


def test_tensors_have_their_published_names() -> None:
    assert families.shapes(families.build(CONFIG)) == TENSORS


def test_each_bias_entry_has_its_own_projections() -> None:
    assert biases(CONFIG | {"qkv_bias": True}) == {"q_proj", "k_proj", "v_proj"}
    assert biases(CONFIG | {"bias": True}) == {"o_proj", "gate_proj", "up_proj", "down_proj"}


def test_it_is_a_llama_with_a_head_size_of_its_own() -> None:
    families.check_equals(PLAIN, families.llama(PLAIN, families.build(PLAIN).state_dict(), head_dim=16))


def test_biases_are_added_where_llama_adds_them() -> None:
    config = PLAIN | {"bias": True, "qkv_bias": True}
    changes = {"head_dim": 16, "attention_bias": True, "mlp_bias": True}
    families.check_equals(config, families.llama(config, families.build(config).state_dict(), **changes))


def test_dynamic_ntk_equals_that_of_transformers_beyond_the_trained_length() -> None:
    config = CONFIG | {"max_position_embeddings": 4}  # a prefill of six tokens is beyond it
    weights = families.build(config).state_dict()
    other = families.llama(config, weights, head_dim=16, rope_scaling={"rope_type": "dynamic", "factor": 6.0})
    families.check_equals(config, other, families.SINGLE)


def test_both_kinds_of_attention_agree() -> None:
    families.check_both_kinds_of_attention(CONFIG)


def test_a_prompt_in_pieces_equals_one_call() -> None:
    families.check_prefill_and_decode(CONFIG)


def test_padding_changes_nothing() -> None:
    families.check_padding(CONFIG)


def test_a_checkpoint_exports_and_is_recognized(tmp_path: Path) -> None:
    graph, module = families.exported(tmp_path / "m", PLAIN, "sdpa")
    fused = "fuse-rms-norm{expect=5},fuse-rotary{positions=64,expect=4},fuse-gqa{expect=2},fuse-swiglu{expect=2}"
    run_pipeline(graph, f"simplify,{fused}")
    families.check_graph(graph, module, 80)


def test_the_dynamic_base_is_part_of_the_graph(tmp_path: Path) -> None:
    graph, module = families.exported(tmp_path / "m", CONFIG | {"max_position_embeddings": 8}, "sdpa")
    families.check_graph(graph, module, 80, offset=20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_bias": "no"}, "config.json: qkv_bias is 'no'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 6.0}},
            "rope_scaling.type is 'yarn'\n  choices: default, dynamic",
        ),
        ({"head_dim": 15}, "a head has 15 channels"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide 4 query heads"),
    ],
)
def test_another_structure_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        families.build(CONFIG | change)

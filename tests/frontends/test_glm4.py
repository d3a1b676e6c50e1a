"""GLM-4-9B in the form of its remote code: a ChatGLM with a larger rotary base, equal to the `glm` of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GlmConfig, GlmForCausalLM

from vacc_opt.ir import UserError
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.tests.frontends import families

# entries of the published config.json of glm-4-9b-chat, small
CONFIG = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "ffn_hidden_size": 48, "fp32_residual_connection": False,
    "hidden_dropout": 0.0, "hidden_size": 32, "kv_channels": 8, "layernorm_epsilon": 1.5625e-07, "multi_query_attention": True,
    "multi_query_group_num": 2, "num_attention_heads": 4, "num_hidden_layers": 2, "num_layers": 2, "original_rope": True,
    "padded_vocab_size": 64, "post_layer_norm": True, "rmsnorm": True, "rope_ratio": 500, "seq_length": 128,
    "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
TO_GLM = {
    "transformer.embedding.word_embeddings": "model.embed_tokens", "transformer.encoder.final_layernorm": "model.norm",
    "transformer.encoder": "model", "transformer.output_layer": "lm_head", "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj", "mlp.dense_4h_to_h": "mlp.down_proj",
}  # fmt: skip


def glm() -> Any:
    """The `glm` of transformers, in which the same weights are published as glm-4-9b-hf."""
    weights = {}
    for name, parameter in families.build(CONFIG).named_parameters():
        for ours, theirs in TO_GLM.items():
            name = name.replace(ours, theirs)
        if "query_key_value" in name:
            for part, rows in zip("qkv", parameter.detach().split([32, 16, 16]), strict=True):
                weights[name.replace("self_attention.query_key_value", f"self_attn.{part}_proj")] = rows
        else:
            weights[name] = parameter.detach()
    config = GlmConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, partial_rotary_factor=0.5, rope_theta=10000.0 * 500, rms_norm_eps=1.5625e-07, attention_bias=True,
        tie_word_embeddings=False, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    return families.exact(GlmForCausalLM(config), weights)


def test_it_is_the_glm_of_transformers() -> None:
    families.check_equals(CONFIG, glm(), 1e-6)  # the powers of a base of 5 million differ in float32


def test_both_kinds_of_attention_agree() -> None:
    families.check_both_kinds_of_attention(CONFIG)


def test_a_prompt_in_pieces_equals_one_call() -> None:
    families.check_prefill_and_decode(CONFIG)


def test_padding_changes_nothing() -> None:
    families.check_padding(CONFIG)


def test_a_checkpoint_exports_and_is_recognized(tmp_path: Path) -> None:
    graph, module = families.exported(tmp_path / "m", CONFIG, "eager")
    fused = (
        "fuse-rms-norm{expect=5},fuse-rotary{positions=128,expect=4},split-packed-linear{expect=4},fuse-gqa{expect=2}"
    )
    run_pipeline(graph, f"simplify,{fused},fuse-swiglu{{expect=2}}")
    families.check_graph(graph, module, 64)


def test_two_numbers_of_layers_are_refused() -> None:
    with pytest.raises(UserError, match="num_layers is 2, but num_hidden_layers is 28"):
        families.build(CONFIG | {"num_hidden_layers": 28})

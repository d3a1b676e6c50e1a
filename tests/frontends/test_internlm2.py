"""InternLM2 and 2.5: published tensor names, and a Llama once the packed projection is cut into three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vacc_opt.ir import UserError
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.tests.frontends import families

# entries of the published config.json of internlm2_5-7b, small
CONFIG = {
    "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "attn_implementation": "eager", "bias": False,
    "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 64, "max_position_embeddings": 64,
    "num_attention_heads": 6, "num_hidden_layers": 2, "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1000000, "tie_word_embeddings": False, "vocab_size": 80,
}  # fmt: skip
PLAIN = CONFIG | {"rope_scaling": None}
# names: as the loader of vLLM (internlm2.py) and the converter of llama.cpp look for them in published checkpoints
TENSORS = {
    "model.tok_embeddings.weight": [80, 48],
    "model.layers.0.attention.wo.weight": [48, 48],
    "model.layers.0.attention.wqkv.weight": [80, 48],
    "model.layers.0.attention_norm.weight": [48],
    "model.layers.0.ffn_norm.weight": [48],
    "model.layers.0.feed_forward.w1.weight": [64, 48],
    "model.layers.0.feed_forward.w2.weight": [48, 64],
    "model.layers.0.feed_forward.w3.weight": [64, 48],
    "model.norm.weight": [48],
    "output.weight": [80, 48],
}
TO_LLAMA = {
    "tok_embeddings": "embed_tokens", "attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "output.weight": "lm_head.weight",
}  # fmt: skip


def llama(config: dict[str, Any], **changes: Any) -> Any:
    weights = {}
    for name, tensor in families.build(config).state_dict().items():
        if "wqkv" not in name:
            for ours, theirs in TO_LLAMA.items():
                name = name.replace(ours, theirs)
            weights[name] = tensor
            continue
        blocks = tensor.unflatten(0, (2, 5, 8))  # KV heads, (3 queries, key, value), D
        for part, rows in (("q", blocks[:, :3]), ("k", blocks[:, 3]), ("v", blocks[:, 4])):
            weights[name.replace("attention.wqkv", f"self_attn.{part}_proj")] = rows.reshape(-1, tensor.shape[-1])
    return families.llama(config, weights, **changes)


def test_tensors_have_their_published_names() -> None:
    assert families.shapes(families.build(CONFIG)) == TENSORS


def test_the_first_configs_name_another_model_type() -> None:
    assert families.shapes(families.build(CONFIG | {"model_type": "internlm"})) == TENSORS


def test_it_is_a_llama_with_its_projections_packed_by_group() -> None:
    families.check_equals(PLAIN, llama(PLAIN))


def test_dynamic_ntk_equals_that_of_transformers_beyond_the_trained_length() -> None:
    config = CONFIG | {"max_position_embeddings": 4}  # a prefill of six tokens is beyond it
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    families.check_equals(config, llama(config, rope_scaling=scaling), families.SINGLE)


def test_dynamic_ntk_is_the_plain_rotary_up_to_the_trained_length() -> None:
    tokens = families.some_tokens(CONFIG, 2, 8)
    plain = families.call(families.build(PLAIN), tokens).logits
    assert torch.equal(families.call(families.build(CONFIG | {"max_position_embeddings": 8}), tokens).logits, plain)
    assert not torch.equal(families.call(families.build(CONFIG | {"max_position_embeddings": 7}), tokens).logits, plain)


def test_linear_scaling_divides_positions() -> None:
    config = CONFIG | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    scaling = {"rope_type": "linear", "factor": 4.0}
    families.check_equals(config, llama(config, rope_scaling=scaling), families.SINGLE)


def test_both_kinds_of_attention_agree() -> None:
    families.check_both_kinds_of_attention(CONFIG)


def test_a_prompt_in_pieces_equals_one_call() -> None:
    families.check_prefill_and_decode(CONFIG)


def test_padding_changes_nothing() -> None:
    families.check_padding(CONFIG)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_checkpoint_exports_and_is_recognized(tmp_path: Path, attention: str) -> None:
    graph, module = families.exported(tmp_path / "m", PLAIN, attention)
    fused = (
        "fuse-rms-norm{expect=5},fuse-rotary{positions=64,expect=4},split-packed-linear{expect=2},fuse-gqa{expect=2}"
    )
    run_pipeline(graph, f"simplify,{fused},fuse-swiglu{{expect=2}}")
    families.check_graph(graph, module, 80)


def test_the_dynamic_base_is_part_of_the_graph(tmp_path: Path) -> None:
    graph, module = families.exported(tmp_path / "m", CONFIG | {"max_position_embeddings": 8}, "eager")
    families.check_graph(graph, module, 80, offset=20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu'"),
        (
            {"rope_scaling": {"type": "dynamik", "factor": 2.0}},
            "rope_scaling.type is 'dynamik'\n  did you mean `dynamic`",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": "two"}}, "rope_scaling.factor is 'two'"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, which does not divide 6 query heads\n  .* is 3"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', not a positive whole number"),
        ({"hidden_size": None}, "no `hidden_size`"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"bias": "yes"}, "bias is 'yes'"),
    ],
)
def test_another_structure_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        families.build(CONFIG | change)

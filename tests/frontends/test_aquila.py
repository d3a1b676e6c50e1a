"""Aquila2: published tensor names, a Llama where no score reaches the clamp, its own formula where one does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from vacc_opt.ir import UserError
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.tests.frontends import families

# entries of the published config.json of Aquila2-7B, small; the 34B has num_key_value_heads 8 of 48
SMALL = {
    "model_type": "aquila", "architectures": ["AquilaModel"], "bos_token_id": 100006, "eos_token_id": 100007, "hidden_act": "silu",
    "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 64, "max_position_embeddings": 64, "num_attention_heads": 6,
    "num_hidden_layers": 2, "pad_token_id": 0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "vocab_size": 80,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2}
SIZES = pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["7b", "34b"])
# names: the state of the published class (modeling_aquila.py), those of Llama
TENSORS = {
    "model.embed_tokens.weight": [80, 48],
    "model.layers.0.input_layernorm.weight": [48],
    "model.layers.0.self_attn.q_proj.weight": [48, 48],
    "model.layers.0.self_attn.k_proj.weight": [16, 48],
    "model.layers.0.self_attn.v_proj.weight": [16, 48],
    "model.layers.0.self_attn.o_proj.weight": [48, 48],
    "model.layers.0.post_attention_layernorm.weight": [48],
    "model.layers.0.mlp.gate_proj.weight": [64, 48],
    "model.layers.0.mlp.up_proj.weight": [64, 48],
    "model.layers.0.mlp.down_proj.weight": [48, 64],
    "model.norm.weight": [48],
    "lm_head.weight": [80, 48],
}


def test_tensors_have_their_published_names() -> None:
    assert families.shapes(families.build(GROUPED)) == TENSORS


@SIZES
def test_it_is_a_llama_where_no_score_reaches_the_clamp(config: dict[str, Any]) -> None:
    families.check_equals(config, families.llama(config, families.build(config).state_dict()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_scores_are_clamped_after_the_scale_and_before_the_mask(attention: str) -> None:
    module = families.build(SMALL, attention)
    layer = module.model.layers[0].self_attn
    x = 200 * torch.randn(1, 5, 48, dtype=torch.float64)
    context = module.model.context(torch.ones(1, 5, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64))
    query, key, value = (p(x).view(5, 6, 8).transpose(0, 1) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    scores = query @ key.transpose(1, 2) / math.sqrt(8)
    assert scores.abs().max() > 2048
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    weights = functional.softmax(scores.clip(-1024, 1024).masked_fill(hidden, -math.inf), dim=-1)
    with torch.no_grad():
        actual, _ = layer(x, context, None)
        families.same(actual[0], layer.o_proj((weights @ value).transpose(0, 1).reshape(5, 48)))


def test_both_kinds_of_attention_agree() -> None:
    families.check_both_kinds_of_attention(GROUPED)


def test_a_prompt_in_pieces_equals_one_call() -> None:
    families.check_prefill_and_decode(GROUPED)


def test_padding_changes_nothing() -> None:
    families.check_padding(GROUPED)


def test_a_checkpoint_exports_with_its_clamp(tmp_path: Path) -> None:
    graph, module = families.exported(tmp_path / "m", GROUPED, "eager")
    run_pipeline(graph, "simplify,fuse-rms-norm{expect=5},fuse-rotary{positions=64,expect=4},fuse-swiglu{expect=2}")
    families.check_graph(graph, module, 80)
    assert sum(node.op_type == "Clip" for node in graph.nodes()) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "swish"}, "config.json: hidden_act is 'swish'"),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5, which does not divide 6 query heads\n  .* is 6"),
        ({"rope_scaling": {"type": "linaer", "factor": 8.0}}, "'linaer'\n  did you mean `linear`"),
    ],
)
def test_another_structure_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        families.build(SMALL | change)

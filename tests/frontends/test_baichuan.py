"""Baichuan2: published tensor names, a Llama with a normalized head (7B), ALiBi against its formula (13B)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from vacc_opt.frontends.models.baichuan import alibi_slopes
from vacc_opt.ir import UserError
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.tests.frontends import families

COMMON = {
    "model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "hidden_act": "silu", "hidden_size": 48,
    "initializer_range": 0.02, "intermediate_size": 64, "num_attention_heads": 6, "num_hidden_layers": 2, "pad_token_id": 0,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 80,
}  # fmt: skip
# the entries on length as in the published config.json of Baichuan2-7B-Base and of Baichuan2-13B-Base
SMALL = COMMON | {"max_position_embeddings": 64, "model_max_length": 64}
LARGE = COMMON | {"model_max_length": 64}
SIZES = pytest.mark.parametrize("config", [SMALL, LARGE], ids=["7b", "13b"])
# names: the state of the published class (modeling_baichuan.py), as the loader of vLLM (baichuan.py) looks for them
TENSORS = {
    "model.embed_tokens.weight": [80, 48],
    "model.layers.0.input_layernorm.weight": [48],
    "model.layers.0.self_attn.W_pack.weight": [144, 48],
    "model.layers.0.self_attn.o_proj.weight": [48, 48],
    "model.layers.0.post_attention_layernorm.weight": [48],
    "model.layers.0.mlp.gate_proj.weight": [64, 48],
    "model.layers.0.mlp.up_proj.weight": [64, 48],
    "model.layers.0.mlp.down_proj.weight": [48, 64],
    "model.norm.weight": [48],
    "lm_head.weight": [80, 48],
}


def llama(config: dict[str, Any]) -> Any:
    weights = {}
    for name, tensor in families.build(config).state_dict().items():
        if "W_pack" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace("W_pack", f"{part}_proj")] = rows
        else:
            weights[name] = tensor / tensor.norm(dim=1, keepdim=True) if "lm_head" in name else tensor
    return families.llama(config, weights)


@SIZES
def test_tensors_have_their_published_names(config: dict[str, Any]) -> None:
    assert families.shapes(families.build(config)) == TENSORS


def test_the_7b_is_a_llama_with_normalized_rows_in_its_head() -> None:
    families.check_equals(SMALL, llama(SMALL))


def test_the_head_of_the_first_version_is_an_ordinary_projection() -> None:
    first, second = (families.build(SMALL | {"vocab_size": size}) for size in (64000, 64001))
    assert type(first.lm_head) is torch.nn.Linear
    assert type(second.lm_head).__name__ == "NormHead"


def test_slopes_are_those_of_the_paper_and_interpolate_for_other_numbers_of_heads() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    forty = alibi_slopes(40)  # the 13B
    assert forty[:32] == alibi_slopes(32)
    assert forty[32:] == alibi_slopes(64)[0:16:2]
    assert len(set(forty)) == 40


def test_the_13b_attends_by_the_formula_of_alibi() -> None:
    """softmax(q k / sqrt(D) - slope * (i - j)) v over keys j <= i, written out for one layer."""
    module = families.build(LARGE)
    attention = module.model.layers[0].self_attn
    x = torch.randn(1, 7, 48, dtype=torch.float64)
    query, key, value = attention.W_pack(x)[0].view(7, 3, 6, 8).permute(1, 2, 0, 3)
    expected = torch.zeros(6, 7, 8, dtype=torch.float64)
    for head, slope in enumerate(alibi_slopes(6)):
        for i in range(7):
            scores = [query[head, i] @ key[head, j] / math.sqrt(8) - slope * (i - j) for j in range(i + 1)]
            expected[head, i] = functional.softmax(torch.stack(scores), 0) @ value[head, : i + 1]
    context = module.model.context(torch.ones(1, 7, dtype=torch.int64), torch.arange(7)[None])
    with torch.no_grad():
        actual, _ = attention(x, context, None)
        families.same(actual[0], attention.o_proj(expected.transpose(0, 1).reshape(7, 48)))


@SIZES
def test_both_kinds_of_attention_agree(config: dict[str, Any]) -> None:
    families.check_both_kinds_of_attention(config)


@SIZES
def test_a_prompt_in_pieces_equals_one_call(config: dict[str, Any]) -> None:
    families.check_prefill_and_decode(config)


@SIZES
def test_padding_changes_nothing(config: dict[str, Any]) -> None:
    families.check_padding(config)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_7b_checkpoint_exports_and_is_recognized(tmp_path: Path, attention: str) -> None:
    graph, module = families.exported(tmp_path / "m", SMALL, attention)
    fused = "fuse-rms-norm{expect=5},fuse-rotary{positions=64,expect=4},split-packed-linear{expect=2},fuse-gqa"
    run_pipeline(graph, f"simplify,{fused},fuse-swiglu{{expect=2}}")
    families.check_graph(graph, module, 80)
    assert sum(node.op_type == "Attention" for node in graph.nodes()) == 2  # with as many KV heads, sdpa is one already


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_13b_checkpoint_exports_with_slopes_and_no_constant_of_a_length(tmp_path: Path, attention: str) -> None:
    graph, module = families.exported(tmp_path / "m", LARGE, attention)
    run_pipeline(graph, "simplify,fuse-rms-norm{expect=5},split-packed-linear{expect=2},fuse-gqa,fuse-swiglu")
    families.check_graph(graph, module, 80)
    assert sum(node.op_type == "Attention" for node in graph.nodes()) == 2
    known = [v for v in graph.constants() if v.name not in dict(module.named_parameters())]
    assert all(np.prod(v.shape or ()) <= 144 for v in known if not v.name.endswith("weight"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "config.json: hidden_act is 'relu'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2\n  choices: 6"),
        ({"num_attention_heads": 5}, "hidden_size is 48, which 5 heads do not divide"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is {'type': 'linear'"),
        ({"vocab_size": 0}, "vocab_size is 0, not a positive whole number"),
    ],
)
def test_another_structure_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        families.build(SMALL | change)

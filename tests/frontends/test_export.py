"""Exports of small random models, compared with torch in float64."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vacc_opt.frontends import export_checkpoint
from vacc_opt.ir import Graph
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.ir.tensor import Source

Outputs = dict[str, np.ndarray]


@cache
def exported(path: Path, attention: str) -> Graph:
    return export_checkpoint(path, attention=attention, isolated=False)


def run_graph(graph: Graph, feeds: Outputs) -> Outputs:
    return Executable(graph).run(feeds)[0]


def run_torch(module: Any, feeds: Outputs) -> Outputs:
    """The model in float64 on the same inputs, outputs under the names of the exported interface."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(module.config.num_hidden_layers):
        past = [torch.from_numpy(feeds[f"past_key_values.{layer}.{part}"]).double() for part in ("key", "value")]
        cache.update(past[0], past[1], layer)
    with torch.no_grad():
        result = copy.deepcopy(module).double()(
            input_ids=torch.from_numpy(feeds["input_ids"]),
            attention_mask=torch.from_numpy(feeds["attention_mask"]),
            position_ids=torch.from_numpy(feeds["position_ids"]),
            past_key_values=cache,
            use_cache=True,
        )
    outputs = {"logits": result.logits.numpy()}
    for i, layer in enumerate(result.past_key_values.layers):
        outputs |= {f"present.{i}.key": layer.keys.numpy(), f"present.{i}.value": layer.values.numpy()}
    return outputs


def make_feeds(config: Any, mask: np.ndarray, seq: int, cache: Outputs | None = None) -> Outputs:
    """The last ``seq`` tokens of a left-padded batch whose whole mask is given; ``cache`` holds what came before."""
    batch, total = mask.shape
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    tokens = np.random.default_rng(total).integers(3, config.vocab_size, (batch, seq))
    feeds = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions[:, total - seq :]}
    head_dim = config.hidden_size // config.num_attention_heads
    empty = np.zeros((batch, config.num_key_value_heads, total - seq, head_dim), np.float32)
    for i in range(config.num_hidden_layers):
        for part in ("key", "value"):
            present = (cache or {}).get(f"present.{i}.{part}", empty)
            feeds[f"past_key_values.{i}.{part}"] = np.ascontiguousarray(present, dtype=np.float32)
    return feeds


def assert_close(actual: Outputs, expected: Outputs, visible: np.ndarray) -> None:
    """Within 1e-5 of the scale at the tokens that are not padding: ``visible`` is [batch, seq]."""
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, name
        if name == "logits":
            got, want = got[visible], want[visible]
        else:
            new = visible.shape[1]
            got, want = (np.moveaxis(x[:, :, -new:], 2, 1)[visible] for x in (got, want))
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prefill_of_a_left_padded_batch_equals_torch(tied_llama: Any, attention: str) -> None:
    mask = np.ones((3, 9), np.int64)
    mask[1, :4] = 0
    feeds = make_feeds(tied_llama.module.config, mask, 9)
    actual = run_graph(exported(tied_llama.path, attention), feeds)
    assert_close(actual, run_torch(tied_llama.module, feeds), mask == 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_decode_step_after_a_left_padded_prefill_equals_torch(tied_llama: Any, attention: str) -> None:
    config, graph = tied_llama.module.config, exported(tied_llama.path, attention)
    mask = np.ones((2, 8), np.int64)
    mask[1, :3] = 0
    cache = run_torch(tied_llama.module, make_feeds(config, mask[:, :7], 7))
    feeds = make_feeds(config, mask, 1, cache)
    assert_close(run_graph(graph, feeds), run_torch(tied_llama.module, feeds), np.ones((2, 1), bool))


@pytest.mark.parametrize(("batch", "seq", "past"), [(1, 1, 0), (1, 16, 0), (1, 1, 5), (2, 3, 8)])
def test_one_export_serves_every_batch_and_length(tied_llama: Any, batch: int, seq: int, past: int) -> None:
    config = tied_llama.module.config
    cache: Outputs = {}
    if past:
        cache = run_torch(tied_llama.module, make_feeds(config, np.ones((batch, past), np.int64), past))
    feeds = make_feeds(config, np.ones((batch, past + seq), np.int64), seq, cache)
    actual = run_graph(exported(tied_llama.path, "eager"), feeds)
    assert_close(actual, run_torch(tied_llama.module, feeds), np.ones((batch, seq), bool))


def test_untied_model_with_bfloat16_weights_equals_torch(untied_llama: Any, save_model: Any, tmp_path: Path) -> None:
    import torch

    rounded = copy.deepcopy(untied_llama.module)
    for parameter in rounded.parameters():  # not the module: the rotary frequencies are no weights and stay float32
        parameter.data = parameter.data.to(torch.bfloat16)
    save_model(rounded, tmp_path)
    feeds = make_feeds(rounded.config, np.ones((1, 5), np.int64), 5)
    actual = run_graph(export_checkpoint(tmp_path, isolated=False), feeds)
    assert_close(actual, run_torch(rounded, feeds), np.ones((1, 5), bool))


def test_interface_has_the_agreed_names_and_symbolic_sizes(tied_llama: Any) -> None:
    graph = exported(tied_llama.path, "eager")
    types = {v.name: str(v.type) for v in graph.inputs} | {n: str(v.type) for n, v in graph.outputs.items()}
    assert types == {
        "input_ids": "int64[batch,seq]",
        "attention_mask": "int64[batch,past + seq]",
        "position_ids": "int64[batch,seq]",
        "logits": "float[batch,seq,64]",
        **{f"past_key_values.{i}.{p}": "float[batch,2,past,8]" for i in range(2) for p in ("key", "value")},
        **{f"present.{i}.{p}": "float[batch,2,past + seq,8]" for i in range(2) for p in ("key", "value")},
    }


def test_fusions_are_left_to_our_passes(tied_llama: Any) -> None:
    counts = exported(tied_llama.path, "eager").op_counts()
    assert counts["Softmax"] == 2
    assert counts["ReduceMean"] == 5
    assert not {"RMSNormalization", "RotaryEmbedding", "Attention"} & set(counts)


def test_tied_embeddings_are_one_constant_in_the_file(tied_llama: Any) -> None:
    graph = exported(tied_llama.path, "eager")
    tables = [v for v in graph.constants() if v.const is not None and v.const.shape == (64, 32)]
    assert [v.name for v in tables] == ["model.embed_tokens.weight"]
    assert isinstance(tables[0].const, Source)


def test_every_weight_stays_in_the_checkpoint(tied_llama: Any) -> None:
    graph = exported(tied_llama.path, "eager")
    held = {n for n, _ in tied_llama.module.named_parameters()}
    referenced = {v.name for v in graph.constants() if isinstance(v.const, Source)}
    assert referenced == held


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_node_says_where_it_comes_from(tied_llama: Any, attention: str) -> None:
    graph = exported(tied_llama.path, attention)
    for node in graph.nodes():
        (origin,) = node.provenance.origins
        name, _, line = origin.source.partition(":")
        assert name.endswith(".py"), node
        assert "/" not in name, node
        assert int(line) > 0
        assert origin.op
    projection = next(n for n in graph.by_op("MatMul") if n.provenance.origins[0].module.endswith("q_proj"))
    assert projection.provenance.where().startswith("model.layers.0.self_attn.q_proj modeling_llama.py:")


def test_exported_twice_gives_the_same_graph(untied_llama: Any) -> None:
    texts = [
        [
            (n.op, n.output.name, [v and v.name for v in n.inputs])
            for n in export_checkpoint(untied_llama.path, isolated=False).nodes()
        ]
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def test_isolated_export_keeps_torch_out_of_the_parent_and_is_the_same_and_quiet(untied_llama: Any) -> None:
    code = (
        "import sys\n"
        "from vacc_opt.frontends import export_checkpoint\n"
        "stages = []\n"
        "graph = export_checkpoint(sys.argv[1], progress=stages.append)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(len(graph), ', '.join(stages))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(untied_llama.path)], capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    expected = len(exported(untied_llama.path, "eager"))
    assert done.stdout == f"{expected} open checkpoint, load torch, export, simplify, import graph\n"


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, vacc_opt.frontends; assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_mistake_in_the_child_is_a_user_error_in_the_parent(untied_llama: Any) -> None:
    with pytest.raises(UserError, match="unknown attention `eagr`") as caught:
        export_checkpoint(untied_llama.path, attention="eagr")
    assert caught.value.hint == "did you mean `eager`?"

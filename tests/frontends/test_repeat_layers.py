"""Layers that cannot be told from the second one are copies of it; any difference exports the whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from vacc_opt.frontends import torch_export
from vacc_opt.frontends.caches import find_cache
from vacc_opt.frontends.families import structures
from vacc_opt.frontends.huggingface import build_module
from vacc_opt.frontends.repeat_layers import KEPT, Layers
from vacc_opt.frontends.rope_lengths import trace_lengths
from vacc_opt.frontends.same_layers import find_same_layers
from vacc_opt.frontends.skeleton import export_skeleton
from vacc_opt.ir import Seeded, from_onnx
from vacc_opt.ir.evaluate import Executable

STRUCTURES = dict(structures())
COUNT = 5


def config(name: str) -> dict[str, Any]:
    """The small config of a family with five layers."""
    small = dict(STRUCTURES[name].config)
    return small | {"num_layers" if "num_layers" in small else "num_hidden_layers": COUNT}


def found(change: Callable[[Any], object] | None = None, name: str = "llama") -> Layers | None:
    """The same layers of a model after a change."""
    module, mode = build_module(config(name))
    trace_lengths(module)
    if change is not None:
        change(module)
    return find_same_layers(module, mode, find_cache(module, mode))


@pytest.mark.parametrize(
    "name", ["llama3-2", "qwen3-1", "phi-2", "chatglm2", "baichuan2-2", "internlm2", "mobillama-1"]
)
def test_layers_of_families_are_the_same(name: str) -> None:
    assert found(name=name) is not None


def skeleton(name: str, monkeypatch: pytest.MonkeyPatch, *, whole: bool) -> onnx.ModelProto:
    """The exported model; ``whole`` exports every layer."""
    if whole:
        monkeypatch.setattr(torch_export, "find_same_layers", lambda *_: None)
    found = export_skeleton(config(name), "eager", isolated=False, progress=lambda _: None)
    monkeypatch.undo()
    model, modules = found.model, {origin.module for origin in found.origins.values()}
    assert any(f".{COUNT - 1}.self_att" in module for module in modules)
    assert whole != any(output.endswith(f".{COUNT - 1}") for node in model.graph.node for output in node.output)
    return model


def interface(model: onnx.ModelProto) -> tuple[set[str], list[str]]:
    """Inputs with their types, and outputs in order."""
    inputs = {f"{v.name} {v.type.tensor_type.shape}" for v in model.graph.input}
    return inputs, [v.name for v in model.graph.output]


def run(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Outputs on seeded weights and inputs: 2 rows, one left-padded, 3 tokens behind 4."""
    sizes = {"batch": 2, "seq": 3, "past": 4, "past + seq": 7}
    rng = np.random.default_rng(0)
    feeds, weights = {}, {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = tuple(sizes[d.dim_param] if d.dim_param else d.dim_value for d in dims)
        if value.name.startswith("past_key_values"):
            feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
        elif value.name not in ("input_ids", "attention_mask", "position_ids"):
            weights[value.name] = Seeded(value.name, "float", shape)
    feeds["input_ids"] = np.array([[5, 6, 7], [8, 9, 10]])
    feeds["attention_mask"] = np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    feeds["position_ids"] = np.array([[2, 3, 4], [4, 5, 6]])
    return Executable(from_onnx(model, weights, {}, {})).run(feeds)[0]


@pytest.mark.parametrize(
    "name",
    ["llama3-3", *(pytest.param(n, marks=pytest.mark.full) for n in ("chatglm2", "mobillama-1", "qwen3-1", "phi-2"))],
)
def test_copied_layers_are_what_the_export_of_all_layers_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied, whole = (skeleton(name, monkeypatch, whole=way) for way in (False, True))
    assert Counter(n.op_type for n in copied.graph.node) == Counter(n.op_type for n in whole.graph.node)
    assert interface(copied) == interface(whole)
    actual, expected = run(copied), run(whole)
    for output, value in expected.items():
        assert np.array_equal(actual[output], value), output


def test_few_layers_are_exported_as_they_are() -> None:
    module, mode = build_module(config("llama") | {"num_hidden_layers": KEPT + 1})
    assert find_same_layers(module, mode, find_cache(module, mode)) is None


def another_operator(module: Any) -> None:
    module.model.layers[3].register_forward_hook(lambda layer, given, result: result * 2)


def another_operator_in_long_calls(module: Any) -> None:
    def branch(layer: nn.Module, given: Any, result: torch.Tensor) -> torch.Tensor:
        return result * 2 if result.shape[1] > 100 else result

    module.model.layers[3].register_forward_hook(branch)


def another_number(module: Any) -> None:
    for index, layer in enumerate(module.model.layers):
        layer.register_forward_hook(lambda layer, given, result, index=index: result * (2.0 + (index == 3)))


def another_constant(module: Any) -> None:
    for index, layer in enumerate(module.model.layers):
        layer.register_forward_hook(lambda layer, given, result, index=index: result * torch.tensor(2.0 + index))


def another_setting(module: Any) -> None:
    module.model.layers[4].self_attn.scaling = 0.5


def another_buffer(module: Any) -> None:
    for index, layer in enumerate(module.model.layers):
        layer.register_buffer("gain", torch.tensor(2.0 + (index == 4)))


def another_module(module: Any) -> None:
    module.model.layers[2].mlp.act_fn = nn.GELU()


def a_layer_reads_an_early_one(module: Any) -> None:
    kept: list[torch.Tensor] = []

    def keep(layer: nn.Module, given: Any, result: torch.Tensor) -> None:
        kept[:] = [result]

    module.model.layers[0].register_forward_hook(keep)
    module.model.layers[4].register_forward_hook(lambda layer, given, result: result + kept[0])


def the_head_reads_an_early_layer(module: Any) -> None:
    kept: list[torch.Tensor] = []

    def keep(layer: nn.Module, given: Any, result: torch.Tensor) -> None:
        kept[:] = [result]

    module.model.layers[0].register_forward_hook(keep)
    module.model.norm.register_forward_hook(lambda norm, given, result: result + kept[0])


@pytest.mark.parametrize(
    "change",
    [
        another_operator, another_operator_in_long_calls, another_number, another_constant, another_setting, another_buffer, another_module,
        a_layer_reads_an_early_one, the_head_reads_an_early_layer,
    ],
)  # fmt: skip
def test_a_layer_that_can_be_told_from_the_others_exports_the_whole_model(change: Callable[[Any], None]) -> None:
    assert found() == Layers("model.layers", COUNT)
    assert found(change) is None

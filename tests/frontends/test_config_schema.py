"""The whole upstream schema: each key and value is honored, or accepted with a note, or refused with the nearest choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from vacc_opt.frontends import load_config
from vacc_opt.frontends.config_notes import MEANINGS, keys, meaning, notes
from vacc_opt.ir.errors import UserError

# every key of upstream's published files with every kind of value that they give it
HONORED: dict[str, list[Any]] = {
    "name": ["chatglm2-6b-fp16-tp4-1024-2048", "Qwen2.5-7B-Instruct-int8-tp8-2048-4096", "model.v2_int8-kv8"],
    "frontend.checkpoint": ["/path/to/model"],
    "frontend.type": ["huggingface"],
    "frontend.shape.input_ids": [[[1024], [2048]], [[512], [1024]], [[2048], [4096]], [[1792], [5888]], [[512], []]],
    "frontend.model_kwargs.tp": [4, 8],
    "frontend.model_kwargs.align_qkv": [True, False],
    "frontend.quantize.type": ["w8a16_gptq", "w16kv8"],
    "frontend.quantize.calib_args.true_sequential": [True, False],
    "backend.type": ["tvm_vacc"],
    "backend.dtype": ["fp16", "int8"],
    "dataset.type": ["huggingface"],
    "dataset.name": ["alpaca", "c4", "ceval"],
    "dataset.path": ["yahma/alpaca-cleaned"],
    "dataset.nsamples": [128],
    "dataset.seqlen": [512, 1024, 128],
    "workspace.path": ["./vacc_deploy"],
    "workspace.workers": [4, 1],
}
NOTED: dict[str, list[Any]] = {
    "frontend.model_kwargs.b2s": [True, False],
    "frontend.model_kwargs.model_arch": ["vacc"],
    "frontend.model_kwargs.enable_kv_share": [True],
    "frontend.model_kwargs.build_visual": [True],
    "frontend.quantize.device": ["cuda:5", "cpu"],
    "backend.merge_params": [True, False],
    "backend.remove_params": [True],
    "backend.compile.data_type": [0],
    "backend.compile.gather_data_vccl_dsp_enable": [True, False],
    "backend.compile.attention_split_num": [16, 32],
    "backend.compile.ffn_split_num": [4, 16],
    "backend.compile.stream_mode": [1, True],
    "backend.compile.cluster_mode": [0],
    "backend.compile.output_layout": [["0:YX"]],
    "backend.compile.data_transport_mode": [1],
    "backend.compile.llm_build": [True],
    "backend.compile.fullatt_block_indexes": [[7, 15, 23, 31]],
    "backend.quantize.calibrate_mode": ["max", "percentile", "kl_divergence", "mse"],
    "backend.quantize.quantize_per_channel": [True],
    "backend.quantize.overflow_adaptive": [1],
    "backend.quantize.calibrate_range": [0.9],
    "dataset.sampler.suffix": ["json"],
    "dataset.sampler.get_data_num": [10],
    "workspace.pyenv.transformers": ["4.51.3", 4.4],
    "workspace.pyenv.huggingface-hub": ["0.30.2"],
    "workspace.env_recheck": [True],
}
CASES = [(key, value) for key, values in (HONORED | NOTED).items() for value in values]


def config_with(tmp_path: Path, key: str, value: Any) -> Any:
    """The smallest configuration, with one key set."""
    data: dict[str, Any] = {"name": "m", "frontend": {"checkpoint": "/m", "shape": {"input_ids": [[1024], [2048]]}}}
    needed = {"frontend.quantize": {"type": "w8a16"}, "dataset": {"path": "text.json"}}
    section = data
    *above, last = key.split(".")
    for depth, part in enumerate(above):
        section = section.setdefault(part, dict(needed.get(".".join(above[: depth + 1]), {})))
    section[last] = value
    with (tmp_path / "c.yaml").open("w") as file:
        YAML(typ="safe").dump(data, file)
    return load_config(tmp_path / "c.yaml")


def read(config: Any, key: str) -> Any:
    for part in key.replace("-", "_").split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(("key", "value"), CASES, ids=[f"{k}={v}" for k, v in CASES])
def test_each_published_value_is_read_and_noted_where_it_changes_nothing(tmp_path: Path, key: str, value: Any) -> None:
    config = config_with(tmp_path, key, value)
    assert read(config, key) == value
    found = [label for label, _ in notes(config)]
    last = key.rpartition(".")[2]
    assert [label.partition(":")[0] for label in found] == ([last] if key in NOTED else [])


def test_every_key_of_the_reference_is_in_the_schema_and_each_note_belongs_to_one() -> None:
    known = set(keys())
    assert set(HONORED) | set(NOTED) <= known
    assert all(any(key == noted or key.startswith(f"{noted}.") for key in known) for noted in MEANINGS)
    assert {key for key in known if meaning(key) is not None} >= set(NOTED)


def test_several_lengths_have_a_note_that_says_how_they_are_read(tmp_path: Path) -> None:
    config = config_with(tmp_path, "frontend.shape.input_ids", [[256, 1024], [2048]])
    assert notes(config) == [
        (
            "input_ids: [[256, 1024], [2048]]",
            "prefill lengths, then contexts: a schedule for each pair, over one file of weights a rank",
        )
    ]


def test_a_file_without_such_keys_has_no_notes(tmp_path: Path) -> None:
    assert notes(config_with(tmp_path, "frontend.model_kwargs.tp", 4)) == []


def test_a_note_says_what_the_key_means_here(tmp_path: Path) -> None:
    assert notes(config_with(tmp_path, "backend.merge_params", True)) == [
        ("merge_params: true", "weights are stored once for both phases, always")
    ]


@pytest.mark.parametrize("key", sorted(HONORED | NOTED))
def test_each_key_with_a_letter_doubled_is_refused_with_the_right_one(tmp_path: Path, key: str) -> None:
    above, _, last = key.rpartition(".")
    wrong = f"{above}.{last}{last[-1]}".lstrip(".")
    with pytest.raises(UserError) as caught:
        config_with(tmp_path, wrong, 1)
    assert f"unknown key {wrong}" in caught.value.message
    assert f"did you mean `{last}`?" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("frontend.model_kwargs.model_arch", "vac", "did you mean `vacc`?"),
        ("backend.compile.data_type", 2, "choices: 0"),
        ("backend.dtype", "in8", "did you mean `int8`?"),
        ("frontend.quantize.type", "w8a16gptq", "did you mean `w8a16_gptq`?"),
        ("dataset.name", "alpacca", "did you mean `alpaca`?"),
        ("backend.type", "tvm_vac", "did you mean `tvm_vacc`?"),
        ("frontend.tp", 4, "`tp` belongs under frontend.model_kwargs"),
        ("backend.gather_data_vccl_dsp_enable", True, "`gather_data_vccl_dsp_enable` belongs under backend.compile"),
    ],
)
def test_another_value_or_place_is_refused_with_the_nearest(tmp_path: Path, key: str, value: Any, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        config_with(tmp_path, key, value)
    assert hint in (caught.value.hint or "")

"""The compile configuration: upstream's files are accepted as they are, mistakes are named with file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vacc_opt.frontends import load_config, open_checkpoint
from vacc_opt.ir.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"

GOOD = """\
name: model-fp16-tp4
frontend:
  checkpoint: /path/to/model
  type: huggingface
  shape:
    input_ids: [[1024], [2048]]
  model_kwargs:
    tp: 4
    model_arch: vacc
backend:
  type: tvm_vacc
  dtype: fp16
"""

EVERY_KEY = """\
name: model.v2_int8-tp4-512-1024-kv8
frontend:
  checkpoint: /path/to/model
  type: huggingface
  shape:
    input_ids: [[512], [1024]]
  model_kwargs: {tp: 4, b2s: true, model_arch: vacc, align_qkv: true, build_visual: false}
  quantize:
    type: w8a16_gptq
    device: cuda:5
    calib_args:
      true_sequential: false
    kv_scales: scales.safetensors
backend:
  type: tvm_vacc
  dtype: int8
  target: vacc-card4
  merge_params: true
  remove_params: false
  compile:
    data_type: 0
    gather_data_vccl_dsp_enable: true
    attention_split_num: 16
    ffn_split_num: 4
    stream_mode: 1
    cluster_mode: 0
    output_layout: ["0:YX", "1:YX"]
    data_transport_mode: 1
    llm_build: true
    fullatt_block_indexes: [7, 15]
  quantize: {calibrate_mode: percentile, quantize_per_channel: true, overflow_adaptive: 1, calibrate_range: 0.9}
dataset:
  type: huggingface
  name: c4
  path: allenai/c4
  nsamples: 128
  seqlen: 1024
  sampler: {suffix: json, get_data_num: 10}
workspace:
  path: vamc_results
  workers: 4
  pyenv: {transformers: 4.51.3, huggingface-hub: 0.30.2}
  env_recheck: false
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Load the text as a file called c.yaml."""

    def load_text(text: str, *overrides: str) -> Any:
        (tmp_path / "c.yaml").write_text(text)
        return load_config(tmp_path / "c.yaml", overrides)

    return load_text


def test_small_file_gets_defaults(load: Any) -> None:
    config = load(GOOD)
    assert (config.frontend.shape.prefills, config.frontend.shape.contexts) == ((1024,), (2048,))
    assert config.frontend.model_kwargs.tp == 4
    assert config.frontend.quantize is None
    assert config.backend.target == "vacc-reference"
    assert config.output == Path("vacc_deploy/model-fp16-tp4")


def test_every_upstream_key_is_accepted(load: Any) -> None:
    config = load(EVERY_KEY)
    assert config.frontend.quantize.gptq
    assert config.frontend.quantize.kv_scales == "scales.safetensors"
    assert config.dataset.seqlen == 1024
    assert config.backend.compile.output_layout == ["0:YX", "1:YX"]
    assert config.workspace.pyenv.huggingface_hub == "0.30.2"


def test_model_without_a_decode_phase_has_no_context(load: Any) -> None:
    assert load(GOOD, "frontend.shape.input_ids=[[512], []]").frontend.shape.contexts == ()


def test_the_first_list_has_prefill_lengths_and_the_second_contexts_in_any_order(load: Any) -> None:
    shape = load(GOOD, "frontend.shape.input_ids=[[1024, 256], [4096, 2048]]").frontend.shape
    assert (shape.prefills, shape.contexts) == ((256, 1024), (2048, 4096))


@pytest.mark.parametrize(
    ("rows", "message", "hint"),
    [
        ("[[256, 250], [512]]", "input_ids[0][1]: 250 is not a positive multiple of 16", "the nearest is 240 or 256"),
        ("[[256, 16, 256], [512]]", "the prefill length 256 is given twice", "the nearest is [16, 256]"),
        ("[[256], [512, 512]]", "the decode context 512 is given twice", "the nearest is [512]"),
        (
            "[[256], [1024], [2048]]",
            "3 lists, and there are two: prefill lengths and contexts",
            "the nearest is [[256, 1024], [2048]]",
        ),
        (
            "[[256, 4096], [512, 2048]]",
            "the decode context 2048 is shorter than the prefill length 4096",
            "the nearest are a context of 4096 and a prefill length of 2048",
        ),
        (
            "[[256, 512], [128, 2048]]",
            "the decode context 128 is shorter than the prefill length 256",
            "the nearest are a context of 256 and a prefill length of 128",
        ),
        ("[[], [512]]", "input_ids needs a prefill length", "as in [[1024], [2048]]"),
    ],
)
def test_lengths_that_do_not_go_together_are_refused_with_the_nearest(
    load: Any, rows: str, message: str, hint: str
) -> None:
    with pytest.raises(UserError) as caught:
        load(GOOD, f"frontend.shape.input_ids={rows}")
    assert caught.value.message.startswith(f"-D frontend.shape.input_ids={rows}: frontend.shape.input_ids")
    assert message in caught.value.message
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("kind", "weights", "cache", "gptq"),
    [
        ("w8a16", True, False, False),
        ("w8a16_gptq", True, False, True),
        ("w16kv8", False, True, False),
        ("w8kv8", True, True, False),
        ("w8kv8_gptq", True, True, True),
    ],
)
def test_quantize_type_says_what_becomes_int8(load: Any, kind: str, weights: bool, cache: bool, gptq: bool) -> None:
    quantize = load(GOOD, f"frontend.quantize.type={kind}").frontend.quantize
    assert (quantize.weights, quantize.cache, quantize.gptq) == (weights, cache, gptq)


def test_overrides_take_yaml_values_and_make_sections(load: Any) -> None:
    config = load(GOOD, "frontend.model_kwargs.tp=3", "frontend.shape.input_ids=[[64],[256]]", "dataset.path=a.json")
    assert config.frontend.model_kwargs.tp == 3
    assert config.frontend.shape.contexts == (256,)
    assert config.dataset.path == "a.json"


@pytest.mark.parametrize("name", ["smollm2-135m_w8kv8_tp3.yaml", "smollm2-135m_fp32_tp1.yaml"])
def test_example_is_valid_and_its_checkpoint_is_installed(name: str) -> None:
    config = load_config(EXAMPLES / name)
    assert (config.frontend.shape.prefills, config.frontend.shape.contexts) == ((64,), (256,))
    assert open_checkpoint(config.frontend.checkpoint).config["model_type"] == "llama"
    if config.dataset:
        assert (EXAMPLES.parent / config.dataset.path).is_file()


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("    tp: 4", "    tpp: 4", "c.yaml:8: unknown key frontend.model_kwargs.tpp", "did you mean `tp`?"),
        ("backend:", "bakend:", "c.yaml:10: unknown key bakend", "did you mean `backend`?"),
        ("tp: 4", "tp: 0", "c.yaml:8: frontend.model_kwargs.tp = 0", None),
        ("tp: 4", "tp: four", "c.yaml:8: frontend.model_kwargs.tp = 'four'", None),
        ("1024", "1000", "c.yaml:6: frontend.shape.input_ids[0][0]: 1000 is not", "the nearest is 992 or 1008"),
        ("1024", "8", "c.yaml:6: frontend.shape.input_ids[0][0]: 8 is not", "the nearest is 16"),
        (
            "2048",
            "512",
            "c.yaml:6: frontend.shape.input_ids: the decode context 512 is shorter than the prefill length 1024",
            "the nearest are a context of 1024 and a prefill length of 512",
        ),
        ("fp16\n", "fp17\n", "c.yaml:12: backend.dtype = 'fp17' is not a choice", "did you mean `fp16`?"),
        (
            "  checkpoint: /path/to/model\n",
            "",
            "c.yaml:2: frontend.checkpoint is missing",
            "add `checkpoint:` under frontend",
        ),
        ("  dtype: fp16", "  dtype fp16", "c.yaml:1", None),
        ("  type: tvm_vacc\n  dtype: fp16\n", "  3\n", "c.yaml:10: backend = 3 is not a section", None),
    ],
)
def test_mistake_is_named_with_file_line_key_and_choice(
    load: Any, old: str, new: str, message: str, hint: str | None
) -> None:
    with pytest.raises(UserError) as caught:
        load(GOOD.replace(old, new, 1))
    assert message in caught.value.message
    if hint:
        assert hint in (caught.value.hint or "")


def test_mistake_in_an_override_names_the_override(load: Any) -> None:
    with pytest.raises(UserError, match=r"-D frontend.model_kwargs.tp=0: frontend.model_kwargs.tp = 0"):
        load(GOOD, "frontend.model_kwargs.tp=0")


@pytest.mark.parametrize("override", ["tp", "=3", "a..b=3", "name.x=3", "name=[1"])
def test_malformed_override_is_refused(load: Any, override: str) -> None:
    with pytest.raises(UserError, match="-D "):
        load(GOOD, override)


def test_several_mistakes_report_the_first_and_count_the_rest(load: Any) -> None:
    with pytest.raises(UserError) as caught:
        load(GOOD.replace("fp16\n", "fp17\n").replace("tp: 4", "tpp: 4"))
    assert "c.yaml:8" in caught.value.message
    assert "1 more to correct after this" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden"])
def test_name_that_is_no_folder_name_is_refused(load: Any, name: str) -> None:
    with pytest.raises(UserError, match="name = "):
        load(GOOD.replace("name: model-fp16-tp4", f"name: '{name}'"))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "3"])
def test_file_that_is_no_mapping_is_refused(load: Any, text: str) -> None:
    with pytest.raises(UserError, match="top level is not a mapping"):
        load(text)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")


def test_keys_that_an_anchor_brings_in_have_the_line_of_their_section(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(GOOD.replace("  model_kwargs:\n", "  model_kwargs: &ranks\n") + "  compile:\n    <<: *ranks\n")
    with pytest.raises(UserError, match=r"model\.yaml:14: unknown key backend\.compile\.tp"):
        load_config(path)
    path.write_text(GOOD.replace("    tp: 4\n", "    <<: {tp: 3}\n"))
    assert load_config(path).frontend.model_kwargs.tp == 3


def test_the_place_of_artifacts_may_begin_at_home(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load(GOOD + "workspace:\n  path: ~/out\n").output == Path("/home/me/out/model-fp16-tp4")

"""Each rule of ``vacc-opt lint`` finds its mistake, says what to do, and has nothing against a good configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML
from safetensors.numpy import load_file, save_file

from vacc_opt.cli.main import main
from vacc_opt.ir.errors import UserError
from vacc_opt.runtime.lint import RULES, Finding, lint, reference_page

MODEL = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
    "input_layernorm": (32,),
    "post_attention_layernorm": (32,),
}
Lint = Callable[..., list[Finding]]


def write_model(root: Path, **changes: Any) -> Path:
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps({**MODEL, **changes}))
    tensors = {f"model.layers.{i}.{name}.weight": np.zeros(s, np.float16) for i in (0, 1) for name, s in SHAPES.items()}
    tensors |= {n: np.zeros((64, 32), np.float16) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file({**tensors, "model.norm.weight": np.zeros(32, np.float16)}, root / "model.safetensors")
    return root


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """Writes a good configuration of a good checkpoint, with entries of config.json and dotted keys changed."""

    def write(model: dict[str, Any] | None = None, *, file: str = "model.yaml", **changes: Any) -> Path:
        root = tmp_path / "tiny-llama"
        if not root.exists():
            write_model(root, **(model or {}))
        data: dict[str, Any] = {
            "name": "tiny-llama-fp16-tp2-16-32",
            "frontend": {
                "checkpoint": str(root),
                "type": "huggingface",
                "shape": {"input_ids": [[16], [32]]},
                "model_kwargs": {"tp": 2},
            },
            "backend": {"type": "tvm_vacc", "dtype": "fp16"},
        }
        for key, value in changes.items():
            section = data
            *above, last = key.split("__")
            for part in above:
                section = section.setdefault(part, {})
            section[last] = value
        with (tmp_path / file).open("w") as out:
            YAML(typ="safe").dump(data, out)
        return tmp_path / file

    return write


@pytest.fixture
def found(config: Callable[..., Path]) -> Lint:
    """Findings about a changed configuration."""
    return lambda *args, **kwargs: lint(config(*args, **kwargs))


def only(findings: list[Finding], rule: str, severity: str = "error") -> Finding:
    assert [(one.rule, one.severity) for one in findings] == [(rule, severity)], findings
    return findings[0]


def test_a_good_configuration_has_no_findings(found: Lint) -> None:
    assert found() == []


def test_misspelt_and_underscore_less_keys_are_each_named_with_the_right_one(found: Lint) -> None:
    first, second = found(frontend__model_kwargs__alignqkv=True, backend__mergeparams=True)
    assert {first.rule, second.rule} == {"schema"}
    texts = {one.message.partition(": ")[2]: one.fix for one in (first, second)}
    assert texts == {
        "unknown key frontend.model_kwargs.alignqkv": "did you mean `align_qkv`?",
        "unknown key backend.mergeparams": "did you mean `merge_params`?",
    }


def test_a_length_that_is_no_multiple_of_16_has_the_nearest(found: Lint) -> None:
    findings = found(name="m", frontend__shape__input_ids=[[20], [32]])
    assert only(findings, "schema").fix == "the nearest is 16 or 32"


def test_int8_without_a_quantize_section(found: Lint) -> None:
    one = only(found(name="m", backend__dtype="int8"), "int8-without-quantize")
    assert "backend.dtype = int8, and there is no frontend.quantize" in one.message
    assert "add `frontend.quantize.type`" in one.fix


@pytest.mark.parametrize("kind", ["w8a16_gptq", "w16kv8"])
def test_quantization_that_learns_without_text(found: Lint, kind: str) -> None:
    one = only(found(name="m", backend__dtype="int8", frontend__quantize={"type": kind}), "calibration-text")
    assert f"{kind} learns from text, and there is no dataset" in one.message
    assert ("kv_scales" in one.fix) == (kind == "w16kv8")


def test_rounding_to_nearest_and_given_scales_need_no_text(found: Lint) -> None:
    assert found(name="m", backend__dtype="int8", frontend__quantize={"type": "w8a16"}) == []
    given = {"type": "w16kv8", "kv_scales": "s.safetensors"}
    assert found(name="m", backend__dtype="int8", frontend__quantize=given) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-llama-fp16-tp4-16-32", "says tp4, frontend.model_kwargs.tp is 2"),
        ("tiny-llama-int8-tp2-16-32", "says int8, backend.dtype is fp16"),
        ("tiny-llama-fp16-tp2-16-64", "says lengths 16 and 64, input_ids are [[16], [32]]"),
    ],
)
def test_a_name_that_says_other_settings(found: Lint, name: str, message: str) -> None:
    assert message in only(found(name=name), "name-of-settings", "warning").message


def test_a_name_of_one_pair_among_several_lengths_is_right(found: Lint) -> None:
    findings = found(name="tiny-llama-fp16-tp2-16-64", frontend__shape__input_ids=[[16, 32], [32, 64]])
    assert [one for one in findings if one.rule == "name-of-settings"] == []


def test_a_file_that_was_copied_from_another_model(found: Lint, tmp_path: Path) -> None:
    root = write_model(tmp_path / "Qwen2-7B-Instruct")
    findings = found(file="hf_qwen1.5_int8.yaml", name="Qwen2-7B-Instruct", frontend__checkpoint=str(root))
    one = only(findings, "name-of-checkpoint", "warning")
    assert one.message.endswith("is of qwen 1.5, the checkpoint Qwen2-7B-Instruct of 2")


@pytest.mark.parametrize(
    ("folder", "file", "name"),
    [
        ("chatglm2-6b", "hf_chatglm2_fp16.yaml", "chatglm2-6b-fp16-tp2-16-32"),
        ("Llama-2-7b-chat-hf", "hf_llama2_fp16.yaml", "llama2-7b-chat"),
        ("glm-4-9b-chat-hf", "hf_chatglm4_int8-kv8.yaml", "chatglm4-9b-chat"),
        ("Qwen2.5-0.5B-Instruct", "qwen2.5_w8kv8.yaml", "qwen2.5-0.5b-instruct"),
    ],
)
def test_published_names_that_agree_are_fine(found: Lint, tmp_path: Path, folder: str, file: str, name: str) -> None:
    root = write_model(tmp_path / folder)
    assert found(file=file, name=name, frontend__checkpoint=str(root)) == []


def test_missing_shards_are_all_named(config: Callable[..., Path], tmp_path: Path) -> None:
    path, root = config(), tmp_path / "tiny-llama"
    names = sorted(load_file(root / "model.safetensors"))
    (root / "model.safetensors").unlink()
    index = {"weight_map": {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(names)}}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    one = only(lint(path), "missing-shards")
    assert "3 of 3 shards are missing: model-00001-of-00003.safetensors, model-00002" in one.message


def test_a_checkpoint_that_is_not_there(found: Lint) -> None:
    one = only(found(frontend__checkpoint="/no/such/model"), "checkpoint")
    assert "/no/such/model: no such file or directory" in one.message


def test_a_truncated_checkpoint(config: Callable[..., Path], tmp_path: Path) -> None:
    path, file = config(), tmp_path / "tiny-llama/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    one = only(lint(path), "checkpoint")
    assert "truncated" in one.message
    assert one.fix == "write or download the file again"


@pytest.mark.parametrize(("trusted", "severity"), [(False, "warning"), (True, "error")])
def test_auto_map_to_files_that_are_not_there(found: Lint, trusted: bool, severity: str) -> None:
    entries = {"AutoConfig": "config_vacc.C", "AutoModelForCausalLM": "some/model--modeling_vacc.M"}
    one = only(found({"auto_map": entries}, frontend__trust_remote_code=trusted), "auto-map", severity)
    assert "auto_map names config_vacc.py, modeling_vacc.py, not in the directory" in one.message
    assert ("remove auto_map" in one.fix) != trusted


@pytest.mark.parametrize(
    ("wrong", "right"), [("attn_implementation", "_attn_implementation"), ("insert_slcie", "insert_slice")]
)
def test_misspelt_keys_of_config_json(found: Lint, wrong: str, right: str) -> None:
    one = only(found({wrong: "eager"}), "config-json-keys", "warning")
    assert f"the key {wrong} is ignored" in one.message
    assert one.fix == f"did you mean `{right}`?"


def test_pretraining_tp(found: Lint) -> None:
    one = only(found({"pretraining_tp": 2}), "pretraining-tp", "warning")
    assert one.fix.startswith("set `pretraining_tp: 1`")


def test_another_number_of_layers_than_the_weights(found: Lint) -> None:
    one = only(found({"num_hidden_layers": 3}), "layers")
    assert "num_hidden_layers is 3, the weights have 2 layers" in one.message
    assert one.fix == "set `num_hidden_layers: 2`"


def test_kv_heads_that_do_not_match_the_weights(found: Lint) -> None:
    one = only(found({"num_key_value_heads": 4}), "kv-heads")
    assert "num_key_value_heads is 4, the key projections have 16 rows of 8 a head" in one.message
    assert one.fix == "set `num_key_value_heads: 2`"


def test_tensors_of_a_wrong_shape(found: Lint) -> None:
    one = only(found({"intermediate_size": 64}), "tensors")
    assert "6 tensors have a wrong shape: model.layers.0.mlp.gate_proj.weight is [48, 32]" in one.message
    assert "config.json makes it [64, 32]" in one.message


def test_tensors_that_are_missing(config: Callable[..., Path], tmp_path: Path) -> None:
    path, file = config(), tmp_path / "tiny-llama/model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "model.norm.weight"}, file)
    assert "1 tensors are missing: model.norm.weight" in only(lint(path), "tensors").message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": "x"}, "config.json does not fit a llama model: TypeError"),
        ({"intermediate_size": -1}, "config.json does not fit a llama model: RuntimeError"),
        ({"num_attention_heads": 0}, "config.json does not fit a llama model: ZeroDivisionError"),
        ({"model_type": ["llama"]}, "`model_type` is a name, and `architectures` a list of names"),
        ({"architectures": 3}, "`model_type` is a name, and `architectures` a list of names"),
    ],
)
def test_sizes_and_names_that_are_none(found: Lint, change: dict[str, Any], message: str) -> None:
    (one,) = found(change)
    assert message in one.message


def test_an_unknown_architecture(found: Lint) -> None:
    assert "unknown architecture: model_type `lama`" in only(found({"model_type": "lama"}), "tensors").message


def test_a_context_beyond_the_model(found: Lint) -> None:
    one = only(found(name="m", frontend__shape__input_ids=[[16], [256]]), "length")
    assert "reaches 256 tokens, the model 128 positions" in one.message
    assert one.fix == "at most 128"


def test_more_ranks_than_heads(found: Lint) -> None:
    findings = found(name="m", frontend__model_kwargs={"tp": 8, "align_qkv": True})
    assert only(findings, "ranks").fix == "the largest tp is 4"


def test_heads_that_do_not_divide_need_align_qkv(found: Lint) -> None:
    one = only(found(name="m", frontend__model_kwargs__tp=4), "align-qkv", "warning")
    assert "= 4, over which 2 KV heads do not divide" in one.message
    assert "align_qkv: true" in one.fix
    assert found(name="m", frontend__model_kwargs={"tp": 4, "align_qkv": True}) == []


def test_every_rule_is_tested_here_and_in_the_documentation() -> None:
    tests, page = Path(__file__).read_text(encoding="utf-8"), reference_page()
    for name, rule in RULES.items():
        assert f'"{name}"' in tests, name
        assert f"| `{name}` | {rule.about} |" in page
        assert rule.about.endswith(".")


def test_the_command_exits_with_1_for_errors_alone(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    good = config()
    assert main(["lint", str(good)]) == 0
    assert capsys.readouterr().out == f"{good}: 0 errors, 0 warnings\n"
    assert main(["lint", str(good), "-D", "frontend.model_kwargs.tp=4"]) == 0  # warnings
    assert "warning: -D frontend.model_kwargs.tp=4" in capsys.readouterr().out
    assert main(["lint", str(good), "-D", "backend.dtype=in8"]) == 1
    out = capsys.readouterr().out
    assert "error: -D backend.dtype=in8: backend.dtype = 'in8' is not a choice  [schema]\n  did you mean `int8`?" in out


def test_the_command_prints_json(config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "--json", str(config(frontend__model_kwargs__tpp=1))]) == 1
    (one,) = json.loads(capsys.readouterr().out)
    assert set(one) == {"rule", "severity", "message", "fix"}
    assert (one["rule"], one["fix"]) == ("schema", "did you mean `tp`?")


def test_a_file_that_is_no_configuration_exits_with_2(tmp_path: Path) -> None:
    assert main(["lint", str(tmp_path / "none.yaml")]) == 2
    with pytest.raises(UserError, match="no such configuration file"):
        lint(tmp_path / "none.yaml")


def test_an_index_that_is_not_read_names_no_missing_shards(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config()
    index = {"weight_map": {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "tiny-llama/pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert lint(path) == []


def test_kv_heads_that_the_model_does_not_read_are_a_warning(found: Lint, tmp_path: Path) -> None:
    own = {"num_attention_heads": 2, "num_key_value_heads": 4, "architectures": ["MobiLlamaForCausalLM"]}
    findings = found(own)
    only([one for one in findings if one.rule == "kv-heads"], "kv-heads", "warning")
    only([one for one in findings if one.rule == "tensors"], "tensors")  # which are looked at nevertheless


def test_integers_without_scales(config: Callable[..., Path], tmp_path: Path) -> None:
    path, file = config(), tmp_path / "tiny-llama/model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**load_file(file), name: np.zeros((48, 32), np.int8)}, file)
    one = only(lint(path), "tensors")
    assert f"{name} is int8, and no {name}_scale [48] says what it means" in one.message

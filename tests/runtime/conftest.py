"""A small random Llama with a byte-level tokenizer, exported once, and artifacts compiled from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from vacc_opt.frontends import export_checkpoint
from vacc_opt.runtime.artifact import Artifact, open_artifact
from vacc_opt.runtime.compile import compile_model
from vacc_opt.runtime.models import write_model
from vacc_opt.runtime.report import CompileReport
from vacc_opt.tests.listener import Silent

CONFIG = {
    "model_type": "llama",
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 258,
    "bos_token_id": 257,
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
PREFILL, CONTEXT = 16, 48
YAML = """\
name: {name}
frontend:
  checkpoint: {checkpoint}
  type: {type}
  shape:
    input_ids: [[{prefill}], [{context}]]
  model_kwargs:
    tp: {tp}
  quantize:
    type: w8kv8
dataset:
  path: {data}
  nsamples: 4
  seqlen: 32
backend:
  dtype: {dtype}
workspace:
  path: {out}
"""


def write_tokenizer(directory: Path) -> None:
    """256 bytes and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|none|>", "<|start|>", "<|end|>"]
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    backend.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<|start|>", "eos_token": {"content": "<|end|>"}, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text('{"eos_token_id": [258]}')


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a Hugging Face directory."""
    root = tmp_path_factory.mktemp("checkpoint")
    (root / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(root)
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> Any:
        return (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(272, 64) * 8, "model.norm.weight": np.ones(64, np.float32)}
    for layer in range(2):
        stem = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", 64, 64),
            ("self_attn.k_proj", 32, 64),
            ("self_attn.v_proj", 32, 64),
            ("self_attn.o_proj", 64, 64),
            ("mlp.gate_proj", 96, 64),
            ("mlp.up_proj", 96, 64),
            ("mlp.down_proj", 64, 96),
        ):
            tensors[f"{stem}{name}.weight"] = matrix(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}{name}.weight"] = (1 + 0.1 * rng.standard_normal(64)).astype(np.float32)
    save_file(tensors, root / "model.safetensors")
    return root


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as an .onnx file with its tokenizer beside it: compiling it needs no torch."""
    root = tmp_path_factory.mktemp("exported")
    write_model(export_checkpoint(checkpoint), root / "model.onnx")
    write_tokenizer(root)
    return root / "model.onnx"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text."""
    path = tmp_path_factory.mktemp("data") / "alpaca.json"
    records = [
        {"instruction": f"Say {word}.", "input": "", "output": word * 3} for word in ("one", "two", "six", "ten")
    ]
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="session")
def config(exported: Path, data: Path) -> Callable[..., Path]:
    """Writes a configuration into a directory; the artifact will be ``DIRECTORY/out/tiny``."""

    def write(directory: Path, **changes: Any) -> Path:
        values = {
            "name": "tiny",
            "checkpoint": exported,
            "type": "onnx",
            "tp": 2,
            "dtype": "int8",
            "prefill": PREFILL,
            "context": CONTEXT,
            "data": data,
            "out": directory / "out",
        }
        path = directory / "config.yaml"
        path.write_text(YAML.format(**{**values, **changes}))
        return path

    return write


@pytest.fixture(scope="session")
def compiled(config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[CompileReport, Silent]:
    """The report of compiling int8 weights and KV for two ranks."""
    listener = Silent()
    return compile_model(config(tmp_path_factory.mktemp("int8")), (), listener), listener


@pytest.fixture(scope="session")
def artifact(compiled: tuple[CompileReport, Silent]) -> Artifact:
    """Two ranks, int8 weights and KV."""
    return open_artifact(Path(compiled[0].path))


@pytest.fixture(scope="session")
def plain(config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """One rank, nothing quantized."""
    report = compile_model(config(tmp_path_factory.mktemp("fp32"), tp=1, dtype="fp32"), (), Silent())
    return open_artifact(Path(report.path))


@pytest.fixture(scope="session")
def lively(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose answers are not one token over and over: its lm_head is of its own."""
    root = tmp_path_factory.mktemp("lively") / "model"
    shutil.copytree(checkpoint, root)
    settings = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    tensors = load_file(root / "model.safetensors")
    rng = np.random.default_rng(5)
    tensors["lm_head.weight"] = rng.standard_normal((272, 64)).astype(np.float32)
    save_file(tensors, root / "model.safetensors")
    return root


@pytest.fixture(scope="session")
def two(lively: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Two ranks, int8 weights and KV, fp16 activations."""
    folder = tmp_path_factory.mktemp("two")
    values = {"name": "two", "checkpoint": lively, "type": "huggingface", "tp": 2, "dtype": "int8", "data": data}
    file = folder / "config.yaml"
    file.write_text(YAML.format(**values, prefill=PREFILL, context=CONTEXT, out=folder))
    return open_artifact(Path(compile_model(file, (), Silent()).path))

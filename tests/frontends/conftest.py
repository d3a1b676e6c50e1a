"""Small random models as checkpoints on disk, shared by the frontend tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


@dataclass(frozen=True)
class TinyModel:
    path: Path
    module: Any  # the torch module whose weights the checkpoint holds


def write_checkpoint(module: Any, path: Path) -> None:
    """config.json and model.safetensors as `save_pretrained` writes them, without its extras."""
    from safetensors.torch import save_file

    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(module.config.to_diff_dict()))
    save_file({n: p.detach().contiguous() for n, p in module.named_parameters()}, path / "model.safetensors")


def tiny_llama(path: Path, **changes: Any) -> TinyModel:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    module = LlamaForCausalLM(LlamaConfig(**{**TINY, "tie_word_embeddings": True, **changes})).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    write_checkpoint(module, path)
    return TinyModel(path, module)


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_llama(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="session")
def untied_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_llama(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False, num_hidden_layers=1)


@pytest.fixture(scope="session")
def save_model() -> Any:
    return write_checkpoint


@pytest.fixture(scope="session")
def tiny_model() -> Any:
    return tiny_llama

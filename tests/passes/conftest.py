"""A small random Llama (6 query heads over 2 KV heads), exported unmodified, shared by the tests of passes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vacc_opt.frontends import export_checkpoint
from vacc_opt.ir import Graph
from vacc_opt.ir.copy import copy

Array = npt.NDArray[Any]

CONFIG = {
    "vocab_size": 100,
    "hidden_size": 96,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class TinyLlama:
    """The torch module in float64, and its exported graph."""

    module: Any
    graph: Graph
    attention: str

    def fresh(self) -> Graph:
        return copy(self.graph)

    def logits(self, ids: Array) -> Array:
        """Reference logits [batch, seq, vocab] of whole rows without padding, computed in float64."""
        import torch

        with torch.no_grad():
            return self.module(input_ids=torch.from_numpy(ids)).logits.numpy()


def build(path: Path, attention: str) -> TinyLlama:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    module = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    (path / "config.json").write_text(json.dumps(module.config.to_diff_dict()))
    save_file({n: p.detach().contiguous() for n, p in module.named_parameters()}, path / "model.safetensors")
    return TinyLlama(module.double(), export_checkpoint(path, attention=attention, isolated=False), attention)


@pytest.fixture(scope="session", params=["eager", "sdpa"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return build(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def eager_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return build(tmp_path_factory.mktemp("eager-only"), "eager")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)

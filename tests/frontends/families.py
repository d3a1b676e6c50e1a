"""What every family of our own definitions has to hold, as checks on a tiny model with seeded weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from vacc_opt.frontends import export_checkpoint
from vacc_opt.frontends.models import find_own
from vacc_opt.ir import Graph
from vacc_opt.ir.evaluate import Executable
from vacc_opt.passes.infra.testing import assert_close

EXACT = 1e-12  # of the output's scale, for two ways of writing one sum in float64
SINGLE = 1e-5  # the same for float32
Config = Mapping[str, Any]


def build(config: Config, attention: str = "sdpa") -> Any:
    """The model of a config in float64, seeded: norms around 1, everything else around 0."""
    make = find_own(config)
    assert make is not None
    module: Any = make(config, attention).eval().double()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, dtype=torch.float32) * 0.2 + (1.0 if "norm" in name else 0.0)
            parameter.copy_(values)  # float32 values, so that a checkpoint of them loses nothing
    return module


def shapes(module: nn.Module) -> dict[str, list[int]]:
    """Shapes of parameters by name, without the second layer."""
    return {n: list(p.shape) for n, p in module.named_parameters() if ".layers.1." not in n}


def write(path: Path, config: Config, module: nn.Module) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    tensors = {n: p.detach().float().contiguous() for n, p in module.named_parameters()}
    save_file(tensors, path / "model.safetensors")
    return path


def call(module: Any, tokens: torch.Tensor, keep: torch.Tensor | None = None, cache: Any = None) -> Any:
    """The model on the last tokens of rows whose whole mask is given; positions count what is not padding."""
    positions = None if keep is None else (keep.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    with torch.no_grad():
        return module(tokens, attention_mask=keep, position_ids=positions, past_key_values=cache)


def same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = EXACT) -> None:
    assert actual.dtype is expected.dtype is torch.float64
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def some_tokens(config: Config, batch: int, seq: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seq)
    vocabulary = config.get("vocab_size") or config["padded_vocab_size"]
    return torch.randint(0, vocabulary, (batch, seq), generator=generator)


def check_both_kinds_of_attention(config: Config, past: int = 3) -> None:
    """Both ways agree in float64, with left padding and a cache; a query that sees nothing gives numbers."""
    eager, sdpa = build(config, "eager"), build(config, "sdpa")
    tokens = some_tokens(config, 2, 9)
    keep = torch.ones(2, 9, dtype=torch.int64)
    keep[0, :2] = 0
    first = [call(module, tokens[:, :past], keep[:, :past]) for module in (eager, sdpa)]
    then = [
        call(module, tokens[:, past:], keep, result.past_key_values)
        for module, result in zip((eager, sdpa), first, strict=True)
    ]
    assert all(torch.isfinite(result.logits).all() for result in (*first, *then))
    same(first[0].logits[keep[:, :past] == 1], first[1].logits[keep[:, :past] == 1])
    same(then[0].logits, then[1].logits)


def check_prefill_and_decode(config: Config) -> None:
    """A prompt in pieces, one token at the end, gives what one call gives."""
    module, tokens = build(config), some_tokens(config, 2, 8)
    whole = call(module, tokens)
    cache, logits = None, []
    for start, end in ((0, 5), (5, 7), (7, 8)):
        result = call(module, tokens[:, start:end], torch.ones(2, end, dtype=torch.int64), cache)
        cache = result.past_key_values
        logits.append(result.logits)
    same(torch.cat(logits, dim=1), whole.logits)
    for part, expected in zip(cache.layers, whole.past_key_values.layers, strict=True):
        same(part.keys, expected.keys)
        same(part.values, expected.values)
        assert part.keys.shape[1::2] == (module.config.num_key_value_heads, module.config.head_dim)


def check_padding(config: Config) -> None:
    """Padding on the left or on the right changes nothing for the tokens."""
    module, tokens = build(config), some_tokens(config, 2, 6)
    plain = call(module, tokens).logits
    pads, keep = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64)
    left = call(module, torch.cat((pads, tokens), 1), torch.cat((pads, keep), 1)).logits
    same(left[:, 3:], plain)
    right = call(module, torch.cat((tokens, pads), 1), torch.cat((keep, pads), 1)).logits
    same(right[:, :6], plain)


def feeds(config: Any, vocabulary: int, seq: int, past: int, pads: int, offset: int = 0) -> dict[str, np.ndarray]:
    """Inputs of an exported graph: two rows, the first with ``pads`` pads on the left."""
    rng = np.random.default_rng(seq)
    keep = np.ones((2, past + seq), np.int64)
    keep[0, :pads] = 0
    made = {
        "input_ids": rng.integers(0, vocabulary, (2, seq)),
        "attention_mask": keep,
        "position_ids": np.clip(np.cumsum(keep, 1) - 1, 0, None)[:, past:] + offset,
    }
    shape = (2, config.num_key_value_heads, past, config.head_dim)
    for name in (f"past_key_values.{i}.{w}" for i in range(config.num_hidden_layers) for w in ("key", "value")):
        made[name] = rng.standard_normal(shape).astype(np.float32)
    return made


def reference(module: Any, given: Mapping[str, np.ndarray]) -> np.ndarray:
    """Logits of the module in float64 on the inputs of an exported graph."""
    cache = DynamicCache()
    for i in range(module.config.num_hidden_layers):
        cache.update(*(torch.from_numpy(given[f"past_key_values.{i}.{w}"]).double() for w in ("key", "value")), i)
    ids, mask, positions = (torch.from_numpy(given[n]) for n in ("input_ids", "attention_mask", "position_ids"))
    with torch.no_grad():
        logits: np.ndarray = module(ids, mask, positions, cache).logits.numpy()
    return logits


def check_graph(graph: Graph, module: Any, vocabulary: int, offset: int = 0) -> None:
    """The graph computes what the module computes: prefill, left-padded prefill, chunk after a cache, one token."""
    for seq, past, pads in ((5, 0, 0), (5, 0, 2), (3, 4, 2), (1, 6, 0)):
        given = feeds(module.config, vocabulary, seq, past, pads, offset)
        seen = given["attention_mask"][:, past:] == 1
        actual, expected = Executable(graph).run(given)[0]["logits"], reference(module, given)
        assert np.isfinite(actual).all()
        assert_close(actual[seen], expected[seen], SINGLE, f"{seq}, {past}, {pads}")


def exported(path: Path, config: Config, attention: str) -> tuple[Graph, Any]:
    """The graph of a checkpoint of the seeded model, checked against it, and the model."""
    module = build(config, attention)
    graph = export_checkpoint(write(path, config, module), attention=attention, isolated=False)
    check_graph(graph, module, config.get("vocab_size") or config["padded_vocab_size"])
    return graph, module


def llama(config: Config, weights: Mapping[str, torch.Tensor], **changes: Any) -> Any:
    """The Llama of transformers with these weights, in float64; its norms and rotary are float32 otherwise."""
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
        "max_position_embeddings",
    )
    entries = {k: config[k] for k in keys if k in config} | {"tie_word_embeddings": False, "pad_token_id": 0} | changes
    return exact(LlamaForCausalLM(LlamaConfig(**entries, attn_implementation="sdpa")), weights)


def exact(model: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """A model of transformers with these weights, in float64 throughout, but for a rotary that scales with length."""
    module = model.eval().double()
    module.load_state_dict(dict(weights), strict=True)
    for part in module.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = MethodType(_rms_norm, part)
    if getattr(module.config, "rope_scaling", None) is None:
        module.model.rotary_emb.forward = MethodType(_rotary, module.model.rotary_emb)
    return module


def _rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def _rotary(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.einsum("bs,d->bsd", position_ids.to(x.dtype), self.inv_freq.to(x.dtype)).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def check_equals(config: Config, other: Any, tolerance: float = EXACT) -> None:
    """The model equals ``other``, left-padded prefill and a decode step after it."""
    module, tokens = build(config), some_tokens(config, 2, 7)
    keep = torch.ones(2, 7, dtype=torch.int64)
    keep[1, :2] = 0
    caches: list[Any] = [DynamicCache(), DynamicCache()]
    for part, mask in ((tokens[:, :6], keep[:, :6]), (tokens[:, 6:], keep)):
        results = [call(m, part, mask, c) for m, c in zip((module, other), caches, strict=True)]
        seen = mask[:, -part.shape[1] :] == 1
        same(results[0].logits[seen], results[1].logits[seen], tolerance)
        caches = [result.past_key_values for result in results]

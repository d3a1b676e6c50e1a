"""A small random model of every structure: the unmodified torch module in float64, and its exported graph."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.frontends import export_checkpoint
from vacc_opt.frontends.families import Structure
from vacc_opt.ir import Graph
from vacc_opt.ir.copy import copy
from vacc_opt.ir.evaluate import Executable

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
CONTEXT = 48


@dataclass(frozen=True)
class Case:
    """A structure exported in one form of its attention code."""

    structure: Structure
    attention: str
    module: Any  # float32, with the weights of the graph
    graph: Graph

    def fresh(self) -> Graph:
        return copy(self.graph)


def build(structure: Structure, attention: str, path: Path) -> Case:
    """Write a checkpoint of random weights and export it."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = dict(structure.config)
    # eager code in float64 gives 0 / 0 where a pad sees nothing: its lowest number plus a score overflows
    module = real_module(config, "sdpa")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            norm = "norm" in name or name.endswith(("ln_f.weight", "layernorm.weight"))
            scale = norm and name.endswith("weight") and structure.norm != "RMSNorm, 1 + w"
            parameter.normal_(1.0 if scale else 0.0, 0.25)
    tensors = {n: p.detach().contiguous() for n, p in module.named_parameters()}
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return Case(structure, attention, module, export_checkpoint(path, attention=attention, isolated=False))


def real_module(config: dict[str, Any], attention: str) -> Any:
    """The module of a config with memory behind its parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    from vacc_opt.frontends.models import find_own

    own = find_own(config)
    if own is not None:
        return own(config, attention).eval()
    parsed = AutoConfig.for_model(**config)
    with no_init_weights():
        module = AutoModelForCausalLM.from_config(parsed, attn_implementation=attention, dtype=torch.float32)
    module.tie_weights()
    return module.eval()


def torch_logits(module: Any, ids: Array, keep: Array | None = None, dtype: str = "float64") -> Array:
    """Logits [batch, seq, vocab] of one call without a past; ``keep`` is the padding mask [batch, seq]."""
    import torch

    keep = np.ones_like(ids) if keep is None else keep
    positions = np.clip(np.cumsum(keep, axis=1) - 1, 0, None)
    with torch.no_grad():
        found = deepcopy(module).to(getattr(torch, dtype))(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(keep),
            position_ids=torch.from_numpy(positions),
            use_cache=False,
        )
    return np.asarray(found.logits.double().numpy())


def growing_feeds(graph: Graph, ids: Array, keep: Array, cache: Feeds | None = None) -> Feeds:
    """Inputs of the exported interface for the last tokens of ``keep`` [batch, past + seq]."""
    batch, seq = ids.shape
    positions = np.clip(np.cumsum(keep, axis=1) - 1, 0, None)[:, keep.shape[1] - seq :]
    feeds: Feeds = {"input_ids": ids, "attention_mask": keep, "position_ids": positions}
    for value in graph.inputs:
        if value.name.startswith("past_key_values"):
            shape = [batch if i == 0 else 0 if i == 2 else int(d) for i, d in enumerate(value.shape or ())]
            given = (cache or {}).get(value.name.replace("past_key_values", "present"))
            feeds[value.name] = np.zeros(shape, value.type.dtype.numpy) if given is None else given
    return feeds


def run_growing(executable: Executable, ids: Array, keep: Array, chunks: list[int]) -> Array:
    """Logits [batch, total, vocab] of the exported interface, called with so many tokens at a time."""
    rows, cache, at = [], None, 0
    for count in chunks:
        seen = keep[:, : at + count]
        found = executable.run(growing_feeds(executable.graph, ids[:, at : at + count], seen, cache))[0]
        rows.append(found["logits"])
        cache, at = found, at + count
    return np.concatenate(rows, axis=1)


def run_buffers(executable: Executable, ids: Array, valid: Array, steps: Array) -> Iterator[Array]:
    """Logits [batch, vocab] after a right-padded prefill of ``ids`` and after each column of ``steps``."""
    graph, batch = executable.graph, len(ids)
    buffers: Feeds = {}
    for value in graph.inputs:
        if value.name.startswith("past_key_values"):
            shape = [batch if i == 0 else int(d) for i, d in enumerate(value.shape or ())]
            # what lies in slots that nobody wrote must not matter
            buffers[value.name] = np.full(shape, 7, value.type.dtype.numpy)
    caches = [dict(buffers) for _ in range(graph.ranks)]
    pos = np.zeros(batch, np.int64)
    calls = [(ids, valid), *((steps[:, i : i + 1], np.ones(batch, np.int64)) for i in range(steps.shape[1]))]
    for tokens, count in calls:
        feeds = {"input_ids": tokens, "pos": pos, "valid": count}
        found = executable.run({k: v for k, v in feeds.items() if graph.input_named(k)}, caches)
        for rank, outputs in zip(caches, found, strict=True):
            rank.update({n.replace("present", "past_key_values"): v for n, v in outputs.items() if n != "logits"})
        yield found[0]["logits"][:, 0]
        pos = pos + count


def recognize_text(structure: Structure) -> str:
    """The recognizers, each held to the counts of the structure."""
    found = structure.fused

    def expect(name: str) -> str:
        return f"expect={found.get(name, 0)}"

    rms = expect("norm") if structure.norm.startswith("RMS") else "expect=0"
    return (
        f"simplify,fuse-rms-norm{{{rms}}},fuse-head-norms,fold-norm-head,fuse-rotary{{positions={CONTEXT},{expect('rotary')}}},"
        f"split-packed-linear{{{expect('packed')}}},fuse-gqa{{{expect('attention')}}},fuse-swiglu{{{expect('gate')}}}"
    )

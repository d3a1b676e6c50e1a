"""A ChatGLM2-shaped decoder as torch.onnx.export writes it: 28 layers of the published structure, small hidden size."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from vacc_opt.frontends import load_onnx
from vacc_opt.frontends.models import ChatGLM, ChatGLMConfig
from vacc_opt.frontends.torch_export import interface_names
from vacc_opt.ir import Graph

LAYERS = 28
OPSET = 20  # the newest that the exporter of TorchScript graphs writes
_BATCH, _SEQ, _PAST = 2, 4, 6  # example sizes, symbolic in the result


def config(layers: int = LAYERS, core: str = "sdpa") -> ChatGLMConfig:
    """32 query heads over 2 KV groups, half of each head's 16 channels rotated; everything else small."""
    return ChatGLMConfig(
        num_layers=layers,
        padded_vocab_size=256,
        hidden_size=64,
        ffn_hidden_size=160,
        kv_channels=16,
        seq_length=8192,
        core=core,
    )


def module(layers: int = LAYERS, core: str = "sdpa") -> ChatGLM:
    """The model with seeded weights."""
    torch.manual_seed(0)
    model = ChatGLM(config(layers, core)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return model


class _Flat(nn.Module):
    """The cache as 2 * layers tensors: TorchScript graphs have neither objects nor lists at their interface."""

    def __init__(self, model: ChatGLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, *past: torch.Tensor) -> Any:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        result = self.model(ids, mask, positions, cache)
        return result.logits, *(t for layer in result.past_key_values.layers for t in (layer.keys, layer.values))


def export_raw(model: ChatGLM, path: Path, fixed: int | None = None) -> Path:
    """Write the prefill graph as the exporter makes it: nothing is simplified, folded or renamed.

    The TorchScript exporter (``dynamo=False``) at opset 20, with its defaults; interface as in
    :mod:`vacc_opt.frontends.torch_export`. With ``fixed``, one row of so many tokens and no past, as a model must be
    exported whose code does not admit symbolic sizes.
    """
    groups, width = model.config.multi_query_group_num, model.config.kv_channels
    inputs, outputs = interface_names(model.config.num_layers)
    batch, seq, before = (1, fixed, 0) if fixed else (_BATCH, _SEQ, _PAST)
    cached = [] if fixed else inputs[3:]
    tokens = torch.zeros(batch, seq, dtype=torch.int64)
    mask = torch.ones(batch, before + seq, dtype=torch.int64)
    past = [torch.zeros(batch, groups, before, width) for _ in cached]
    axes = {name: {0: "batch", 1: "seq"} for name in ("input_ids", "position_ids", "logits")}
    axes["attention_mask"] = {0: "batch", 1: "past + seq"}
    axes |= {name: {0: "batch", 2: "past"} for name in cached}
    axes |= {name: {0: "batch", 2: "past + seq"} for name in outputs[1:]}
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Flat(model),
            (tokens, mask, torch.arange(seq).expand(batch, seq) + before, *past),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=inputs[:3] + cached,
            output_names=outputs,
            dynamic_axes={} if fixed else axes,
        )
    logging.disable(logging.NOTSET)
    return path


def graph(path: Path) -> Graph:
    """The raw graph in our form, weights as references into the file."""
    return load_onnx(path)

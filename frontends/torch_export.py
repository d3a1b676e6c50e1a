"""Export a causal language model with fake parameters to an ONNX skeleton: one graph for both phases, no weights.

Interface: ``input_ids [batch, seq]``, ``attention_mask [batch, past + seq]``, ``position_ids [batch, seq]`` (int64),
``past_key_values.{i}.key|value [batch, Hkv, past, D]``; outputs ``logits [batch, seq, V]`` and
``present.{i}.key|value [batch, Hkv, past + seq, D]``. The weights follow as graph inputs under their parameter names.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import onnx
import onnx_ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vacc_opt.frontends.beside import Beside
from vacc_opt.frontends.caches import AsIfPadded, CacheForm, find_cache
from vacc_opt.frontends.exporter_ways import shorter_export
from vacc_opt.frontends.origins import OriginReader
from vacc_opt.frontends.repeat_layers import KEPT, Layers
from vacc_opt.frontends.rope_lengths import trace_lengths
from vacc_opt.frontends.same_layers import find_same_layers, first_layers, layer_lists
from vacc_opt.frontends.sequences import resolve_sequences
from vacc_opt.ir.provenance import Origin

OPSET_WITHOUT_ATTENTION = 20  # where the exporter writes attention out
OPSET = 23  # at 24 the exporter loses its rotary and RMSNormalization operators
_TOTAL = "past_plus_seq"  # an identifier for torch; the graph says "past + seq"
_STACKED = "stacked_past"
_WRAPPED = "model."
_BATCH, _SEQ, _PAST = 2, 4, 6  # example sizes; every one is symbolic in the result


@dataclass(frozen=True)
class Skeleton:
    """An ONNX model whose weights are graph inputs, and where each value comes from.

    With ``layers`` it has two of them; the others are to be copies of the second one.
    """

    model: onnx.ModelProto
    origins: dict[str, Origin]
    layers: Layers | None = None


class _WithCache(nn.Module):  # type: ignore[misc,unused-ignore]
    """The model with its cache as inputs and outputs; ``past`` is [2 * layers, batch, Hkv, past, D].

    One stacked input has one size called past. Sixty inputs have sixty, and torch spends a minute proving them equal.
    """

    def __init__(self, model: nn.Module, cache: CacheForm) -> None:
        super().__init__()
        self.model = model
        self.cache = cache

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        with AsIfPadded(attention_mask):
            result = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=self.cache.given(past),
                use_cache=True,
            )
        return (result.logits, *self.cache.taken(result.past_key_values))


def interface_names(layers: int) -> tuple[list[str], list[str]]:
    """Names of the inputs and of the outputs of a model with that many layers."""
    cached = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in cached)]
    return inputs, ["logits", *(f"present.{name}" for name in cached)]


def export_module(
    module: nn.Module, mode: FakeTensorMode, opset: int = OPSET, *, every_layer: bool = False, beside: bool = False
) -> Skeleton:
    """Export a causal language model that is called as those of transformers are; its cache is found by a run.

    Layers that run the same operations as the second one are left out, unless ``every_layer`` is wanted. With
    ``beside`` a fork of this process looks whether they do, while two of them are traced as if they did.
    """
    trace_lengths(module)
    found = None if every_layer else _export_two_layers(module, mode, opset, beside)
    return found or _finished(*_trace(module, mode, find_cache(module, mode), opset))


def _export_two_layers(module: nn.Module, mode: FakeTensorMode, opset: int, beside: bool) -> Skeleton | None:
    """The skeleton of the first layers; None if another one can be told from the second."""
    supposed = _suppose_same(module, mode)
    if supposed is None:
        return None
    layers, cache = supposed

    def export() -> Skeleton:
        with first_layers(module, layers):
            return replace(_finished(*_trace(module, mode, cache, opset)), layers=layers)

    question = partial(_are_same, module, mode, layers, cache)
    if not beside:
        return export() if question() else None
    with Beside(question) as same:
        try:
            skeleton = export()
        except Exception:
            if same():
                raise
            return None  # another layer may be what is wrong with it
        return skeleton if same() else None


def _suppose_same(module: nn.Module, mode: FakeTensorMode) -> tuple[Layers, CacheForm] | None:
    """What holds if layers are the same: which those are, and the cache of two of them."""
    found = layer_lists(module)
    if len(found) == 1:
        with contextlib.suppress(Exception), first_layers(module, found[0]):  # the whole model says what is wrong
            cache = find_cache(module, mode)
            if cache.layers == KEPT:
                return found[0], cache
    cache = find_cache(module, mode)
    found = [layers for layers in found if layers.count == cache.layers]
    return (found[0], replace(cache, layers=KEPT)) if len(found) == 1 else None


def _are_same(module: nn.Module, mode: FakeTensorMode, layers: Layers, cache: CacheForm) -> bool:
    """Whether two layers with ``cache`` stand for all of them."""
    whole = find_cache(module, mode)
    return whole == replace(cache, layers=layers.count) and find_same_layers(module, mode, whole) == layers


def _trace(
    module: nn.Module, mode: FakeTensorMode, cache: CacheForm, opset: int
) -> tuple[onnx_ir.Model, dict[str, Origin]]:
    """The graph as the exporter makes it, with weights and cache as inputs, and the origin of every node output."""
    with mode:
        token_ids = torch.zeros(_BATCH, _SEQ, dtype=torch.int64)
        mask = torch.ones(_BATCH, _PAST + _SEQ, dtype=torch.int64)
        past = torch.zeros(2 * cache.layers, _BATCH, cache.kv_heads, _PAST, cache.head_dim)
    inputs, outputs = interface_names(cache.layers)
    tokens = {0: "batch", 1: "seq"}
    dims = (tokens, {0: "batch", 1: _TOTAL}, tokens, {1: "batch", 3: "past"})
    arguments = (token_ids, mask, token_ids.clone(), past)
    named = {"input_names": [*inputs[:3], _STACKED], "output_names": outputs, "dynamic_shapes": dims}
    try:
        program = _export(_WithCache(module, cache), arguments, opset, **named)
    except torch.onnx.OnnxExporterError:  # its Attention-23 does not broadcast one KV head, as torch does for Falcon
        program = _export(_WithCache(module, cache), arguments, OPSET_WITHOUT_ATTENTION, **named)
    origins = OriginReader(module, _WRAPPED).read(program.model.graph)
    _unstack_cache(program.model.graph, inputs[3:])
    _weights_to_inputs(program.model.graph, _canonical_names(module))
    _resolve_cast_like(program.model.graph)
    return program.model, origins


def _finished(traced: onnx_ir.Model, origins: dict[str, Origin]) -> Skeleton:
    model = onnx_ir.to_proto(traced)
    resolve_sequences(model)
    _strip(model)
    return Skeleton(model, origins)


def _export(module: nn.Module, arguments: tuple[torch.Tensor, ...], opset: int, **named: Any) -> torch.onnx.ONNXProgram:
    # an entry of symbolic sizes costs more to keep and to read than the operator's rule
    uncached = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    with _quiet(), shorter_export(), uncached:
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            external_data=False,
            **named,
        )
    assert program is not None
    return program


def _unstack_cache(graph: onnx_ir.Graph, names: list[str]) -> None:
    """Turn ``Gather(stacked, i)`` into the graph input ``names[i]``, and sizes of the stack into sizes of the first."""
    stacked = next(value for value in graph.inputs if value.name == _STACKED)
    assert stacked.shape is not None
    kind, shape = onnx_ir.TensorType(onnx_ir.DataType.FLOAT), stacked.shape[1:]
    layers = [onnx_ir.Value(name=name, type=kind, shape=onnx_ir.Shape(shape)) for name in names]
    for node, _ in list(stacked.uses()):
        if node.op_type == "Gather" and node.inputs[1] is not None:
            index = onnx_ir.convenience.get_const_tensor(node.inputs[1])
            if index is None:
                raise RuntimeError(f"{node.name} takes an unknown layer of the cache")
            node.outputs[0].replace_all_uses_with(layers[int(index.numpy())])
            graph.remove(node, safe=True)
        elif node.op_type == "Shape" and node.attributes["start"].as_int() > 0:
            node.replace_input_with(0, layers[0])
            for bound in ("start", "end"):
                node.attributes[bound] = onnx_ir.AttrInt64(bound, node.attributes[bound].as_int() - 1)
        else:
            raise RuntimeError(f"{node.name} ({node.op_type}) reads the whole cache at once")
    graph.inputs.remove(stacked)
    graph.inputs.extend(layers)


def _canonical_names(module: nn.Module) -> dict[str, str]:
    """Every parameter name to the first name of the same parameter, so that tied weights are one constant."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in module.named_parameters(remove_duplicate=False)}


def _weights_to_inputs(graph: onnx_ir.Graph, canonical: dict[str, str]) -> None:
    """Parameters become graph inputs under their own names, buffers keep their values."""
    seen: dict[str, onnx_ir.Value] = {}
    for key, value in list(graph.initializers.items()):
        raw = getattr(value.const_value, "raw", None)
        name = canonical.get(key.removeprefix(_WRAPPED))
        if isinstance(raw, FakeTensor) and name is None:
            raise RuntimeError(f"the exporter made a weight called {key} that the module does not have")
        if name is None:
            if isinstance(raw, torch.Tensor):
                value.const_value = onnx_ir.tensor(raw.detach().cpu().numpy(), name=key)
            continue
        del graph.initializers[key]
        if name in seen:
            value.replace_all_uses_with(seen[name])
            continue
        value.const_value = None
        value.name = name
        seen[name] = value
        graph.inputs.append(value)


def _resolve_cast_like(graph: onnx_ir.Graph) -> None:
    """CastLike(x, y) is Cast(x) to y's type, which then folds where x is constant."""
    for node in list(graph):
        if node.op_type == "CastLike" and node.inputs[1] is not None and node.inputs[1].dtype is not None:
            cast = onnx_ir.Node(
                "",
                "Cast",
                [node.inputs[0]],
                [onnx_ir.AttrInt64("to", int(node.inputs[1].dtype))],
                outputs=list(_detached_outputs(node)),
                name=node.name,
            )
            graph.insert_before(node, cast)
            _take_over(graph, node, cast)


def _detached_outputs(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    for output in node.outputs:
        yield onnx_ir.Value(name=output.name, type=onnx_ir.TensorType(node.inputs[1].dtype), shape=output.shape)


def _take_over(graph: onnx_ir.Graph, old: onnx_ir.Node, new: onnx_ir.Node) -> None:
    for before, after in zip(old.outputs, new.outputs, strict=True):
        before.replace_all_uses_with(after)
    graph.remove(old, safe=True)


def _strip(model: onnx.ModelProto) -> None:
    """Drop metadata that would carry machine paths, and write the size of the mask as ``past + seq``."""
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    del graph.metadata_props[:]
    graph.doc_string = ""
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for info in (*graph.input, *graph.output, *graph.value_info):
        del info.metadata_props[:]
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = dim.dim_param.replace(_TOTAL, "past + seq")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that torch logs or warns about during an export concerns our user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)

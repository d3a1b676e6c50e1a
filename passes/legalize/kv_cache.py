"""Growing past/present tensors and an attention mask  ->  fixed KV buffers written in place at a position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vacc_opt.ir import DType, Graph, Node, TensorType, Value
from vacc_opt.ir.errors import CheckError, UserError, did_you_mean
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.types import Dim, SymbolicDim
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option, where
from vacc_opt.passes.infra.check.adapters import Adapter, FixedBuffers, continued
from vacc_opt.passes.infra.model.attention import attentions
from vacc_opt.passes.infra.model.masks import Meaning, recognize_mask
from vacc_opt.passes.infra.registry import register
from vacc_opt.passes.infra.scopes import CAPACITY

POS, VALID, MASK = "pos", "valid", "mask"
OTHER_MASKS = ("refuse", "input")


@dataclass(frozen=True)
class _Layer:
    """One attention with the two Concats that append to its past, and what its mask means."""

    attention: Node
    key: Node
    value: Node
    mask: Meaning


@register
@dataclass(frozen=True)
class KvCache(Pass):
    """Turn past/present into fixed buffers [batch, kv_heads, context, head_dim] with an in-place write at ``pos``.

    The interface becomes input_ids [batch, seq], pos [batch] (tokens already cached), valid [batch] and the buffers;
    position ids are pos + arange(seq), attention is causal over the first pos + seq slots (bottom-right aligned), and
    slots past the valid ones hold what no query may see. A sliding window and ALiBi's slopes become part of the
    attention; a mask that is anything else is refused, or with ``other_masks=input`` becomes an input over all slots.

    Before:
        g (int64[B,S] input_ids, int64[B,T] attention_mask, float[B,1,S,2] q, float[B,1,S,2] k, float[B,1,S,2] v,
           float[B,1,past,2] "past.0.key", float[B,1,past,2] "past.0.value")
        => (y, "present.0.key", "present.0.value") {
            "present.0.key" = Concat <axis = 2> ("past.0.key", k)
            "present.0.value" = Concat <axis = 2> ("past.0.value", v)
            zero = Constant <value_int = 0> ()
            unit = Constant <value_int = 1> ()
            past_size = Shape <start = 2, end = 3> ("past.0.key")
            all_size = Shape <start = 1> (attention_mask)
            first = Squeeze (past_size)
            all = Squeeze (all_size)
            column = Range (zero, all, unit)
            place = Range (first, all, unit)
            row = Unsqueeze (place, unit)
            causal = LessOrEqual (column, row)
            axes = Constant <value_ints = [1, 2]> ()
            kept = Cast <to = 9> (attention_mask)
            given = Unsqueeze (kept, axes)
            mask = And (causal, given)
            y = Attention (q, "present.0.key", "present.0.value", mask)
        }
        # dim T = past + S
    After kv-cache{context=16}:
        g (int64[B,S] input_ids, float[B,1,S,2] q, float[B,1,S,2] k, float[B,1,S,2] v,
           float[B,1,16,2] "past.0.key", float[B,1,16,2] "past.0.value", int64[B] pos, int64[B] valid)
        => (y, "present.0.key", "present.0.value") {
            "present.0.key" = TensorScatter <axis = 2, mode = "linear"> ("past.0.key", k, pos)
            "present.0.value" = TensorScatter <axis = 2, mode = "linear"> ("past.0.value", v, pos)
            length = Shape <start = 1, end = 2> (input_ids)
            seen = Add (pos, length)
            y = Attention <is_causal = 1> (q, "present.0.key", "present.0.value", , , , seen)
        }
    """

    name: ClassVar[str] = "kv-cache"
    kind: ClassVar[Kind] = Kind.INTERFACE
    runs_after: ClassVar[tuple[str, ...]] = ("fuse-gqa",)

    context: int = option(2048, "capacity of the buffers, in tokens")
    several: bool = option(False, "leave the capacity open up to `context`: each phase says its own")
    other_masks: str = option(
        "refuse", "what to do with a mask of another meaning: refuse, or input (the caller masks)"
    )

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Rewrite all layers or none.

        Raises:
            CheckError: an attention without past, or a mask of another meaning, named.
        """
        if self.context < 1:
            raise UserError(f"context is {self.context}, it is at least 1 token")
        if self.other_masks not in OTHER_MASKS:
            raise UserError(f"other_masks is {self.other_masks!r}", did_you_mean(self.other_masks, OTHER_MASKS))
        for node in graph.by_op("RotaryEmbedding"):
            rows = node.inputs[1].shape[0] if node.inputs[1] is not None and node.inputs[1].shape else None
            if node.input(3) is not None and isinstance(rows, int) and rows < self.context:
                raise CheckError(
                    f"the rotary table has {rows} rows, the context is {self.context}",
                    f"fuse-rotary{{positions={self.context}}} makes it long enough",
                )
        layers = self._layers(graph)
        with rw.applying([layers[0].attention]):
            self._rewrite(graph, rw, layers)
        remarks = [Remark("passed", self.name, _sees(n), where(n)) for n in attentions(graph)]
        size = f"up to {self.context}" if self.several else str(self.context)
        return Outcome(f"{len(layers)} of {len(layers)} layers on KV buffers of {size} tokens", remarks)

    @property
    def _capacity(self) -> Dim:
        return SymbolicDim.parse(CAPACITY) if self.several else self.context

    def _layers(self, graph: Graph) -> list[_Layer]:
        known: dict[Value | None, Meaning] = {None: Meaning()}
        layers: list[_Layer] = []
        for node in attentions(graph):
            mask, causal = node.input(3), bool(node.attributes.get("is_causal"))
            if mask is None and not causal:
                raise CheckError(f"{where(node)} has no mask: it is bidirectional")
            if mask is None and not _is_first_call(node):
                message = f"{where(node)} is causal without a mask: from the first key on, not from the end of the past"
                raise CheckError(message, "export it with an attention mask")
            if mask is not None and causal:
                raise CheckError(f"{where(node)} has a mask and is_causal, which is not supported")
            if mask not in known:
                assert mask is not None
                known[mask] = recognize_mask(graph, mask, self.context)
            if known[mask].why and self.other_masks == "refuse":
                message = f"the mask of {where(node)} is not causal with padding: {known[mask].why}"
                raise CheckError(message, "kv-cache{other_masks=input} keeps it as an input over all slots")
            layers.append(_layer(graph, node, known[mask]))
        if not layers:
            raise CheckError("the graph has no Attention node", "run fuse-gqa before kv-cache")
        return layers

    def adapter(self, before: Graph) -> Adapter:
        """Past tokens move to the front of the buffers, new ones are found behind them."""
        return FixedBuffers(continued(before))

    def _rewrite(self, graph: Graph, rw: Rewriter, layers: list[_Layer]) -> None:
        rw.raise_opset(24)
        ids = graph.input_named("input_ids")
        if ids is None or ids.shape is None:
            raise CheckError("the graph has no input 'input_ids'")
        batch = TensorType(DType.INT64, ids.shape[:1])
        pos = rw.add_input(POS, batch)
        if graph.input_named(VALID) is None:
            rw.add_input(VALID, batch)
        with rw.on_behalf_of(*(_masks(layers) or [layers[0].attention])):  # `end` takes the place of the masks
            length = rw.op.Shape(ids, start=1, end=2)
            end = rw.op.Add(pos, length)
        buffers = [v for layer in layers for v in (layer.key.inputs[0], layer.value.inputs[0]) if v is not None]
        for layer in layers:
            keys, values = self._append(rw, layer.key, pos), self._append(rw, layer.value, pos)
            with rw.on_behalf_of(layer.attention):
                new = self._attention(rw, layer, keys, values, end)
            rw.replace(layer.attention.output, new)
        for layer in layers:
            rw.erase_dead(layer.key, layer.value)
        self._positions(graph, rw, pos, length)
        for name in ("attention_mask", "position_ids"):
            value = graph.input_named(name)
            if value is not None:
                for reader in value.users():
                    hint = "run simplify and fuse-gqa before kv-cache: an attention that is not fused keeps its mask"
                    raise CheckError(f"{where(reader)} reads {name!r}, which the new interface has not", hint)
                rw.remove_input(value)
        for buffer in buffers:
            for user in buffer.users():
                if user.op != "TensorScatter":
                    raise CheckError(f"{where(user)} reads the past {buffer.name!r}, which has no length any more")
        rw.infer_again()

    def _attention(self, rw: Rewriter, layer: _Layer, keys: Value, values: Value, end: Value) -> Value:
        query, mask, given = layer.attention.inputs[0], layer.mask, layer.attention.attributes
        if mask.why:
            make = rw.vastai if layer.attention.domain else rw.op
            return make.Attention(query, keys, values, self._input_mask(rw, layer.attention.inputs[3]), **given)
        if mask.is_plain and layer.attention.op == "Attention" and not given.get("softcap"):
            return rw.op.Attention(query, keys, values, None, None, None, end, **{**given, "is_causal": 1})
        slopes: Value | None = None
        if mask.slopes is not None:
            heads = (layer.attention.output.shape or ())[1]
            assert isinstance(heads, int)
            slopes = rw.shared_const(np.broadcast_to(mask.slopes.astype(keys.type.dtype.numpy), heads).copy(), "slopes")
        depth = (keys.shape or ())[3]
        assert isinstance(depth, int)
        attributes = {"scale": depth**-0.5, **given, "is_causal": 1}
        attributes |= {"window": mask.window} if mask.window else {}
        return rw.vastai.Attention(query, keys, values, None, end, slopes, **attributes)

    def _input_mask(self, rw: Rewriter, mask: Value | None) -> Value:
        """One input over all slots for each mask of the model, with the dimensions that it broadcasts left at 1."""
        assert mask is not None
        assert mask.shape is not None
        name = f"{MASK}.{mask.name}"
        shape = (*(mask.shape[:-1]), self._capacity)
        return rw.graph.input_named(name) or rw.add_input(name, TensorType(mask.type.dtype, shape))

    def _append(self, rw: Rewriter, concat: Node, pos: Value) -> Value:
        past, new = concat.inputs[:2]
        assert past is not None
        assert new is not None
        assert past.shape is not None
        batch, heads, _, depth = past.shape
        rw.set_type(past, TensorType(past.type.dtype, (batch, heads, self._capacity, depth)))
        with rw.on_behalf_of(concat):
            written = rw.op.TensorScatter(past, new, pos, axis=2, mode="linear")
        for name in rw.graph.output_names(concat.output):
            rw.set_output(name, written)
        return written

    def _positions(self, graph: Graph, rw: Rewriter, pos: Value, length: Value) -> None:
        positions = graph.input_named("position_ids")
        if positions is None or not positions.uses:
            return
        with rw.on_behalf_of(positions.users()[0]):  # all layers read the same positions
            zero, one = rw.const(0, "zero", "int64"), rw.const(1, "one", "int64")
            steps = rw.op.Range(zero, rw.op.Squeeze(length), one)
            rw.replace(positions, rw.op.Add(rw.op.Unsqueeze(pos, rw.ints(1)), steps))


def _masks(layers: list[_Layer]) -> list[Node]:
    masks = [layer.attention.input(3) for layer in layers]
    return list(dict.fromkeys(m.producer for m in masks if m is not None and m.producer is not None))


def _sees(attention: Node) -> str:
    """What the remark says: the buffer, and what is special about the attention."""
    window = attention.attributes.get("window")
    parts = [f"a window of {window} keys"] if window else []
    if attention.domain and attention.input(5) is not None:
        parts.append("ALiBi slopes")
    if attention.attributes.get("clamp"):
        parts.append(f"scores limited to {attention.attributes['clamp']:g}")
    return ", ".join(["reads a fixed KV buffer", *parts])


def _is_first_call(attention: Node) -> bool:
    """Whether there are as many keys as queries, so that ``is_causal`` counts from the same end as after a past."""
    query, key = attention.inputs[:2]
    assert query is not None
    assert key is not None
    return query.shape is not None and key.shape is not None and query.shape[2] == key.shape[2]


def _layer(graph: Graph, attention: Node, mask: Meaning) -> _Layer:
    concats: list[Node] = []
    for what, value in zip(("key", "value"), attention.inputs[1:3], strict=True):
        node = value.producer if value is not None else None
        past = node.inputs[0] if node is not None and node.op == "Concat" and len(node.inputs) == 2 else None
        if node is None or past is None or past not in graph.inputs or past.rank != 4:
            raise CheckError(f"the {what} of {where(attention)} is not a past input joined with new tokens")
        if node.attributes["axis"] not in (2, -2):
            raise CheckError(f"{where(node)} joins past and new along axis {node.attributes['axis']}, not the sequence")
        for user in node.output.users():
            if user.op not in ("Attention", "Vastai::Attention"):
                message = f"{where(user)} reads the {what} of {where(attention)} too"
                raise CheckError(message, "with kv-cache it would read a buffer with room behind the last token")
        concats.append(node)
    return _Layer(attention, concats[0], concats[1], mask)

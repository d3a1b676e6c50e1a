"""Rules for rotary embeddings, KV caches and attention: quantization and in-place writes fuse into their kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from vacc_opt.backends.vacc.assemble import Operand
from vacc_opt.backends.vacc.fusion import appended, pending, quantized, store, turned
from vacc_opt.backends.vacc.kernels.attention import AttentionParams, Quantization, Scores, attention
from vacc_opt.backends.vacc.kernels.kv_append import kv_append
from vacc_opt.backends.vacc.kernels.rotary import rotary
from vacc_opt.backends.vacc.lowering import Joined, Known, Lowering, Quantized, is_cache
from vacc_opt.backends.vacc.refs import Ref
from vacc_opt.backends.vacc.schedule import Kernel, Param
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Node


def lower_rotary(low: Lowering, node: Node) -> Known:
    """RotaryEmbedding of X [B, H, S, D] at positions `pos + 0..S-1`."""
    shape = low.type(node.outputs[0])[1]
    if len(shape) != 4:
        raise UserError(f"no kernel for a rotary embedding of rank {len(shape)} (`{node.name}`)", "run legalize")
    low.expect(node, node.input(3), "pos", np.arange(shape[2]), "position_ids")
    interleaved = bool(node.attributes.get("interleaved", 0))
    cos, sin = low.ref(node.inputs[1]), low.ref(node.inputs[2])
    sums = turned(low, node, cos, sin, interleaved)
    if sums:
        return low.waiting(node.output, sums)
    x, tables = low.ref(node.inputs[0]), [Operand("COS", "in", cos), Operand("SIN", "in", sin)]
    y = low.heads(low.dtype(node), x.shape)
    for row in range(x.shape[0]):
        operands = [Operand("X", "in", x.at(row)), *tables, Operand("Y", "out", y.at(row))]

        def build(a: Param, c: Param, s: Param, b: Param) -> Kernel:
            return rotary(a, c, s, b, interleaved, low.target)

        low.emit(("rotary", interleaved), build, operands, pos=("pos", row))
    return y


def lower_quantization(low: Lowering, node: Node) -> Known:
    """QuantizeKV and DequantizeKV wait for the node that writes or reads the cache."""
    scale, zero = low.ref(node.inputs[1]), low.ref(node.inputs[2])
    sums = quantized(low, node, scale, zero) if node.op == "Vastai::QuantizeKV" else None
    return sums or Quantized(low.ref(node.inputs[0]), scale, zero)


def lower_scatter(low: Lowering, node: Node) -> Known:
    """The write of new rows: into the cache in place, or, over a dequantized cache, left to attention."""
    if int(node.attributes.get("axis", -2)) not in (2, -2) or node.attributes.get("mode", "linear") != "linear":
        raise UserError(f"no kernel for a TensorScatter of this form (`{node.name}`)")
    low.expect(node, node.input(2), "pos", 0, "the write position")
    assert node.inputs[0] is not None
    assert node.inputs[1] is not None
    into = low.known[node.inputs[0]]
    new = low.known[node.inputs[1]]
    if isinstance(into, Quantized) and isinstance(new, Ref):
        return Joined(into, new)
    if not isinstance(into, Ref) or not is_cache(into.tensor):
        raise UserError(f"`{node.name}` writes into something that is not a KV cache input")
    others = [one for one in node.inputs[0].users() if one is not node and one.op != "Vastai::DequantizeKV"]
    if others:
        raise UserError(f"`{others[0].name}` reads `{into.tensor}`, which `{node.name}` overwrites in place")
    sums = pending(low, node.inputs[1])
    if sums and appended(low, node, sums):
        store(low, replace(sums, node=node), into.at(0))
        return into
    values = new.values if isinstance(new, Quantized) else low.ref(node.inputs[1])
    tables = [("SCALE", new.scale), ("ZERO", new.zero)] if isinstance(new, Quantized) else []
    extra = [Operand(name, "in", low.table(ref)) for name, ref in tables]
    for row in range(into.shape[0]):
        operands = [Operand("NEW", "in", values.at(row)), Operand("CACHE", "inout", into.at(row)), *extra]

        def build(a: Param, c: Param, *rest: Param) -> Kernel:
            scale, zero = rest or (None, None)
            return kv_append(a, c, scale, zero, low.target)

        low.emit("kv_append", build, operands, pos=("pos", row))
    return into


def lower_attention(low: Lowering, node: Node) -> Ref:
    """Attention of Q [B, Hq, S, D] over a cache [B, Hkv, C, D]; one call a row of the batch."""
    q = low.ref(node.inputs[0])
    assert node.inputs[1] is not None
    assert node.inputs[2] is not None
    keys, values = low.known[node.inputs[1]], low.known[node.inputs[2]]
    _check_attention(low, node, q)
    operands = _cache_operands(keys, values, low.table)
    if operands is None or not (is_cache(operands["K"].tensor) and is_cache(operands["V"].tensor)):
        raise UserError(f"keys and values of `{node.name}` do not come from KV caches alike", "run the pass `kv-cache`")
    if operands["K"].shape != operands["V"].shape:
        raise UserError(f"no kernel for keys and values of different widths (`{node.name}`)")
    heads, context = operands["K"].shape[1:3]
    batch, every, length, width = q.shape
    shape = heads, every // heads, length, width
    y = low.heads(q.dtype, q.shape)
    scores = _scores(node, width, context)
    if scores.linear and "KN" not in operands:
        operands.pop("KZ", None)
    shared = {name: ref for name, ref in operands.items() if len(ref.shape) == 3}
    if node.domain and node.input(5) is not None:
        shared["SLOPES"] = low.view(low.ref(node.input(5)), (*shape[:2], 1, 1))
    for row in range(batch):
        refs = {name: ref.at(row) for name, ref in operands.items() if name not in shared} | shared
        grouped = [one.at(row).reshaped(shape) for one in (q, y)]
        assert grouped[0] is not None
        assert grouped[1] is not None
        listed = [Operand("Q", "in", grouped[0]), *(Operand(name, "in", ref) for name, ref in refs.items())]
        listed.append(Operand("Y", "out", grouped[1]))
        names = [one.name for one in listed]

        def build(*params: Param, names: list[str] = names) -> Kernel:
            p = dict(zip(names, params, strict=True))
            folded = Quantization(p["KS"], p.get("KZ"), p["VS"], p["VZ"]) if "KS" in p else None
            new = (p["KN"], p["VN"]) if "KN" in p else None
            tensors = AttentionParams(p["Q"], p["K"], p["V"], p["Y"], folded, new, p.get("SLOPES"))
            return attention(tensors, scores, low.target)

        low.emit(("attention", scores), build, listed, pos=("pos", row))
    return y


def _scores(node: Node, width: int, context: int) -> Scores:
    """What the attributes say of the scores; a window that holds the whole cache is none."""
    given = node.attributes
    window = int(given.get("window", 0))
    return Scores(
        float(given.get("scale") or width**-0.5),
        window if window < context else 0,
        float(given.get("clamp", 0)),
        float(given.get("softcap", 0)) if node.domain else 0.0,
    )


def _check_attention(low: Lowering, node: Node, q: Ref) -> None:
    """Only causal attention over the cache, aligned at `pos` and without a mask, is what the kernel does.

    The soft cap of ONNX's own operator is not taken: Vastai::Attention says where it applies.
    """
    own = bool(node.domain)
    masks, length = ((3,), 4) if own else ((3, 4, 5), 6)
    foreign = () if own else ("softcap", "qk_matmul_output_mode")
    unknown = any(node.input(index) for index in masks) or any(node.attributes.get(name) for name in foreign)
    if len(q.shape) != 4 or not node.attributes.get("is_causal") or unknown or len(node.outputs) != 1:
        raise UserError(f"no kernel for an attention of this form (`{node.name}`)", "expected causal, 4-D, no mask")
    low.expect(node, node.input(length), "pos", q.shape[2], "length" if own else "nonpad_kv_seqlen")


def _cache_operands(keys: Known, values: Known, table: Callable[[Ref], Ref]) -> dict[str, Ref] | None:
    """The operands for a float cache, an int8 one, or one with float new rows; None when keys and values differ."""
    if isinstance(keys, Ref) and isinstance(values, Ref):
        return {"K": keys, "V": values}
    if isinstance(keys, Joined) and isinstance(values, Joined):
        new = {"KN": keys.new, "VN": values.new}
        keys, values = keys.cache, values.cache
    elif isinstance(keys, Quantized) and isinstance(values, Quantized):
        new = {}
    else:
        return None
    tables = {"KS": keys.scale, "KZ": keys.zero, "VS": values.scale, "VZ": values.zero}
    return {"K": keys.values, "V": values.values, **{name: table(ref) for name, ref in tables.items()}, **new}

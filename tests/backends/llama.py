"""Legalized Llama-like graphs with random weights, as the passes hand them to the backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir import DType, Graph, Literal, PerRank, TensorType, Value
from vacc_opt.ir.rewriter import Rewriter

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Llama:
    """Sizes of one rank (heads, vocabulary shard), and the variants of the contract."""

    batch: int = 1
    length: int = 5
    context: int = 24
    layers: int = 2
    hidden: int = 40
    ffn: int = 56
    vocab: int = 37
    heads: int = 4
    kv_heads: int = 2
    width: int = 8
    ranks: int = 1
    dtype: DType = DType.FLOAT
    int8_weights: bool = False
    kv: str = "float"  # "float", "int8" (new tokens attended as floats), "int8-quantised"
    alibi: bool = False
    window: int = 0
    clamp: float = 0.0
    softcap: float = 0.0

    def graph(self) -> Graph:
        """The graph of one phase: length > 1 is a prefill, 1 a decode."""
        return _Builder(self).graph


class _Builder:
    def __init__(self, m: Llama) -> None:
        self.m, self.rng = m, np.random.default_rng(7)
        self.graph = Graph("llama")
        self.rw = Rewriter(self.graph)
        self.rw.set_ranks(m.ranks)
        integer = DType.INT64
        self.ids = self.rw.add_input("input_ids", TensorType(integer, (m.batch, m.length)))
        self.pos = self.rw.add_input("pos", TensorType(integer, (m.batch,)))
        self.valid = self.rw.add_input("valid", TensorType(integer, (m.batch,)))
        self.count = 0
        op = self.rw.op
        self.end = op.Add(self.pos, self.ints(m.length))
        column = op.Unsqueeze(self.pos, self.ints(1))
        self.positions = op.Add(column, self.rw.const(np.arange(m.length)[None]))
        angle = self.rng.standard_normal((m.context, m.width // 2))
        self.tables = [self.rw.const(f(angle).astype(m.dtype.numpy), n) for f, n in ((np.cos, "cos"), (np.sin, "sin"))]
        hidden = self.embed()
        for layer in range(m.layers):
            hidden = self.layer(layer, hidden)
        last = op.Unsqueeze(op.Sub(self.valid, self.ints(1)), self.ints(1))
        row = op.Unsqueeze(op.GatherND(hidden, last, batch_dims=1), self.ints(1))
        logits = self.linear(self.norm(row), m.vocab)
        if m.ranks > 1:
            logits = self.rw.vastai.AllGather(logits, ranks=m.ranks, axis=-1)
            stop = m.vocab * m.ranks - 3
            logits = op.Slice(logits, self.ints(0), self.ints(stop), self.ints(2))
        self.rw.set_output("logits", logits)

    def ints(self, *numbers: int) -> Value:
        self.count += 1
        return self.rw.const(np.array(numbers, np.int64), f"ints.{self.count}")

    def weight(self, *shape: int, scale: float = 0.2) -> Value:
        """Random and different on every rank."""
        self.count += 1
        parts = []
        for _ in range(self.m.ranks):
            if scale:
                array = (self.rng.standard_normal(shape) * scale).astype(self.m.dtype.numpy)
            else:
                array = self.rng.integers(-127, 128, shape, np.int8)
            parts.append(Literal(array))
        return self.rw.const(PerRank(tuple(parts)) if len(parts) > 1 else parts[0], f"weight.{self.count}")

    def same(self, *shape: int, low: float, high: float) -> Value:
        self.count += 1
        return self.rw.const(self.rng.uniform(low, high, shape).astype(np.float32), f"table.{self.count}")

    def linear(self, x: Value, columns: int, bias: bool = False) -> Value:
        op, assume = self.rw.op, x.type.static_shape
        assert assume is not None
        if self.m.int8_weights:
            codes, scale = self.weight(columns, assume[-1], scale=0), self.same(columns, low=1e-3, high=3e-3)
            y = self.rw.vastai.QuantizedLinearPerChannel(x, codes, scale)
        else:
            y = op.MatMul(x, op.Transpose(self.weight(columns, assume[-1]), perm=(1, 0)))
        return op.Add(y, self.weight(columns)) if bias else y

    def norm(self, x: Value) -> Value:
        return self.rw.op.RMSNormalization(x, self.weight(self.m.hidden), axis=-1, epsilon=1e-5)

    def embed(self) -> Value:
        m = self.m
        if m.ranks == 1:
            return self.rw.op.Gather(self.weight(m.vocab, m.hidden, scale=1.0), self.ids, axis=0)
        firsts = PerRank(tuple(Literal(np.array(rank * m.vocab)) for rank in range(m.ranks)))
        table = self.weight(m.vocab, m.hidden, scale=1.0)
        shard = self.rw.vastai.EmbeddingShard(table, self.ids, self.rw.const(firsts, "first"))
        return self.reduce(shard)

    def reduce(self, x: Value) -> Value:
        return self.rw.vastai.AllReduce(x, ranks=self.m.ranks) if self.m.ranks > 1 else x

    def heads(self, x: Value, heads: int) -> Value:
        shape = self.ints(self.m.batch, self.m.length, heads, self.m.width)
        return self.rw.op.Transpose(self.rw.op.Reshape(x, shape), perm=(0, 2, 1, 3))

    def layer(self, layer: int, hidden: Value) -> Value:
        m, op = self.m, self.rw.op
        x = self.norm(hidden)
        q, k, v = (self.heads(self.linear(x, h * m.width, bias=True), h) for h in (m.heads, m.kv_heads, m.kv_heads))
        q, k = (op.RotaryEmbedding(one, *self.tables, self.positions) for one in (q, k))
        keys, values = self.cache(layer, "key", k), self.cache(layer, "value", v)
        y = self.attention(q, keys, values)
        merged = op.Reshape(op.Transpose(y, perm=(0, 2, 1, 3)), self.ints(m.batch, m.length, m.heads * m.width))
        hidden = op.Add(hidden, self.reduce(self.linear(merged, m.hidden)))
        x = self.norm(hidden)
        gated = self.rw.vastai.SwiGLU(self.linear(x, m.ffn), self.linear(x, m.ffn))
        return op.Add(hidden, self.reduce(self.linear(gated, m.hidden)))

    def attention(self, q: Value, keys: Value, values: Value) -> Value:
        m, limits = self.m, {"window": self.m.window, "clamp": self.m.clamp, "softcap": self.m.softcap}
        if not m.alibi and not any(limits.values()):
            return self.rw.op.Attention(q, keys, values, None, None, None, self.end, is_causal=1, scale=0.4)
        slopes = self.weight(m.heads) if m.alibi else None
        return self.rw.vastai.Attention(q, keys, values, None, self.end, slopes, is_causal=1, scale=0.4, **limits)

    def cache(self, layer: int, kind: str, new: Value) -> Value:
        m, op = self.m, self.rw.op
        shape = m.batch, m.kv_heads, m.context, m.width
        dtype = m.dtype if m.kv == "float" else DType.INT8
        old = self.rw.add_input(f"past_key_values.{layer}.{kind}", TensorType(dtype, shape))
        if m.kv == "float":
            present = op.TensorScatter(old, new, self.pos, axis=2, mode="linear")
            self.rw.set_output(f"present.{layer}.{kind}", present)
            return present
        scale = self.same(m.kv_heads, m.width, low=0.01, high=0.03)
        zero = self.same(m.kv_heads, m.width, low=-0.5, high=0.5)
        codes = self.rw.vastai.QuantizeKV(new, scale, zero)
        present = op.TensorScatter(old, codes, self.pos, axis=2, mode="linear")
        self.rw.set_output(f"present.{layer}.{kind}", present)
        if m.kv == "int8":
            floats = self.rw.vastai.DequantizeKV(old, scale, zero, to=m.dtype.onnx)
            return op.TensorScatter(floats, new, self.pos, axis=2, mode="linear")
        return self.rw.vastai.DequantizeKV(present, scale, zero, to=m.dtype.onnx)


def inputs(m: Llama, pos: list[int], valid: list[int], seed: int = 3) -> dict[str, Array]:
    """Random tokens."""
    ids = np.random.default_rng(seed).integers(0, m.vocab * m.ranks, (m.batch, m.length))
    return {"input_ids": ids, "pos": np.array(pos), "valid": np.array(valid)}

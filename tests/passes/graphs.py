"""Random graphs for property tests: whole small decoders, in the forms that exporters write, and mixtures of operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from vacc_opt.ir import DType, Graph, SymbolicDim, TensorType, Value
from vacc_opt.ir.provenance import Origin, Provenance
from vacc_opt.ir.rewriter import Rewriter

Draw = Callable[[st.SearchStrategy[Any]], Any]
BATCH, SEQ, PAST = (SymbolicDim.parse(name) for name in ("batch", "seq", "past"))
HEADS = ((1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (6, 2))  # query and KV heads
ROWS = 64  # of rotary tables


class Builder:
    """Makes the parts of a decoder, each in a form that is drawn."""

    def __init__(self, draw: Draw, name: str, opset: int) -> None:
        self.draw = draw
        self.graph = Graph(name, opset=opset)
        self.rw = Rewriter(self.graph)
        self.op = self.rw.op
        self.rng = np.random.default_rng(0)

    def one_of(self, *choices: Any) -> Any:
        """A drawn choice; the first is the simplest."""
        return self.draw(st.sampled_from(choices))

    def yes(self) -> bool:
        """A drawn flag; False is simpler."""
        return bool(self.draw(st.booleans()))

    def input(self, name: str, dtype: DType, *shape: Any) -> Value:
        """A graph input."""
        return self.rw.add_input(name, TensorType(dtype, shape))

    def number(self, value: float, dtype: npt.DTypeLike = np.float32) -> Value:
        """A scalar constant."""
        return self.rw.const(np.array(value, dtype), "c")

    def weight(self, name: str, *shape: int, scale: float = 0.3) -> Value:
        """A constant of seeded noise."""
        return self.rw.const((self.rng.standard_normal(shape) * scale).astype(np.float32), name)

    def finished(self) -> Graph:
        """The graph, each of whose nodes and constants comes from a line of its own."""
        self.rw.erase_unused_constants()
        for index, node in enumerate(self.graph.nodes()):
            node.provenance = Provenance((Origin(f"part.{index}", f"drawn.py:{index + 1}", node.op_type),))
        for index, value in enumerate(self.graph.constants()):
            value.provenance = Provenance((Origin(value.name, f"drawn.py:{index + 501}", "weight"),))
        return self.graph

    # parts

    def linear(self, x: Value, size: int, name: str, *, bias: bool = False) -> Value:
        """X @ W, W stored as [K, N] or as [N, K]; or a Gemm over the joined axes of tokens."""
        assert x.shape is not None
        width = x.shape[-1]
        assert isinstance(width, int)
        form = self.one_of("rows", "columns", "rows", "gemm") if x.rank == 3 else self.one_of("rows", "columns")
        if form == "gemm":
            flat = self.op.Reshape(x, self.rw.ints(-1, width))
            vector = [self.weight(f"{name}.bias", size)] if bias else []
            y = self.op.Gemm(flat, self.weight(f"{name}.weight", size, width), *vector, transB=1)
            lead = self.op.Shape(x, start=0, end=2)
            return self.op.Reshape(y, self.op.Concat(lead, self.rw.ints(size), axis=0))
        if form == "columns":
            y = self.op.MatMul(x, self.weight(f"{name}.weight", width, size))
        else:
            y = self.op.MatMul(x, self.op.Transpose(self.weight(f"{name}.weight", size, width), perm=(1, 0)))
        return self.op.Add(y, self.weight(f"{name}.bias", size)) if bias else y

    def norm(self, x: Value, name: str) -> Value:
        """RMS normalization."""
        assert x.shape is not None
        width = x.shape[-1]
        assert isinstance(width, int)
        weight = self.rw.const(np.linspace(0.5, 1.5, width, dtype=np.float32), f"{name}.weight")
        form = (
            self.one_of("chain", "product", "operator") if self.graph.opset >= 23 else self.one_of("chain", "product")
        )
        if form == "operator":
            return self.op.RMSNormalization(x, weight, axis=-1, epsilon=1e-6)
        square = self.op.Mul(x, x) if form == "product" else self.op.Pow(x, self.number(2))
        mean = self.op.ReduceMean(square, self.rw.ints(-1), keepdims=1)
        root = self.op.Sqrt(self.op.Add(mean, self.number(1e-6)))
        normed = self.op.Div(x, root) if form == "product" else self.op.Mul(x, self.op.Reciprocal(root))
        return self.op.Mul(weight, normed) if self.yes() else self.op.Mul(normed, weight)

    def angles(self, positions: Value, depth: int) -> Value:
        """[batch, seq, depth / 2] from positions [batch, seq]."""
        column = self.op.Cast(self.op.Unsqueeze(positions, self.rw.ints(2)), to=DType.FLOAT.onnx)
        rates = (0.5 ** np.arange(depth // 2)).astype(np.float32)
        return self.op.Mul(column, self.rw.const(rates, "inv_freq"))

    def rotary(self, x: Value, positions: Value) -> Value:
        """Rotary embeddings of x [batch, heads, seq, D], of all channels or of the first half of them."""
        assert x.shape is not None
        depth = x.shape[-1]
        assert isinstance(depth, int)
        if depth < 8 or self.one_of("all", "all", "first") == "all":
            return self.rotated(x, positions)
        half, last = self.rw.ints(depth // 2), self.rw.ints(3)
        first = self.op.Slice(x, self.rw.ints(0), half, last)
        rest = self.op.Slice(x, half, self.rw.ints(depth), last)
        return self.op.Concat(self.rotated(first, positions), rest, axis=-1)

    def rotated(self, x: Value, positions: Value) -> Value:
        """All channels of x, in halves."""
        assert x.shape is not None
        depth = x.shape[-1]
        assert isinstance(depth, int)
        forms = ("chain", "pairs", "angles", "tables") if self.graph.opset >= 23 else ("chain", "pairs")
        form = self.one_of(*forms)
        if form == "tables":
            angles = np.arange(ROWS)[:, None] * 0.5 ** np.arange(depth // 2)
            cos, sin = (self.rw.const(f(angles).astype(np.float32), n) for f, n in ((np.cos, "cos"), (np.sin, "sin")))
            return self.op.RotaryEmbedding(x, cos, sin, positions)
        angle = self.angles(positions, depth)
        if form == "angles":
            return self.op.RotaryEmbedding(x, self.op.Cos(angle), self.op.Sin(angle))
        if form == "pairs":
            return self.paired(x, angle, depth)
        both, one = self.op.Concat(angle, angle, axis=-1), self.rw.ints(1)
        cos, sin = self.op.Unsqueeze(self.op.Cos(both), one), self.op.Unsqueeze(self.op.Sin(both), one)
        half, last = self.rw.ints(depth // 2), self.rw.ints(3)
        low = self.op.Slice(x, self.rw.ints(0), half, last)
        high = self.op.Slice(x, half, self.rw.ints(self.one_of(depth, 2**62)), last)
        turned = self.op.Concat(self.op.Neg(high), low, axis=-1)
        return self.op.Add(self.op.Mul(x, cos), self.op.Mul(turned, sin))

    def paired(self, x: Value, angle: Value, depth: int) -> Value:
        """Neighbouring channels of x rotated by ``angle`` [batch, seq, depth / 2]."""
        pairs = self.op.Reshape(x, self.rw.ints(0, 0, 0, depth // 2, 2))
        even, odd = (self.op.Gather(pairs, self.number(i, np.int64), axis=4) for i in (0, 1))
        one, last = self.rw.ints(1), self.rw.ints(-1)
        cos, sin = self.op.Unsqueeze(self.op.Cos(angle), one), self.op.Unsqueeze(self.op.Sin(angle), one)
        a = self.op.Sub(self.op.Mul(even, cos), self.op.Mul(odd, sin))
        b = self.op.Add(self.op.Mul(odd, cos), self.op.Mul(even, sin))
        stack = self.op.Concat(self.op.Unsqueeze(a, last), self.op.Unsqueeze(b, last), axis=-1)
        return self.op.Reshape(stack, self.rw.ints(0, 0, 0, depth))

    def grouped(self, x: Value, name: str, sizes: tuple[int, int, int], *, bias: bool) -> list[Value]:
        """q, k, v [batch, heads, seq, depth] from one layer whose outputs are [kv, (q .., k, v), depth]."""
        heads, kv, depth = sizes
        group = heads // kv
        wide = self.linear(x, (heads + 2 * kv) * depth, name, bias=bias)
        parted = self.op.Reshape(wide, self.rw.ints(0, 0, kv, group + 2, depth))
        q = self.op.Slice(parted, self.rw.ints(0), self.rw.ints(group), self.rw.ints(3))
        k, v = (self.op.Gather(parted, self.number(group + i, np.int64), axis=3) for i in (0, 1))
        q = self.op.Reshape(q, self.rw.ints(0, 0, heads, depth))
        return [self.op.Transpose(part, perm=(0, 2, 1, 3)) for part in (q, k, v)]

    def heads(self, x: Value, count: int, depth: int) -> Value:
        """[batch, seq, count * depth] -> [batch, count, seq, depth]."""
        if self.yes():
            lead = self.op.Shape(x, start=0, end=2)
            target = self.op.Concat(lead, self.rw.ints(count, depth), axis=0)
        else:
            target = self.rw.ints(0, 0, *self.one_of((count, depth), (-1, depth)))
        return self.op.Transpose(self.op.Reshape(x, target), perm=(0, 2, 1, 3))

    def repeated(self, x: Value, group: int) -> Value:
        """[batch, heads, rows, D] with each head ``group`` times."""
        assert x.shape is not None
        heads, depth = x.shape[1], x.shape[3]
        assert isinstance(heads, int)
        assert isinstance(depth, int)
        wide = self.op.Expand(self.op.Unsqueeze(x, self.rw.ints(2)), self.rw.ints(1, 1, group, 1, 1))
        return self.op.Reshape(wide, self.rw.ints(0, heads * group, -1, depth))

    def attention(self, q: Value, k: Value, v: Value, mask: Value | None) -> Value:
        """Grouped attention; eager or one operator."""
        assert q.shape is not None
        assert k.shape is not None
        assert isinstance(q.shape[1], int)
        assert isinstance(k.shape[1], int)
        group, depth = q.shape[1] // k.shape[1], q.shape[3]
        assert isinstance(depth, int)
        forms = ("eager", "repeated operator", "operator") if self.graph.opset >= 23 else ("eager",)
        form = self.one_of(*forms)
        if group > 1 and form != "operator":
            k, v = self.repeated(k, group), self.repeated(v, group)
        if form != "eager":
            return self.op.Attention(q, k, v, mask, scale=self.one_of(None, 0.5))
        scale, turned = depth**-0.5, self.op.Transpose(k, perm=(0, 1, 3, 2))
        place = self.one_of("scores", "divided", "both")
        if place == "both":
            root = self.number(scale**0.5)
            scores = self.op.MatMul(self.op.Mul(q, root), self.op.Mul(turned, root))
        elif place == "divided":
            scores = self.op.Div(self.op.MatMul(q, turned), self.number(1 / scale))
        else:
            scores = self.op.Mul(self.op.MatMul(q, turned), self.number(scale))
        if mask is not None and self.yes():
            scores = self.op.Where(self.op.Less(mask, self.number(-1e4)), self.number(-1e9), scores)
        elif mask is not None:
            scores = self.op.Add(scores, mask)
        weights = self.op.Softmax(scores, axis=-1)
        return self.op.MatMul(self.op.Cast(weights, to=DType.FLOAT.onnx) if self.yes() else weights, v)

    def joined(self, x: Value, width: int) -> Value:
        """[batch, heads, seq, D] -> [batch, seq, width]."""
        return self.op.Reshape(self.op.Transpose(x, perm=(0, 2, 1, 3)), self.rw.ints(0, 0, self.one_of(-1, width)))

    def gated(self, gate: Value, up: Value) -> Value:
        """silu(gate) * up."""
        form = self.one_of("product", "swish", "operator") if self.graph.opset >= 24 else "product"
        if form == "operator":
            return self.rw.vastai.SwiGLU(gate, up)
        silu = self.op.Swish(gate) if form == "swish" else self.op.Mul(gate, self.op.Sigmoid(gate))
        return self.op.Mul(silu, up)

    def causal_mask(self, mask: Value, ids: Value) -> Value:
        """[batch, 1, seq, past + seq] from attention_mask and the lengths, as exporters write it."""
        zero, one = self.number(0, np.int64), self.number(1, np.int64)
        all_, new = self.op.Shape(mask, start=1), self.op.Shape(ids, start=1)
        total, start = self.op.Squeeze(all_), self.op.Squeeze(self.op.Sub(all_, new))
        keys, queries = self.op.Range(zero, total, one), self.op.Range(start, total, one)
        row = self.op.Unsqueeze(keys, self.rw.ints(0, 1, 2))
        future = self.op.Greater(row, self.op.Unsqueeze(queries, self.rw.ints(0, 1, 3)))
        padded = self.op.Equal(self.op.Unsqueeze(mask, self.rw.ints(1, 2)), zero)
        hidden = self.op.Or(future, padded)
        return self.op.Where(hidden, self.number(self.one_of(np.finfo(np.float32).min, -1e9)), self.number(0.0))

    def split(self, x: Value, sizes: Sequence[int]) -> list[Value]:
        """Parts of the last axis, as Split or Slice."""
        if self.yes():
            return list(self.rw.add("Split", [x, self.rw.ints(*sizes)], {"axis": -1}, outputs=len(sizes)).outputs)
        ends = np.cumsum(sizes).tolist()
        starts, last = [0, *ends[:-1]], self.rw.ints(-1)
        return [self.op.Slice(x, self.rw.ints(a), self.rw.ints(b), last) for a, b in zip(starts, ends, strict=True)]


@st.composite
def decoders(draw: Draw) -> Graph:
    """A language model of one or two layers with growing caches, by the conventions of the exporters."""
    b = Builder(draw, "decoder", draw(st.sampled_from((24, 23, 20))))
    heads, kv = b.one_of(*HEADS)
    depth, hidden, vocabulary = b.one_of(4, 8), b.one_of(8, 12), b.one_of(16, 21)
    ids = b.input("input_ids", DType.INT64, BATCH, SEQ)
    keep = b.input("attention_mask", DType.INT64, BATCH, PAST + SEQ)
    positions = b.input("position_ids", DType.INT64, BATCH, SEQ)
    count = b.one_of(1, 2)
    pasts = [
        [b.input(f"past_key_values.{i}.{w}", DType.FLOAT, BATCH, kv, PAST, depth) for w in ("key", "value")]
        for i in range(count)
    ]
    mask = b.causal_mask(keep, ids)
    table = b.weight("embed.weight", vocabulary, hidden)
    x = b.op.Gather(table, ids)
    biased, packed = b.yes(), b.yes()
    for i, past in enumerate(pasts):
        x = b.op.Add(
            x, _attention_block(b, f"layers.{i}", x, (heads, kv, depth), past, (positions, mask), biased, packed)
        )
        x = b.op.Add(x, _feed_forward(b, f"layers.{i}.mlp", x, b.one_of(6, 12), packed))
    x = b.norm(x, "norm") if b.yes() else x
    if b.yes():
        logits = b.op.MatMul(x, b.op.Transpose(table, perm=(1, 0)))  # tied
    else:
        logits = b.linear(x, vocabulary, "lm_head", bias=b.yes())
    if b.yes():
        logits = b.op.Mul(b.op.Tanh(b.op.Div(logits, b.number(30.0))), b.number(30.0))
    b.rw.set_output("logits", logits)
    outputs = dict(b.graph.outputs)
    b.graph.outputs = {"logits": outputs.pop("logits"), **outputs}
    _besides(b)
    return b.finished()


def _besides(b: Builder) -> None:
    """Now and then an inner value that leaves the graph too, or that something reads which nobody wants."""
    inner = [
        n.output for n in b.graph.nodes() if n.output.type.dtype is DType.FLOAT and not b.graph.is_output(n.output)
    ]
    for index, value in enumerate(b.draw(st.lists(st.sampled_from(inner), max_size=2)) if b.yes() else ()):
        if b.yes():
            b.op.Neg(value)
        else:
            b.rw.set_output(f"inner{index}", value)


def _attention_block(
    b: Builder, name: str, x: Value, sizes: tuple[int, int, int], past: list[Value], at: tuple[Value, Value],
    biased: bool, packed: bool,
) -> Value:  # fmt: skip
    heads, kv, depth = sizes
    positions, mask = at
    n = b.norm(x, f"{name}.input_norm")
    widths = (heads * depth, kv * depth, kv * depth)
    if packed and b.yes():
        q, k, v = b.grouped(n, f"{name}.qkv", sizes, bias=biased)
    else:
        if packed:
            q, k, v = b.split(b.linear(n, sum(widths), f"{name}.qkv", bias=biased), widths)
        else:
            parts = zip(("q_proj", "k_proj", "v_proj"), widths, strict=True)
            q, k, v = (b.linear(n, size, f"{name}.{part}", bias=biased) for part, size in parts)
        q, k, v = b.heads(q, heads, depth), b.heads(k, kv, depth), b.heads(v, kv, depth)
    q, k = b.rotary(q, positions), b.rotary(k, positions)
    k, v = b.op.Concat(past[0], k, axis=2), b.op.Concat(past[1], v, axis=2)
    index = name.partition(".")[2]
    b.rw.set_output(f"present.{index}.key", k)
    b.rw.set_output(f"present.{index}.value", v)
    assert x.shape is not None
    assert isinstance(x.shape[-1], int)
    return b.linear(b.joined(b.attention(q, k, v, mask), heads * depth), x.shape[-1], f"{name}.o_proj")


def _feed_forward(b: Builder, name: str, x: Value, channels: int, packed: bool) -> Value:
    assert x.shape is not None
    assert isinstance(x.shape[-1], int)
    n = b.norm(x, f"{name}.norm")
    if packed:
        gate, up = b.split(b.linear(n, 2 * channels, f"{name}.gate_up"), (channels, channels))
    else:
        gate, up = b.linear(n, channels, f"{name}.gate"), b.linear(n, channels, f"{name}.up")
    return b.linear(b.gated(gate, up), x.shape[-1], f"{name}.down")

"""A synthetic mixture-of-experts decoder as exporters write it: every layer is attention and many dense experts."""

from __future__ import annotations

from vacc_opt.ir import DType, Graph, Source, SymbolicDim, TensorType, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import from_text

HEADS, KV, WIDTH, HIDDEN, CHANNELS, VOCABULARY = 4, 2, 8, 32, 48, 128

# the interface, a causal mask with padding, and the cos/sin of rotary embeddings by position
FRAME = """
moe (int64[batch,seq] input_ids, int64[batch,total] attention_mask, int64[batch,seq] position_ids)
    => (float[batch,1,seq,8] cos, float[batch,1,seq,8] sin, float[batch,1,seq,total] mask, float[batch,seq,32] hidden)
{
    zero = Constant <value_int = 0> ()
    unit = Constant <value_int = 1> ()
    i1 = Constant <value_ints = [1]> ()
    i12 = Constant <value_ints = [1, 2]> ()
    i013 = Constant <value_ints = [0, 1, 3]> ()
    i012 = Constant <value_ints = [0, 1, 2]> ()
    hide = Constant <value = float {-3.4e38}> ()
    show = Constant <value = float {0.0}> ()
    frequency = Constant <value = float[4] {1.0, 0.1, 0.01, 0.001}> ()
    two = Constant <value_ints = [2]> ()
    all = Shape <start = 1> (attention_mask)
    new = Shape <start = 1> (input_ids)
    before = Sub (all, new)
    length = Squeeze (all)
    start = Squeeze (before)
    keys = Range (zero, length, unit)
    queries = Range (start, length, unit)
    column = Unsqueeze (queries, i013)
    row = Unsqueeze (keys, i012)
    future = Greater (row, column)
    kept = Unsqueeze (attention_mask, i12)
    padded = Equal (kept, zero)
    hidden_key = Or (future, padded)
    mask = Where (hidden_key, hide, show)
    wide = Cast <to = 1> (position_ids)
    places = Unsqueeze (wide, two)
    angle = Mul (places, frequency)
    both = Concat <axis = -1> (angle, angle)
    c = Cos (both)
    s = Sin (both)
    cos = Unsqueeze (c, i1)
    sin = Unsqueeze (s, i1)
    hidden = Gather <axis = 0> (embed, input_ids)
}
# dim total = past + seq
# const "embed" = Source('weights.bin', 0, 'float', (128, 32))
"""


class _Builder:
    """Adds the layers of the model, in the primitives of an eager export."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.rw = Rewriter(graph, by="builder")
        self.op = self.rw.op
        self.offset = VOCABULARY * HIDDEN * 4
        self.eps = self.rw.const(1e-6, "eps", "float32")
        self.square = self.rw.const(2.0, "square", "float32")
        self.scale = self.rw.const(WIDTH**-0.5, "scale", "float32")
        self.ints = {n: self.rw.ints(n) for n in (-1, 0, 1, 2, 3, WIDTH // 2, WIDTH, 1 << 62)}
        self.frame = dict(graph.outputs)

    def weight(self, name: str, *shape: int) -> Value:
        size = 4
        for dim in shape:
            size *= dim
        self.offset += size
        return self.rw.const(Source("weights.bin", self.offset - size, "float", shape), name)

    def linear(self, x: Value, name: str, out: int, into: int) -> Value:
        return self.op.MatMul(x, self.op.Transpose(self.weight(f"{name}.weight", out, into), perm=(1, 0)))

    def norm(self, x: Value, name: str) -> Value:
        mean = self.op.ReduceMean(self.op.Pow(x, self.square), self.ints[-1], keepdims=1)
        inverse = self.op.Reciprocal(self.op.Sqrt(self.op.Add(mean, self.eps)))
        return self.op.Mul(self.weight(f"{name}.weight", HIDDEN), self.op.Mul(x, inverse))

    def heads(self, x: Value) -> Value:
        split = self.op.Reshape(x, self.rw.ints(0, 0, -1, WIDTH))
        return self.op.Transpose(split, perm=(0, 2, 1, 3))

    def rotary(self, x: Value) -> Value:
        half, end, axis = self.ints[WIDTH // 2], self.ints[1 << 62], self.ints[3]
        low = self.op.Slice(x, self.ints[0], half, axis)
        high = self.op.Slice(x, half, end, axis)
        turned = self.op.Concat(self.op.Neg(high), low, axis=-1)
        return self.op.Add(self.op.Mul(x, self.frame["cos"]), self.op.Mul(turned, self.frame["sin"]))

    def past(self, x: Value, layer: int, what: str) -> Value:
        size = (SymbolicDim.parse("batch"), KV, SymbolicDim.parse("past"), WIDTH)
        old = self.rw.add_input(f"past_key_values.{layer}.{what}", TensorType(DType.FLOAT, size))
        joined = self.op.Concat(old, x, axis=2)
        self.rw.set_output(f"present.{layer}.{what}", joined)
        return joined

    def repeated(self, x: Value) -> Value:
        shape = self.op.Concat(
            self.op.Shape(x, start=0, end=2), self.ints[HEADS // KV], self.op.Shape(x, start=2), axis=0
        )
        wide = self.op.Expand(self.op.Unsqueeze(x, self.ints[2]), shape)
        return self.op.Reshape(wide, self.rw.ints(0, HEADS, -1, WIDTH))

    def attention(self, x: Value, layer: int) -> Value:
        name = f"model.layers.{layer}.self_attn"
        q = self.rotary(self.heads(self.linear(x, f"{name}.q_proj", HEADS * WIDTH, HIDDEN)))
        k = self.rotary(self.heads(self.linear(x, f"{name}.k_proj", KV * WIDTH, HIDDEN)))
        v = self.heads(self.linear(x, f"{name}.v_proj", KV * WIDTH, HIDDEN))
        keys = self.repeated(self.past(k, layer, "key"))
        values = self.repeated(self.past(v, layer, "value"))
        scores = self.op.Mul(self.op.MatMul(q, self.op.Transpose(keys, perm=(0, 1, 3, 2))), self.scale)
        weights = self.op.Softmax(self.op.Add(scores, self.frame["mask"]), axis=-1)
        mixed = self.op.Transpose(self.op.MatMul(weights, values), perm=(0, 2, 1, 3))
        return self.linear(self.op.Reshape(mixed, self.rw.ints(0, 0, -1)), f"{name}.o_proj", HIDDEN, HEADS * WIDTH)

    def experts(self, x: Value, layer: int, count: int) -> Value:
        name = f"model.layers.{layer}.mlp"
        shares = self.op.Softmax(self.linear(x, f"{name}.router", count, HIDDEN), axis=-1)
        total: Value | None = None
        for expert in range(count):
            stem = f"{name}.experts.{expert}"
            gate = self.linear(x, f"{stem}.gate_proj", CHANNELS, HIDDEN)
            up = self.linear(x, f"{stem}.up_proj", CHANNELS, HIDDEN)
            active = self.op.Mul(self.op.Mul(gate, self.op.Sigmoid(gate)), up)
            made = self.linear(active, f"{stem}.down_proj", HIDDEN, CHANNELS)
            share = self.op.Slice(shares, self.rw.ints(expert), self.rw.ints(expert + 1), self.ints[-1])
            weighted = self.op.Mul(made, share)
            total = weighted if total is None else self.op.Add(total, weighted)
        assert total is not None
        return total


def moe(layers: int, experts: int) -> Graph:
    """A decoder of ``layers`` layers with ``experts`` experts each: about 12 nodes an expert before any pass."""
    graph = from_text(FRAME)
    build = _Builder(graph)
    x = graph.outputs["hidden"]
    for layer in range(layers):
        x = build.op.Add(x, build.attention(build.norm(x, f"model.layers.{layer}.input_layernorm"), layer))
        x = build.op.Add(x, build.experts(build.norm(x, f"model.layers.{layer}.post_layernorm"), layer, experts))
    logits = build.linear(build.norm(x, "model.norm"), "lm_head", VOCABULARY, HIDDEN)
    for name in ("cos", "sin", "mask", "hidden"):
        build.rw.drop_output(name)
    build.rw.set_output("logits", logits)
    assert logits.type.dtype is DType.FLOAT
    return graph

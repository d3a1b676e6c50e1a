"""Graphs that each fusion pass rewrites, as exporters write them, with sizes so alike that few mutants are ill-typed.

Batch, sequence and depth are equal where they can be: an axis mistaken for another must be seen by its meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vacc_opt.ir import Graph, Literal
from vacc_opt.ir.text import from_text
from vacc_opt.passes.fuse.fold_norm_head import FoldNormHead
from vacc_opt.passes.fuse.fuse_gqa import FuseGqa
from vacc_opt.passes.fuse.fuse_head_norms import FuseHeadNorms
from vacc_opt.passes.fuse.fuse_residual_norm import FuseResidualNorm
from vacc_opt.passes.fuse.fuse_rms_norm import FuseRmsNorm
from vacc_opt.passes.fuse.fuse_rotary import FuseRotary
from vacc_opt.passes.fuse.fuse_swiglu import FuseSwiglu
from vacc_opt.passes.fuse.gather_channels import GatherChannels
from vacc_opt.passes.fuse.split_packed_linear import SplitPackedLinear
from vacc_opt.passes.infra.base import Pass

# what a check says of a part of the graph, for mutants in that part: the words, and the nodes and constants there
Statements = tuple[tuple[str, frozenset[str]], ...]


@dataclass(frozen=True)
class Base:
    """A graph in which ``item`` fuses ``fused`` places, and what its checks say of which part."""

    item: Pass
    text: str
    statements: Statements = ()
    fused: int = 1
    folds: bool = False  # of constants alone, which simplify computes

    def graph(self) -> Graph:
        """A new graph."""
        return from_text(self.text)


def _of(words: str, *places: str) -> tuple[str, frozenset[str]]:
    return words, frozenset(places)


def _constants(**arrays: np.ndarray) -> str:
    return "".join(f'# const "{name}" = {Literal(array)}\n' for name, array in arrays.items())


# a mean that stays, so that what came near is said
NORM = """
norm (float[4,4,4] x, float[4,4] z) => (float[4,4,4] y, other) {
    two = Constant <value = float {2.0}> ()
    eps = Constant <value = float {0.000001}> ()
    last = Constant <value_ints = [-1]> ()
    SQUARE
    mean = ReduceMean <keepdims = 1> (square, last)
    shifted = Add (mean, eps)
    root = Sqrt (shifted)
    TAIL
    other = ReduceMean (z, last)
}
"""
WEIGHT = _constants(w=np.linspace(0.5, 1.5, 4, dtype=np.float32))
WIDE = """
norm (float16[4,4,4] x, float[4,4] z) => (float16[4,4,4] y, other) {
    eps = Constant <value = float {0.000001}> ()
    last = Constant <value_ints = [-1]> ()
    wide = Cast <to = 1> (x)
    square = Mul (wide, wide)
    mean = ReduceMean <keepdims = 1> (square, last)
    shifted = Add (mean, eps)
    root = Sqrt (shifted)
    inverse = Reciprocal (root)
    normed = Mul (wide, inverse)
    narrow = Cast <to = 10> (normed)
    y = Mul (w, narrow)
    other = ReduceMean (z, last)
}
""" + _constants(w=np.linspace(0.5, 1.5, 4).astype(np.float16))


def norm(square: str, tail: str) -> str:
    return NORM.replace("SQUARE", square).replace("TAIL", tail) + WEIGHT


ROTARY = """
rope (float[B,4,S,4] x, int64[B,S] position_ids, float[2,4] z) => (float[B,4,S,4] y, other) {
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    half = Constant <value_ints = [2]> ()
    three = Constant <value_ints = [3]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    row = Unsqueeze (position_ids, one)
    column = Transpose <perm = [0, 2, 1]> (row)
    wide = Cast <to = 1> (column)
    angle = Mul (wide, freq)
    both = Concat <axis = -1> (angle, angle)
    c = Cos (both)
    s = Sin (both)
    cos = Unsqueeze (c, one)
    sin = Unsqueeze (s, one)
    low = Slice (x, zero, half, three)
    high = Slice (x, half, end, three)
    negative = Neg (high)
    rotated = Concat <axis = -1> (negative, low)
    straight = Mul (x, cos)
    turned = Mul (rotated, sin)
    y = Add (straight, turned)
    n = Neg (z)
    other = Concat <axis = 0> (n, n)
}
""" + _constants(freq=np.array([1.0, 0.3], np.float32))
ROTARY_OPERATOR = """
rope (float[B,4,S,4] x, int64[B,S] position_ids) => (float[B,4,S,4] y) {
    two = Constant <value_ints = [2]> ()
    column = Unsqueeze (position_ids, two)
    wide = Cast <to = 1> (column)
    angle = Mul (wide, freq)
    cos = Cos (angle)
    sin = Sin (angle)
    y = RotaryEmbedding <interleaved = 0> (x, cos, sin)
}
""" + _constants(freq=np.array([1.0, 0.3], np.float32))

ATTENTION = """
attention (float[2,4,4,4] q, float[2,HEADS,4,4] k, float[2,HEADS,4,4] v, float[2,1,4,4] mask, float[2,4] z)
        => (float[2,4,4,4] y, other) {
    scale = Constant <value = float {0.5}> ()
    two = Constant <value_ints = [2]> ()
    group = Constant <value_ints = [1, 1, 2, 1, 1]> ()
    heads = Constant <value_ints = [2, 4, 4, 4]> ()
    BODY
    other = Softmax (z)
}
"""
REPEAT = """
    NAMEu = Unsqueeze (NAME, two)
    NAMEe = Expand (NAMEu, group)
    NAMEr = Reshape (NAMEe, heads)
"""
EAGER = """
    t = Transpose <perm = [0, 1, 3, 2]> (K)
    product = MatMul (q, t)
    scaled = Mul (product, scale)
    masked = Add (scaled, mask)
    weights = Softmax <axis = -1> (masked)
    y = MatMul (weights, V)
"""
SDPA = "y = Attention <scale = 0.5, is_causal = 0> (q, kr, vr, mask)"


def attention(body: str, *, repeated: bool = False) -> str:
    key, value = ("kr", "vr") if repeated else ("k", "v")
    body = body.replace("(K)", f"({key})").replace(", V)", f", {value})")
    if repeated:
        body = REPEAT.replace("NAME", "k") + REPEAT.replace("NAME", "v") + body
    return ATTENTION.replace("HEADS", "2" if repeated else "4").replace("BODY", body)


FILLED = """
    half = Constant <value = float {0.5}> ()
    never = Constant <value = float {-1e9}> ()
    edge = Constant <value = float {0.0}> ()
    none = Constant <value = float {0.0}> ()
    hidden = Less (mask, edge)
    t = Transpose <perm = [0, 1, 3, 2]> (k)
    qs = Mul (q, half)
    ts = Mul (t, half)
    product = MatMul (qs, ts)
    masked = Where (hidden, never, product)
    weights = Softmax <axis = -1> (masked)
    isnan = IsNaN (weights)
    safe = Where (isnan, none, weights)
    y = MatMul (safe, v)
"""
# [seq, batch, heads, D] joined to [batch * heads, seq, D] for batched products, as ChatGLM2 has it
JOINED = """
attention (float[4,2,4,4] q, float[4,2,2,4] k, float[4,2,2,4] v, float[2,1,4,4] mask, float[2,4] z)
        => (float[2,4,4,4] y, other) {
    scale = Constant <value = float {2.0}> ()
    three = Constant <value_ints = [3]> ()
    group = Constant <value_ints = [1, 1, 1, 2, 1]> ()
    heads = Constant <value_ints = [4, 2, 4, 4]> ()
    flat = Constant <value_ints = [4, 8, 4]> ()
    apart = Constant <value_ints = [2, 4, 4, 4]> ()
    inner = Constant <value_ints = [8, 4, 4]> ()
    ku = Unsqueeze (k, three)
    ke = Expand (ku, group)
    kr = Reshape (ke, heads)
    vu = Unsqueeze (v, three)
    ve = Expand (vu, group)
    vr = Reshape (ve, heads)
    q3 = Reshape (q, flat)
    qt = Transpose <perm = [1, 0, 2]> (q3)
    k3 = Reshape (kr, flat)
    kt = Transpose <perm = [1, 2, 0]> (k3)
    product = MatMul (qt, kt)
    scaled = Div (product, scale)
    scores = Reshape (scaled, apart)
    masked = Add (scores, mask)
    weights = Softmax <axis = -1> (masked)
    w3 = Reshape (weights, inner)
    v3 = Reshape (vr, flat)
    vt = Transpose <perm = [1, 0, 2]> (v3)
    y3 = MatMul (w3, vt)
    y = Reshape (y3, apart)
    other = Softmax (z)
}
"""
# pairs of neighbouring channels, and a table of (cos, sin) in the layout [seq, batch]
PAIRS = """
rope (float[S,B,4,4] x, int64[B,S] position_ids) => (float[S,B,4,4] y) {
    last = Constant <value_ints = [-1]> ()
    first = Constant <value_int = 0> ()
    second = Constant <value_int = 1> ()
    in_pairs = Constant <value_ints = [0, 0, 4, 2, 2]> ()
    one_head = Constant <value_ints = [0, 0, 1, 2, 2]> ()
    joined = Constant <value_ints = [0, 0, 4, 4]> ()
    rows = Gather (cache, position_ids)
    steps = Transpose <perm = [1, 0, 2, 3]> (rows)
    wide = Reshape (steps, one_head)
    cos = Gather <axis = 4> (wide, first)
    sin = Gather <axis = 4> (wide, second)
    pairs = Reshape (x, in_pairs)
    even = Gather <axis = 4> (pairs, first)
    odd = Gather <axis = 4> (pairs, second)
    ec = Mul (even, cos)
    os = Mul (odd, sin)
    a = Sub (ec, os)
    oc = Mul (odd, cos)
    es = Mul (even, sin)
    b = Add (oc, es)
    au = Unsqueeze (a, last)
    bu = Unsqueeze (b, last)
    stack = Concat <axis = -1> (au, bu)
    y = Reshape (stack, joined)
}
"""
ANGLES = np.arange(16, dtype=np.float32)[:, None] * np.array([1.0, 0.3], np.float32)
PAIRS += _constants(cache=np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1))

PACKED = """
packed (float[2,4,4] x) => (float[2,4,4] y) {
    last = Constant <value_ints = [-1]> ()
    zero = Constant <value_ints = [0]> ()
    middle = Constant <value_ints = [4]> ()
    end = Constant <value_ints = [8]> ()
    wide = MatMul (x, w)
    packed = Add (wide, bias)
    PARTS
    turned = Tanh (left)
    y = Mul (turned, right)
}
""" + _constants(
    w=np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32), bias=np.linspace(-1, 1, 8, dtype=np.float32)
)
SLICED = "left = Slice (packed, zero, middle, last) right = Slice (packed, middle, end, last)"
# [KV head, (queries.., key), D]: 2 groups of 1 query and 1 key of 2 channels
GROUPED = """
    four = Constant <value_ints = [0, 0, 2, 2, 2]> ()
    flat = Constant <value_ints = [0, 0, 4]> ()
    first = Constant <value_int = 0> ()
    second = Constant <value_int = 1> ()
    heads = Reshape (packed, four)
    l = Gather <axis = 3> (heads, first)
    r = Gather <axis = 3> (heads, second)
    left = Reshape (l, flat)
    right = Reshape (r, flat)
"""
# every second channel exchanged, the table repeated for neighbours
STRIDED = """
rope (float[B,4,S,4] x, int64[B,S] position_ids, float[2,4] z) => (float[B,4,S,4] y, other) {
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    step = Constant <value_ints = [2]> ()
    three = Constant <value_ints = [3]> ()
    last = Constant <value_ints = [-1]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    full = Constant <value_ints = [0, 0, 4]> ()
    whole = Constant <value_ints = [0, 0, 0, 4]> ()
    row = Unsqueeze (position_ids, one)
    column = Transpose <perm = [0, 2, 1]> (row)
    wide = Cast <to = 1> (column)
    angle = Mul (wide, freq)
    pair = Unsqueeze (angle, three)
    twice = Concat <axis = -1> (pair, pair)
    both = Reshape (twice, full)
    c = Cos (both)
    s = Sin (both)
    cos = Unsqueeze (c, one)
    sin = Unsqueeze (s, one)
    even = Slice (x, zero, end, three, step)
    odd = Slice (x, one, end, three, step)
    negative = Neg (odd)
    first = Unsqueeze (negative, last)
    second = Unsqueeze (even, last)
    stack = Concat <axis = -1> (first, second)
    rotated = Reshape (stack, whole)
    straight = Mul (x, cos)
    turned = Mul (rotated, sin)
    y = Add (straight, turned)
    n = Neg (z)
    other = Concat <axis = 0> (n, n)
}
""" + _constants(freq=np.array([1.0, 0.3], np.float32))
LIMITS = "low = Constant <value = float {-0.4}> () high = Constant <value = float {0.4}> () "
CLAMPED = LIMITS + EAGER.replace("masked = Add (scaled", "limited = Clip (scaled, low, high) masked = Add (limited")
CAPPED = LIMITS + EAGER.replace(
    "masked = Add (scaled",
    "part = Div (scaled, high) bent = Tanh (part) capped = Mul (bent, high) masked = Add (capped",
)
LAYER = "layer = Constant <value = float {2.0}> ()" + EAGER.replace(
    "masked = Add (scaled", "multiplied = Mul (scaled, layer) masked = Add (multiplied"
)
RESIDUAL = """
block (float[2,4,4] x, float[2,4,4] r, float[4] w, float[2,4] z) => (float[2,4,4] y, float[2,4,4] next, other) {
    stream = Add (x, r)
    next = Neg (stream)
    y = RMSNormalization <axis = -1, epsilon = 0.001> (stream, w)
    other = RMSNormalization <axis = -1> (z, w)
}
"""
HEAD = """
head (float[2,4,4] x, float[4,4] z) => (float[2,4,4] y, other) {
    tiny = Constant <value = float {1e-12}> ()
    columns = Constant <value_ints = [1]> ()
    shape = Constant <value_ints = [4, 4]> ()
    length = ReduceL2 <keepdims = 1> (w, columns)
    floored = Clip (length, tiny)
    wide = Expand (floored, shape)
    rows = Div (w, wide)
    turned = Transpose <perm = [1, 0]> (rows)
    y = MatMul (x, turned)
    other = ReduceL2 (z, columns)
}
""" + _constants(w=np.linspace(-0.7, 1.5, 16, dtype=np.float32).reshape(4, 4))
HEADS = """
heads (float[4,4,4,4] x) => (float[4,4,4,4] y) {
    a, b, c, d = Split <axis = 1, num_outputs = 4> (x)
    na = LayerNormalization <epsilon = 1e-5> (a, wa)
    nb = LayerNormalization <epsilon = 1e-5> (b, wb)
    nc = LayerNormalization <epsilon = 1e-5> (c, wc)
    nd = LayerNormalization <epsilon = 1e-5> (d, wd)
    y = Concat <axis = 1> (na, nb, nc, nd)
}
""" + _constants(**{f"w{n}": np.linspace(0.5, 1.5 + i, 4, dtype=np.float32) for i, n in enumerate("abcd")})
CHANNELS = """
channels (float[4,4,4,4] x) => (float[4,4,1,4] y) {
    rows = Constant <value = int64[1,1] {-2}> ()
    front = Transpose <perm = [2, 0, 1, 3]> (x)
    picked = GatherND (front, rows)
    y = Transpose <perm = [1, 2, 0, 3]> (picked)
}
"""
GATED = "mlp (float[2,4,4] gate, float[2,4,4] up, float[2,4] z) => (float[2,4,4] y, other) {{ {} other = Sigmoid (z) }}"
SHORT = FuseRotary(positions=16)
CONSTANTS = (_of("a constant is broadcast", "eps", "two"),)
TABLES = (
    _of("cos: ", "row", "column", "wide", "angle", "both", "c", "cos", "freq", "position_ids", "one"),
    _of("sin: ", "row", "column", "wide", "angle", "both", "s", "sin", "freq", "position_ids", "one"),
    _of("the slices do not halve the last axis", "low", "high", "half", "zero", "end", "three"),
)
PAIRED = (
    _of("cos: ", "rows", "steps", "wide", "cos", "cache", "one_head", "position_ids", "even", "odd"),
    _of("sin: ", "rows", "steps", "wide", "sin", "cache", "one_head", "position_ids", "even", "odd"),
    _of("is not taken apart into pairs of channels", "pairs", "in_pairs", "joined", "y", "stack", "last", "au", "bu"),
    _of("is not taken apart into pairs of channels", "wide", "even", "odd"),
    # the products differ in one operand: with it changed, another assignment of the parts gets as far
    _of(" again", "ec", "os", "oc", "es", "a", "b"),
)
GROUPS = (
    _of(" heads", "ku", "ke", "kr", "vu", "ve", "vr", "group", "heads", "two", "three"),
    _of(" heads", "product", "masked", "y", "y3", "qt", "kt", "vt", "k3", "v3"),
    _of(
        "no [B,H,S,D] tensor is behind it",
        "ku",
        "ke",
        "kr",
        "vu",
        "ve",
        "vr",
        "group",
        "heads",
        "k3",
        "v3",
        "q3",
        "flat",
    ),
    _of("the scale is", "scale", "qs", "ts"),
)
BOUNDS = (
    _of("scores are clipped to", "low", "high"),
    _of("tanh of scores", "high", "part", "capped"),
    _of("found Tanh bent", "capped", "weights"),
)
SECONDS = (
    _of(
        "cos: ",
        "row",
        "column",
        "wide",
        "angle",
        "pair",
        "twice",
        "both",
        "c",
        "cos",
        "freq",
        "position_ids",
        "one",
        "full",
        "three",
        "last",
    ),
    _of(
        "sin: ",
        "row",
        "column",
        "wide",
        "angle",
        "pair",
        "twice",
        "both",
        "s",
        "sin",
        "freq",
        "position_ids",
        "one",
        "full",
        "three",
        "last",
    ),
    _of(
        "do not take every second channel",
        "even",
        "odd",
        "zero",
        "one",
        "step",
        "end",
        "three",
        "stack",
        "first",
        "second",
        "last",
        "whole",
    ),
    _of("are stacked along axis", "stack"),
    _of("x is broadcast", "whole", "rotated", "both"),
    # without the product that takes them up, the exchanged channels are read as pairs taken apart
    _of("found Neg negative, expected Sub", "turned"),
)
LENGTHS = (
    _of("the length is not of the rows", "columns", "length"),
    _of("something is broadcast", "wide", "shape", "tiny"),
)
PER_HEAD = (
    _of("the norms are of several kinds", "na", "nb", "nc", "nd"),
    _of("a norm has a bias", "na", "nb", "nc", "nd"),
    _of("not the parts of one Split", "a", "na", "nb", "nc", "nd", "y"),
    _of("is not [batch,1,seq,D] of one head", "a", "y"),
)
PARTS = (
    _of("its parts overlap", "left", "right", "l", "r", "first", "second", "zero", "middle", "end"),
    _of("reads all of it", "left", "right", "l", "r", "heads", "four", "last"),
    _of("is an output", "packed", "heads"),
)
BASES: dict[str, Base] = {
    "norm": Base(FuseRmsNorm(), norm("square = Pow (x, two)", "inverse = Reciprocal (root) normed = Mul (x, inverse) y = Mul (w, normed)"), CONSTANTS),
    "norm, divided": Base(FuseRmsNorm(), norm("square = Mul (x, x)", "normed = Div (x, root) y = Mul (w, normed)"), CONSTANTS),
    "norm, in fp16": Base(FuseRmsNorm(), WIDE, CONSTANTS),
    "norm, shifted": Base(FuseRmsNorm(), norm("square = Pow (x, two)", "one = Constant <value = float {1.0}> () scale = Add (w, one) inverse = Reciprocal (root) normed = Mul (x, inverse) y = Mul (normed, scale)"), CONSTANTS),
    "norm, heads": Base(FuseHeadNorms(), HEADS, PER_HEAD),
    "head": Base(FoldNormHead(), HEAD, LENGTHS, folds=True),
    "channels": Base(GatherChannels(), CHANNELS),
    "rotary": Base(SHORT, ROTARY, TABLES),
    "rotary, strided": Base(SHORT, STRIDED, SECONDS),
    "rotary, pairs": Base(SHORT, PAIRS, PAIRED),
    "rotary, operator": Base(SHORT, ROTARY_OPERATOR, TABLES),
    "attention": Base(FuseGqa(), attention(EAGER), GROUPS),
    "attention, filled": Base(FuseGqa(), attention(FILLED), GROUPS),
    "attention, clamped": Base(FuseGqa(), attention(CLAMPED), (*GROUPS, *BOUNDS)),
    "attention, times its layer": Base(FuseGqa(), attention(LAYER), (*GROUPS, _of("found Mul scaled", "weights"))),
    "attention, capped": Base(FuseGqa(), attention(CAPPED), (*GROUPS, *BOUNDS)),
    "attention, grouped": Base(FuseGqa(), attention(EAGER, repeated=True), GROUPS),
    "attention, joined": Base(FuseGqa(), JOINED, GROUPS),
    "attention, sdpa": Base(FuseGqa(), attention(SDPA, repeated=True), GROUPS),
    "residual": Base(FuseResidualNorm(), RESIDUAL),
    "gated": Base(FuseSwiglu(), GATED.format("s = Sigmoid (gate) a = Mul (gate, s) y = Mul (a, up)")),
    "gated, swish": Base(FuseSwiglu(), GATED.format("a = Swish (gate) y = Mul (a, up)")),
    "gated, gelu": Base(FuseSwiglu(), GATED.format("a = Gelu (gate) y = Mul (a, up)")),
    "packed": Base(SplitPackedLinear(), PACKED.replace("PARTS", SLICED), PARTS),
    "packed, groups": Base(SplitPackedLinear(), PACKED.replace("PARTS", GROUPED), PARTS),
}  # fmt: skip

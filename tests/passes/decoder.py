"""One decoder layer as text: what the passes after the recognizers work on."""

from __future__ import annotations

import numpy as np

from vacc_opt.ir import Graph, Literal
from vacc_opt.ir.text import from_text

HEADS, KV, WIDTH, HIDDEN, CHANNELS, VOCABULARY = 6, 2, 8, 16, 20, 40

# inputs, and a causal mask with padding as exporters write it
GROWING = """
layer (int64[batch,seq] input_ids, int64[batch,"past + seq"] attention_mask, int64[batch,seq] position_ids,
       float[batch,2,past,8] "past_key_values.0.key", float[batch,2,past,8] "past_key_values.0.value")
    => (float[batch,seq,40] logits, float[batch,2,"past + seq",8] "present.0.key", float[batch,2,"past + seq",8] "present.0.value") {"""
MASK = """
    zero = Constant <value_int = 0> ()
    unit = Constant <value_int = 1> ()
    i0 = Constant <value_ints = [0]> ()
    i1 = Constant <value_ints = [1]> ()
    i12 = Constant <value_ints = [1, 2]> ()
    i013 = Constant <value_ints = [0, 1, 3]> ()
    i012 = Constant <value_ints = [0, 1, 2]> ()
    hide = Constant <value = float {-3.4e38}> ()
    show = Constant <value = float {0.0}> ()
    all = Shape <start = 1> (attention_mask)
    new = Shape <start = 1> (input_ids)
    before = Sub (all, new)
    total = Squeeze (all)
    start = Squeeze (before)
    keys = Range (zero, total, unit)
    queries = Range (start, total, unit)
    column = Unsqueeze (queries, i013)
    row = Unsqueeze (keys, i012)
    future = Greater (row, column)
    kept = Unsqueeze (attention_mask, i12)
    padded = Equal (kept, zero)
    hidden = Or (future, padded)
    mask = Where (hidden, hide, show)"""
BODY = """
    to_heads = Constant <value_ints = [0, 0, -1, 8]> ()
    to_hidden = Constant <value_ints = [0, 0, -1]> ()
    h = Gather <axis = 0> (embed, input_ids)
    n = RMSNormalization <axis = -1, epsilon = 1e-6> (h, norm)
    qt = Transpose <perm = [1, 0]> (wq)
    kt = Transpose <perm = [1, 0]> (wk)
    vt = Transpose <perm = [1, 0]> (wv)
    ot = Transpose <perm = [1, 0]> (wo)
    gt = Transpose <perm = [1, 0]> (wg)
    ut = Transpose <perm = [1, 0]> (wu)
    dt = Transpose <perm = [1, 0]> (wd)
    lt = Transpose <perm = [1, 0]> (head)
    q0 = MatMul (n, qt)
    q1 = Add (q0, bq)
    q2 = Reshape (q1, to_heads)
    q3 = Transpose <perm = [0, 2, 1, 3]> (q2)
    q = RotaryEmbedding (q3, cos, sin, position_ids)
    k0 = MatMul (n, kt)
    k1 = Add (bk, k0)
    k2 = Reshape (k1, to_heads)
    k3 = Transpose <perm = [0, 2, 1, 3]> (k2)
    k4 = RotaryEmbedding (k3, cos, sin, position_ids)
    "present.0.key" = Concat <axis = 2> ("past_key_values.0.key", k4)
    v0 = MatMul (n, vt)
    v1 = Add (v0, bv)
    v2 = Reshape (v1, to_heads)
    v3 = Transpose <perm = [0, 2, 1, 3]> (v2)
    "present.0.value" = Concat <axis = 2> ("past_key_values.0.value", v3)
    a0 = Attention <scale = 0.25> (q, "present.0.key", "present.0.value", mask)
    a1 = Transpose <perm = [0, 2, 1, 3]> (a0)
    a2 = Reshape (a1, to_hidden)
    a3 = MatMul (a2, ot)
    a = Add (a3, bo)
    r = Add (h, a)
    g = MatMul (r, gt)
    u = MatMul (r, ut)
    s = Vastai.SwiGLU (g, u)
    d = MatMul (s, dt)
    e = Add (r, d)
    logits = MatMul (e, lt)
}
"""


def weights() -> dict[str, np.ndarray]:
    """Seeded weights by name, stored [N, K]."""
    rng = np.random.default_rng(0)
    shapes = {
        "embed": (VOCABULARY, HIDDEN), "norm": (HIDDEN,), "wq": (HEADS * WIDTH, HIDDEN), "wk": (KV * WIDTH, HIDDEN),
        "wv": (KV * WIDTH, HIDDEN), "wo": (HIDDEN, HEADS * WIDTH), "bq": (HEADS * WIDTH,), "bk": (KV * WIDTH,),
        "bv": (KV * WIDTH,), "bo": (HIDDEN,), "wg": (CHANNELS, HIDDEN), "wu": (CHANNELS, HIDDEN),
        "wd": (HIDDEN, CHANNELS), "head": (VOCABULARY, HIDDEN),
    }  # fmt: skip
    made = {n: (rng.standard_normal(s) * 0.3).astype(np.float32) for n, s in shapes.items()}
    angle = np.arange(256)[:, None] * 0.5 ** np.arange(WIDTH // 2)
    return {**made, "cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}


def decoder(*edits: tuple[str, str], **other: np.ndarray) -> Graph:
    """The layer, with replacements in its text and in its weights."""
    text = GROWING + MASK + BODY
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    consts = {**weights(), **other}
    return from_text(text + "".join(f'# const "{n}" = {Literal(w)}\n' for n, w in consts.items()))


def growing_feeds(ids: np.ndarray, keep: np.ndarray, past: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Feeds of one call of the growing interface; positions count what is kept."""
    seen = keep.shape[1] - ids.shape[1]
    positions = np.clip(np.cumsum(keep, 1) - 1, 0, None)[:, seen:]
    return {"input_ids": ids, "attention_mask": keep, "position_ids": positions, **past}


def empty_past(batch: int) -> dict[str, np.ndarray]:
    return {f"past_key_values.0.{what}": np.zeros((batch, KV, 0, WIDTH), np.float32) for what in ("key", "value")}


def reference_logits(graph: Graph, ids: np.ndarray) -> np.ndarray:
    """Logits of all tokens of whole rows, by the growing interface."""
    from vacc_opt.ir.evaluate import Executable

    feeds = growing_feeds(ids, np.ones_like(ids), empty_past(len(ids)))
    return Executable(graph).run(feeds)[0]["logits"]


def cached_logits(graph: Graph, ids: np.ndarray, chunk: int, context: int = 32) -> np.ndarray:
    """Logits of all tokens through fixed buffers full of garbage, ``chunk`` tokens a call, of rank 0 (or expanded)."""
    from vacc_opt.ir.evaluate import Executable

    run = Executable(graph)
    caches = []
    for _ in range(graph.ranks):
        buffers = [v for v in graph.inputs if v.name.startswith("past_key_values")]
        shapes = {v.name: [len(ids) if i == 0 else int(str(d)) for i, d in enumerate(v.shape or ())] for v in buffers}
        caches.append({v.name: np.full(shapes[v.name], 77, v.type.dtype.numpy) for v in buffers})
        assert all(shape[2] == context for shape in shapes.values())
    rows = []
    for start in range(0, ids.shape[1], chunk):
        part = ids[:, start : start + chunk]
        call = {"input_ids": part, "pos": np.full(len(ids), start), "valid": np.full(len(ids), part.shape[1])}
        outputs = run.run({k: v for k, v in call.items() if graph.input_named(k)}, caches)
        for cache, found in zip(caches, outputs, strict=True):
            cache.update({n.replace("present", "past_key_values"): v for n, v in found.items() if n != "logits"})
        rows.append(outputs[0]["logits"])
    return np.concatenate(rows, axis=1)

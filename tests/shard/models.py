"""One decoder layer of any head structure with fixed KV buffers, written as text: cheap enough for hundreds of cases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vacc_opt.ir import Graph
from vacc_opt.ir.copy import copy
from vacc_opt.ir.evaluate import Executable
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.instrument import PassRecord
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.testing import REASSOCIATED, assert_close
from vacc_opt.tests.families.harness import run_buffers

CONTEXT, STEPS = 32, 16
LAYOUTS = ("separate", "packed", "grouped")

_LAYER = """
layer (int64[batch,seq] input_ids, int64[batch] pos, int64[batch] valid,
       float[batch,{KV},32,{D}] "past_key_values.0.key", float[batch,{KV},32,{D}] "past_key_values.0.value")
    => (float[batch,1,{V}] logits, float[batch,{KV},32,{D}] "present.0.key", float[batch,{KV},32,{D}] "present.0.value") {{
    i1 = Constant <value_ints = [1]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    rows = Shape <start = 1, end = 2> (input_ids)
    count = Squeeze (rows)
    new = Range (zero, count, one)
    column = Unsqueeze (pos, i1)
    positions = Add (column, new)
    length = Add (pos, rows)
    to_queries = Constant <value_ints = [0, 0, {H}, {D}]> ()
    to_keys = Constant <value_ints = [0, 0, {KV}, {D}]> ()
    joined = Constant <value_ints = [0, 0, {HD}]> ()
    h = Gather <axis = 0> (embed, input_ids)
    n = RMSNormalization <axis = -1, epsilon = 1e-6> (h, norm)
{PROJECT}
    q3 = Transpose <perm = [0, 2, 1, 3]> (q2)
    k3 = Transpose <perm = [0, 2, 1, 3]> (k2)
    v3 = Transpose <perm = [0, 2, 1, 3]> (v2)
{ATTEND}
    a1 = Transpose <perm = [0, 2, 1, 3]> (a0)
    a2 = Reshape (a1, joined)
    ot = Transpose <perm = [1, 0]> (wo)
    a3 = MatMul (a2, ot)
{OUT}
    r = Add (h, a)
    gt = Transpose <perm = [1, 0]> (wg)
    ut = Transpose <perm = [1, 0]> (wu)
    dt = Transpose <perm = [1, 0]> (wd)
    g0 = MatMul (r, gt)
{UP}
    d0 = MatMul (s, dt)
{DOWN}
    e = Add (r, d)
    last = Sub (valid, one)
    index = Unsqueeze (last, i1)
    row = GatherND <batch_dims = 1> (e, index)
    kept = Unsqueeze (row, i1)
    lt = Transpose <perm = [1, 0]> ({HEAD})
    logits = MatMul (kept, lt)
}}
"""
_ROTARY = """
    q = RotaryEmbedding (q3, cos, sin, positions)
    k4 = RotaryEmbedding (k3, cos, sin, positions)
    "present.0.key" = TensorScatter <axis = 2> ("past_key_values.0.key", k4, pos)
    "present.0.value" = TensorScatter <axis = 2> ("past_key_values.0.value", v3, pos)
    a0 = Attention <is_causal = 1, scale = 0.3> (q, "present.0.key", "present.0.value", "", "", "", length)"""
_ALIBI = """
    "present.0.key" = TensorScatter <axis = 2> ("past_key_values.0.key", k3, pos)
    "present.0.value" = TensorScatter <axis = 2> ("past_key_values.0.value", v3, pos)
    a0 = Vastai.Attention <is_causal = 1, scale = 0.3> (q3, "present.0.key", "present.0.value", "", length, slopes)"""


@dataclass(frozen=True)
class Layer:
    """What a layer looks like; ``gate`` is that of the feed-forward, ``bias`` every linear has.

    ``parallel``: attention and feed-forward read the same norm and are added side by side. ``normed``: queries and keys
    have a norm, with a weight of its own for each head.
    """

    heads: int
    kv: int
    width: int = 4
    hidden: int = 12
    channels: int = 20
    vocabulary: int = 40
    layout: str = "separate"
    bias: bool = False
    gate: bool = True
    tied: bool = False
    alibi: bool = False
    parallel: bool = False
    normed: bool = False

    def graph(self) -> Graph:
        """The layer, its weights seeded; packed projections are taken apart, as a pipeline does it."""
        shapes = self._shapes()
        if self.alibi:
            del shapes["cos"], shapes["sin"]
        else:
            del shapes["slopes"]
        weights = "".join(f"# const \"{n}\" = Seeded('{n}', 'float', {s})\n" for n, s in shapes.items())
        graph = from_text(self._text() + weights)
        run_pipeline(graph, f"simplify,split-packed-linear{{expect={0 if self.layout == 'separate' else 1}}}")
        return graph

    def _text(self) -> str:
        def biased(name: str, x: str, bias: str) -> str:
            return f"    {name} = {f'Add ({x}, {bias})' if self.bias else f'Identity ({x})'}"

        if self.gate:
            up = "\n".join((biased("g", "g0", "bg"), "    u0 = MatMul (r, ut)", biased("u", "u0", "bu"), "    s = Vastai.SwiGLU (g, u)"))  # fmt: skip
        else:
            up = "\n".join((biased("g", "g0", "bg"), "    s = Gelu (g)"))
        text = _LAYER.format(
            KV=self.kv, D=self.width, H=self.heads, V=self.vocabulary, HD=self.heads * self.width,
            PROJECT=self._project(), ATTEND=_ALIBI if self.alibi else _ROTARY, OUT=biased("a", "a3", "bo"),
            UP=up, DOWN=biased("d", "d0", "bd"), HEAD="embed" if self.tied else "head",
        )  # fmt: skip
        if self.parallel:
            text = text.replace("MatMul (r, ", "MatMul (n, ")
        for one in "qk" if self.normed else "":
            turned = f"{one}3 = Transpose <perm = [0, 2, 1, 3]> ({one}2)"
            text = text.replace(
                turned,
                f"{turned.replace(f'{one}3', f'{one}5')}\n"
                f"    {one}6 = LayerNormalization <axis = -1, epsilon = 1e-5> ({one}5, unit)\n"
                f"    {one}3 = Mul ({one}6, {one}_heads)",
            )
        return text if self.gate else text.replace("    ut = Transpose <perm = [1, 0]> (wu)\n", "")

    def _project(self) -> str:
        if self.layout == "separate":
            lines = []
            for one, shape in (("q", "to_queries"), ("k", "to_keys"), ("v", "to_keys")):
                lines += [f"{one}t = Transpose <perm = [1, 0]> (w{one})", f"{one}0 = MatMul (n, {one}t)"]
                lines.append(f"{one}1 = Add ({one}0, b{one})" if self.bias else f"{one}1 = Identity ({one}0)")
                lines.append(f"{one}2 = Reshape ({one}1, {shape})")
            return "\n".join(f"    {line}" for line in lines)
        lines = ["pt = Transpose <perm = [1, 0]> (qkv)", "p0 = MatMul (n, pt)"]
        lines.append("p1 = Add (p0, qkv_bias)" if self.bias else "p1 = Identity (p0)")
        if self.layout == "packed":
            q, k = self.heads * self.width, self.kv * self.width
            lines += [f"parts = Constant <value_ints = [{q}, {k}, {k}]> ()", "q1, k1, v1 = Split <axis = -1> (p1, parts)"]  # fmt: skip
        else:
            group = self.heads // self.kv
            lines += [
                f"groups = Constant <value_ints = [0, 0, {self.kv}, {group + 2}, {self.width}]> ()",
                "p2 = Reshape (p1, groups)",
                f"parts = Constant <value_ints = [{group}, 1, 1]> ()",
                "q1, k1, v1 = Split <axis = 3> (p2, parts)",
            ]
        lines += ["q2 = Reshape (q1, to_queries)", "k2 = Reshape (k1, to_keys)", "v2 = Reshape (v1, to_keys)"]
        return "\n".join(f"    {line}" for line in lines)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, q, kv = self.hidden, self.heads * self.width, self.kv * self.width
        shapes: dict[str, tuple[int, ...]] = {
            "embed": (self.vocabulary, hidden), "norm": (hidden,), "wo": (hidden, q), "wg": (self.channels, hidden),
            "wd": (hidden, self.channels), "slopes": (self.heads,), "cos": (64, self.width // 2), "sin": (64, self.width // 2),
        }  # fmt: skip
        if self.gate:
            shapes["wu"] = (self.channels, hidden)
        if self.normed:
            heads = {"q_heads": (self.heads, 1, self.width), "k_heads": (self.kv, 1, self.width)}
            shapes |= {"unit": (self.width,), **heads}
        if not self.tied:
            shapes["head"] = (self.vocabulary, hidden)
        if self.layout == "separate":
            shapes |= {"wq": (q, hidden), "wk": (kv, hidden), "wv": (kv, hidden)}
        else:
            shapes["qkv"] = (q + 2 * kv, hidden)
        if self.bias:
            shapes |= {"bo": (hidden,), "bd": (hidden,), "bg": (self.channels,)}
            shapes |= {"bu": (self.channels,)} if self.gate else {}
            shapes |= {"bq": (q,), "bk": (kv,), "bv": (kv,)} if self.layout == "separate" else {"qkv_bias": (q + 2 * kv,)}  # fmt: skip
        return shapes


def assert_ranks_agree(layer: Layer, tp: int, steps: int = STEPS) -> tuple[Graph, PassRecord]:
    """The ranks compute what one rank computes: a ragged prefill of two rows, then ``steps`` tokens, on onnxruntime.

    All ranks run as one graph (``expand-ranks``).
    """
    whole = layer.graph()
    split = copy(whole)
    record = run_pipeline(split, f"split-tp{{tp={tp}}}").records[0]
    assert split.ranks == tp
    together = copy(split)
    run_pipeline(together, "expand-ranks")
    for step, (have, want) in enumerate(zip(logits(together, steps), logits(whole, steps), strict=True)):
        assert_close(have, want, REASSOCIATED, f"{layer} tp {tp} step {step}")
    return split, record


def logits(graph: Graph, steps: int) -> list[npt.NDArray[np.float32]]:
    """Logits [2, vocabulary] after the prefill and after each step."""
    rng = np.random.default_rng(2)
    size = graph.outputs["logits"].shape
    assert size is not None
    most = int(str(size[-1]))
    ids, more = rng.integers(0, most, (2, 7)), rng.integers(0, most, (2, steps))
    return list(run_buffers(Executable(graph), ids, np.array([7, 4]), more))

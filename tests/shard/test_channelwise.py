"""What split-tp walks through between linears: anything that acts on each channel, or on each head, alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vacc_opt.ir import Graph, PerRank
from vacc_opt.passes.infra.testing import REASSOCIATED, assert_close, run_pass
from vacc_opt.passes.legalize.kv_cache import KvCache
from vacc_opt.passes.shard.heads import plan_heads
from vacc_opt.passes.shard.split_tp import SplitTp
from vacc_opt.tests.passes.decoder import cached_logits, decoder

IDS = np.random.default_rng(5).integers(0, 40, (2, 9))
GATED = "s = Vastai.SwiGLU (g, u)"


def cached(*edits: tuple[str, str], **other: Any) -> Graph:
    graph = decoder(*edits, **other)
    run_pass(KvCache(context=32), graph)
    return graph


FORWARD = [
    ("a written out SiLU", "sg = Sigmoid (g) sw = Mul (g, sg) s = Mul (sw, u)"),
    ("a squared ReLU", "rg = Relu (g) r2 = Mul (rg, rg) s = Mul (r2, u)"),
    ("a factor for each channel", "gf = Mul (g, factors) s = Vastai.SwiGLU (gf, u)"),
    ("a GELU by its error function", "g1 = Div (g, root2) ge = Erf (g1) gs = Add (ge, unit1) gg = Mul (g, gs) s = Mul (gg, u)"),
    ("a power of a ReLU", "rg = Relu (g) rp = Pow (rg, root2) s = Mul (rp, u)"),
    ("a bounded gate", "gb = Clip (g, low, root2) s = Vastai.SwiGLU (gb, u)"),
]  # fmt: skip


@pytest.mark.parametrize("text", [f[1] for f in FORWARD], ids=[f[0] for f in FORWARD])
@pytest.mark.parametrize("tp", [2, 6])
def test_what_acts_on_each_channel_alone_stands_between_the_slices(text: str, tp: int) -> None:
    more = {
        "factors": np.linspace(0.5, 1.5, 20, dtype=np.float32),
        "root2": np.array(1.5, np.float32),
        "low": np.array(-1, np.float32),
        "unit1": np.ones(1, np.float32),
    }
    used = {name: array for name, array in more.items() if f"{name})" in text or f"{name}," in text}
    whole, split = cached((GATED, text), **used), cached((GATED, text), **used)
    run_pass(SplitTp(tp=tp), split)
    assert isinstance(split.values["wg"].const, PerRank)
    assert_close(cached_logits(split, IDS, 3), cached_logits(whole, IDS, 3), REASSOCIATED)


KEPT = [
    ("a norm inside", "t = Tanh (u) s = RMSNormalization <axis = -1> (t, twenty)", {"twenty": np.ones(20, np.float32)}),
    ("no activation", "s = Add (g, u)", {}),
    ("another reader", "t = Tanh (u) m = ReduceMean <keepdims = 1> (t) s = Mul (t, m)", {}),
    ("a power that is infinite at zero", "t = Tanh (g) ta = Abs (t) tp = Pow (ta, eighth) s = Mul (tp, u)",
     {"eighth": np.array(-0.125, np.float32)}),
    ("a division by a channel's number", "t = Tanh (u) e1 = Exp (g) s = Div (t, e1)", {}),
]  # fmt: skip


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize(("text", "more"), [k[1:] for k in KEPT], ids=[k[0] for k in KEPT])
def test_a_feed_forward_that_is_not_recognized_is_computed_by_every_rank(
    text: str, more: dict[str, Any], tp: int
) -> None:
    whole, split = cached((GATED, text), **more), cached((GATED, text), **more)
    record = run_pass(SplitTp(tp=tp), split)
    assert "0 feed-forward blocks split by channels" in [r.message for r in record.remarks]
    assert not isinstance(split.values["wd"].const, PerRank)
    assert_close(cached_logits(split, IDS, 3), cached_logits(whole, IDS, 3), REASSOCIATED)


def test_weights_of_heads_on_another_axis_are_split_along_it() -> None:
    """[batch, seq, heads, D] times [1, heads, D], before the heads are turned to the front."""
    edit = (
        "q3 = Transpose <perm = [0, 2, 1, 3]> (q2)",
        "qn = Mul (q2, each) q3 = Transpose <perm = [0, 2, 1, 3]> (qn)",
    )
    each = np.random.default_rng(1).random((1, 6, 8)).astype(np.float32)
    whole, split = cached(edit, each=each), cached(edit, each=each)
    run_pass(SplitTp(tp=3), split)
    const = split.values["each"].const
    assert isinstance(const, PerRank)
    assert const.parts[0].shape == (1, plan_heads(6, 2, 3).query_per_rank, 8)
    assert_close(cached_logits(split, IDS, 3), cached_logits(whole, IDS, 3), REASSOCIATED)

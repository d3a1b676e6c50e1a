"""split-tp: any number of ranks computes what one rank computes; head plans are complete, grouped and cheapest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vacc_opt.ir import CheckError, Graph, Literal, PerRank, UserError, VaccError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.ir.provenance import Origin, Provenance
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import verify, verify_origins
from vacc_opt.passes.infra.model.slices import even_shares, take_columns, take_rows
from vacc_opt.passes.infra.testing import REASSOCIATED, assert_close, run_pass
from vacc_opt.passes.legalize.kv_cache import KvCache
from vacc_opt.passes.quantize.w8a16 import W8A16
from vacc_opt.passes.shard.heads import PAD, HeadPlan, head_rows, plan_heads
from vacc_opt.passes.shard.split_tp import SplitTp
from vacc_opt.tests.passes.decoder import HIDDEN, VOCABULARY, cached_logits, decoder

IDS = np.random.default_rng(5).integers(0, 40, (2, 9))


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, int]:
    kv, group = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    return kv * group, kv, draw(st.integers(1, min(kv * group, 24)))


@given(problems())
def test_every_query_head_is_on_exactly_one_rank(problem: tuple[int, int, int]) -> None:
    query, kv, tp = problem
    plan = plan_heads(query, kv, tp)
    assert sorted(h for rank in plan.query for h in rank if h != PAD) == list(range(query))


@given(problems())
def test_every_query_head_is_next_to_its_kv_head(problem: tuple[int, int, int]) -> None:
    query, kv, tp = problem
    plan = plan_heads(query, kv, tp)
    group = plan.query_per_rank // plan.kv_per_rank
    assert group * plan.kv_per_rank == plan.query_per_rank
    for queries, kvs in zip(plan.query, plan.kv, strict=True):
        for place, head in enumerate(queries):
            if head != PAD:
                assert kvs[place // group] == head // (query // kv)


@given(problems())
def test_all_ranks_hold_equally_many_heads(problem: tuple[int, int, int]) -> None:
    plan = plan_heads(*problem)
    assert len(plan.query) == len(plan.kv) == problem[2]
    assert {len(r) for r in plan.query} == {plan.query_per_rank}
    assert {len(r) for r in plan.kv} == {plan.kv_per_rank}


@given(problems())
def test_no_way_of_sharing_groups_evenly_is_cheaper(problem: tuple[int, int, int]) -> None:
    query, kv, tp = problem
    size, cost = query // kv, plan_heads(*problem).cost()
    for split in (s for s in range(1, tp + 1) if tp % s == 0):
        groups = -(-kv // (tp // split))
        assert cost <= groups * (2 * -(-size // split) + 4)


@given(problems())
def test_heads_that_divide_are_not_padded(problem: tuple[int, int, int]) -> None:
    query, kv, tp = problem
    if kv % tp == 0:
        plan = plan_heads(query, kv, tp)
        assert (plan.query_per_rank, plan.kv_per_rank) == (query // tp, kv // tp)


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        ((9, 3, 3), "3 query + 1 KV heads a rank"),
        ((28, 4, 8), "4 query + 1 KV heads a rank (4 query heads of padding, KV heads held 8 times instead of 4)"),
        ((32, 2, 2), "16 query + 1 KV heads a rank"),
        ((6, 2, 5), "2 query + 1 KV heads a rank (4 query heads of padding, KV heads held 5 times instead of 2)"),
    ],
)
def test_a_plan_says_what_it_pads_and_replicates(problem: tuple[int, int, int], text: str) -> None:
    assert str(plan_heads(*problem)) == text


def test_more_ranks_than_heads_are_refused_with_the_largest_tp() -> None:
    with pytest.raises(UserError, match="tp = 16, but the model has 9 query heads\n  the largest tp is 9"):
        plan_heads(9, 3, 16)
    graph = decoder()
    before = to_text(graph)
    with pytest.raises(UserError, match="split-tp: tp = 16, but the model has 6 query heads\n  the largest tp is 6"):
        run_pass(SplitTp(tp=16), graph)
    assert to_text(graph) == before


def test_a_padded_head_is_rows_of_zeros() -> None:
    weight = np.arange(12, dtype=np.float32).reshape(6, 2) + 1
    rows = head_rows((1, PAD), 2)
    assert rows == (2, 3, PAD, PAD)
    np.testing.assert_array_equal(take_rows(Literal(weight), rows).read(), [*weight[2:4], [0, 0], [0, 0]])
    np.testing.assert_array_equal(
        take_columns(Literal(weight), (1, PAD)).read(), np.stack([weight[:, 1], np.zeros(6)], 1)
    )


@given(st.integers(1, 100), st.integers(1, 9), st.sampled_from([1, 16]))
def test_shares_are_equal_and_cover_every_row_once(size: int, tp: int, multiple: int) -> None:
    shares = even_shares(size, tp, multiple)
    assert len({len(s) for s in shares}) == 1
    assert len(shares[0]) % multiple == 0
    assert [i for s in shares for i in s if i >= 0] == list(range(size))


def cached(*edits: tuple[str, str], **other: np.ndarray) -> Graph:
    graph = decoder(*edits, **other)
    run_pass(KvCache(context=32), graph)
    return graph


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5, 6])
def test_the_ranks_compute_what_one_rank_computes(tp: int) -> None:
    """Projections have biases, so does the output projection, whose bias must count once."""
    expected = cached_logits(cached(), IDS, 3)
    graph = cached()
    run_pass(SplitTp(tp=tp), graph)
    verify(graph)
    assert graph.ranks == tp
    assert_close(cached_logits(graph, IDS, 3), expected, REASSOCIATED)


@pytest.mark.parametrize("tp", [2, 5])
def test_scales_are_split_with_their_rows(tp: int) -> None:
    whole = cached()
    run_pass(W8A16(lm_head=True), whole)
    expected = cached_logits(whole, IDS, 3)
    run_pass(SplitTp(tp=tp), whole)
    assert_close(cached_logits(whole, IDS, 3), expected, REASSOCIATED)


def test_tied_embeddings_are_split_once() -> None:
    edit = ("lt = Transpose <perm = [1, 0]> (head)", "lt = Transpose <perm = [1, 0]> (embed)")
    expected = cached_logits(cached(edit), IDS, 3)
    graph = cached(edit)
    run_pass(SplitTp(tp=3), graph)
    assert_close(cached_logits(graph, IDS, 3), expected, REASSOCIATED)


def test_an_embedding_that_is_read_twice_is_split_once() -> None:
    edit = ("h = Gather <axis = 0> (embed, input_ids)",
            "h1 = Gather <axis = 0> (embed, input_ids) i2 = Abs (input_ids) h2 = Gather <axis = 0> (embed, i2) h = Add (h1, h2)")  # fmt: skip
    expected = cached_logits(cached(edit), IDS, 3)
    graph = cached(edit)
    run_pass(SplitTp(tp=3), graph)
    assert_close(cached_logits(graph, IDS, 3), expected, REASSOCIATED)


def test_a_table_that_others_read_too_is_kept_whole() -> None:
    edits = (
        ("n = RMSNormalization", "extra = ReduceMax (embed) n0 = Mul (h, extra) n = RMSNormalization"),
        ("(h, norm)", "(n0, norm)"),
    )
    whole, split = cached(*edits), cached(*edits)
    run_pass(SplitTp(tp=2), split)
    assert not split.by_op("EmbeddingShard", "Vastai")
    assert_close(cached_logits(split, IDS, 3), cached_logits(whole, IDS, 3), REASSOCIATED)


TABLES = [
    ("ids of 32 bits", "narrow = Cast <to = 6> (input_ids) h = Gather <axis = 0> (embed, narrow)", {}),
    ("a table of flags", "h0 = Gather <axis = 0> (embed, input_ids) f = Gather <axis = 0> (flags, input_ids) f1 = Cast <to = 1> (f) h = Mul (h0, f1)",
     {"flags": np.random.default_rng(3).random((VOCABULARY, HIDDEN)) > 0.3}),
    ("a row from the end", "h0 = Gather <axis = 0> (embed, input_ids) end = Constant <value_ints = [-1]> () f = Gather <axis = 0> (places, end) h = Add (h0, f)",
     {"places": np.random.default_rng(3).random((9, HIDDEN), np.float32)}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "more"), [t[1:] for t in TABLES], ids=[t[0] for t in TABLES])
def test_an_embedding_is_split_and_other_tables_are_kept(text: str, more: dict[str, np.ndarray]) -> None:
    edit = ("h = Gather <axis = 0> (embed, input_ids)", text)
    whole, split = cached(edit, **more), cached(edit, **more)
    run_pass(SplitTp(tp=2), split)
    (shard,) = split.by_op("EmbeddingShard", "Vastai")
    assert shard.inputs[0] is split.values["embed"]
    assert_close(cached_logits(split, IDS, 3), cached_logits(whole, IDS, 3), REASSOCIATED)


BLOCK = """
g (float[B,S,16] x) => (float[B,S,16] y) {{
    split = Constant <value_ints = [0, 0, -1, 4]> ()
    split_values = Constant <value_ints = [0, 0, 4, {width}]> ()
    join = Constant <value_ints = [0, 0, {joined}]> ()
    q0 = MatMul (x, wq) q1 = Reshape (q0, split) q = Transpose <perm = [0, 2, 1, 3]> (q1)
    k0 = MatMul (x, wk) k1 = Reshape (k0, split) k = Transpose <perm = [0, 2, 1, 3]> (k1)
    v0 = MatMul (x, wv) v1 = Add (v0, bv) v2 = Reshape (v1, split_values) v = Transpose <perm = [0, 2, 1, 3]> (v2)
    {attend}
    a1 = Transpose <perm = [0, 2, 1, 3]> (a0) a2 = Reshape (a1, join) y = MatMul (a2, wo)
}}
"""


def block(width: int, attend: str = "a0 = Attention (q, k, v)") -> Graph:
    """4 heads whose values have ``width`` channels, queries and keys 4."""
    shapes = {"wq": (16, 16), "wk": (16, 16), "wv": (16, 4 * width), "bv": (4 * width,), "wo": (4 * width, 16)}
    weights = "".join(f"# const \"{n}\" = Seeded('{n}', 'float', {shape})\n" for n, shape in shapes.items())
    return from_text(BLOCK.format(width=width, joined=4 * width, attend=attend) + weights)


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("width", [2, 8])
def test_heads_of_values_may_have_another_width(width: int, tp: int) -> None:
    whole, split = block(width), block(width)
    run_pass(SplitTp(tp=tp), split)
    assert split.values["bv"].shape == (-(-4 // tp) * width,)
    x = {"x": np.random.default_rng(4).standard_normal((2, 5, 16)).astype(np.float32)}
    (expected,) = Executable(whole).run(x)
    for outputs in Executable(split).run(x):
        assert_close(outputs["y"], expected["y"], REASSOCIATED)


@pytest.mark.parametrize(
    "attend",
    [
        "both = Concat <axis = -1> (q, k) a0 = Attention (both, both, v)",  # channels of two projections, one not rotated
        "both = Concat <axis = 2> (k, q) both_values = Concat <axis = 2> (v, v) a0 = Attention (q, both, both_values)",
    ],
)
def test_a_concat_that_writes_no_cache_is_refused(attend: str) -> None:
    graph = block(4, attend)
    with pytest.raises(CheckError, match="no linear layer is found upstream of an attention: stopped at both"):
        run_pass(SplitTp(tp=2), graph)


def test_a_layer_has_two_all_reduces_and_the_vocabulary_two_collectives() -> None:
    graph = cached()
    record = run_pass(SplitTp(tp=2), graph)
    assert len(graph.by_op("AllReduce", "Vastai")) == 3
    assert len(graph.by_op("AllGather", "Vastai")) == 1
    assert record.summary == "tp 2: 3 query + 1 KV heads a rank, 3 all-reduces"
    assert all(isinstance(graph.values[n].const, PerRank) for n in ("wq", "wk", "wv", "wo", "bq", "wg", "wd", "head"))
    assert not isinstance(graph.values["bo"].const, PerRank)
    assert str(graph.values["past_key_values.0.key"].type) == "float[batch,1,32,8]"


REFUSED = [
    ("a norm over all heads", [("q2 = Reshape (q1, to_heads)", "qn = RMSNormalization <axis = -1> (q1, bq) q2 = Reshape (qn, to_heads)")],
     "no linear layer is found upstream of an attention: stopped at qn"),
    ("heads behind their channels", [("q2 = Reshape (q1, to_heads)", "to_channels = Constant <value_ints = [0, 0, -1, 6]> () q2 = Reshape (q1, to_channels)"),
     ("q3 = Transpose <perm = [0, 2, 1, 3]> (q2)", "q3 = Transpose <perm = [0, 3, 1, 2]> (q2)")], "q2 joins float.*, whose heads are axis 3 and channels axis 2"),
    ("heads joined behind their channels", [("a1 = Transpose <perm = [0, 2, 1, 3]> (a0)", "a1 = Transpose <perm = [0, 2, 3, 1]> (a0)")],
     "a2 joins float.*, whose heads are axis 3 and channels axis 2"),
    ("heads cut out of tokens", [("q2 = Reshape (q1, to_heads)", "to_rows = Constant <value_ints = [0, 6, -1, 8]> () q3 = Reshape (q1, to_rows)"), ("q3 = Transpose <perm = [0, 2, 1, 3]> (q2)", "")],
     "q3 joins float.*, whose heads are axis 1 and channels axis 3"),
    ("channels turned before the heads", [("q2 = Reshape (q1, to_heads)", "to_channels = Constant <value_ints = [0, 0, 8, 6]> () qa = Reshape (q1, to_channels) qb = Transpose <perm = [0, 1, 3, 2]> (qa) qc = Reshape (qb, to_hidden) q2 = Reshape (qc, to_heads)")],
     "qb turns heads and channels that are one axis"),
    ("a rotation of all heads in one", [("q1 = Add (q0, bq)", "qa = Add (q0, bq) q1 = RotaryEmbedding <num_heads = 6> (qa, cos, sin, position_ids)")],
     "no linear layer is found upstream of an attention: stopped at q1"),
    ("a bias of another shape", [("q1 = Add (q0, bq)", "q1 = Add (q0, one1)")], "stopped at q1"),
    ("a gate with an extra operation", [("s = Vastai.SwiGLU (g, u)", "g2 = Softmax (g) s = Vastai.SwiGLU (g2, u)")], "is not fed by two linear layers"),
    ("an output that two layers read", [("a = Add (a3, bo)", "a4 = MatMul (a2, ot2) a5 = Add (a3, a4) a = Add (a5, bo)"),
     ("ot = Transpose", "ot2 = Transpose (wo) ot = Transpose")], "a2 has 2 users; one output projection is expected"),
    ("another reader of the queries", [("a0 = Attention", "extra = Neg (q) a0 = Attention")], "extra.* reads 'q', of which every rank would hold a part"),
    ("another reader of the gate", [("s = Vastai.SwiGLU", "extra = Tanh (g) s = Vastai.SwiGLU")], "extra.* reads 'g', of which every rank would hold a part"),
    ("scores as an output", [("=> (float[batch,seq,40] logits,", "=> (float[batch,seq,40] logits, q,")], "'q' is an output, and every rank would hold a part of it"),
    ("another reader of a weight", [("n = RMSNormalization", "extra = ReduceSum (wg) n = RMSNormalization")], "extra.* reads 'wg' too, of which every rank would hold a part"),
    ("a bias of two roles", [("a = Add (a3, bo)", "z = ReduceMax (bq) a = Add (a3, bo)")], "z.* reads 'bq' too, of which every rank would hold a part"),
    ("a weight as an output", [("=> (float[batch,seq,40] logits,", "=> (float[batch,seq,40] logits, wg,")], "'wg' is an output, and every rank would hold a part of it"),
    ("a computed number of heads", [("q2 = Reshape (q1, to_heads)", "rows = Shape <end = 2> (q1) six = Constant <value_ints = [6, 8]> () target = Concat <axis = 0> (rows, six) q2 = Reshape (q1, target)")],
     "q2.* does not say how many heads it makes\n  run simplify before split-tp"),
    ("a weight of two roles", [("gt = Transpose <perm = [1, 0]> (wg)", "gt = Transpose <perm = [1, 0]> (wq2)"), ("dt = Transpose <perm = [1, 0]> (wd)", "dt = Transpose <perm = [1, 0]> (wq2)"),
     ("ut = Transpose <perm = [1, 0]> (wu)", "ut = Transpose <perm = [1, 0]> (wq2)")], "wq2 is shared by layers that split it differently"),
]  # fmt: skip


@pytest.mark.parametrize(("edits", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_cannot_be_split_is_refused_and_the_graph_kept(edits: list[tuple[str, str]], message: str) -> None:
    graph = cached(*edits, one1=np.ones(1, np.float32), wq2=np.ones((16, 16), np.float32))
    before = to_text(graph)
    with pytest.raises(VaccError, match=f"split-tp: .*{message}"):
        run_pass(SplitTp(tp=2), graph)
    assert to_text(graph) == before


def test_a_literal_number_of_heads_is_that_of_a_rank() -> None:
    edits = (
        ("to_heads = Constant <value_ints = [0, 0, -1, 8]> ()", "to_heads = Constant <value_ints = [0, 0, 6, 8]> () to_groups = Constant <value_ints = [0, 0, 2, 8]> ()"),
        ("to_hidden = Constant <value_ints = [0, 0, -1]>", "to_hidden = Constant <value_ints = [0, 0, 48]>"),
        ("Reshape (k1, to_heads)", "Reshape (k1, to_groups)"), ("Reshape (v1, to_heads)", "Reshape (v1, to_groups)"),
    )  # fmt: skip
    whole, split = cached(*edits), cached(*edits)
    run_pass(SplitTp(tp=2), split)
    assert_close(cached_logits(split, IDS, 3), cached_logits(whole, IDS, 3), REASSOCIATED)


def test_a_number_of_heads_beside_a_free_size_is_that_of_a_rank() -> None:
    """[0, -1, heads, D]: here -1 is the sequence, and must stay it."""
    edits = (
        ("to_heads = Constant <value_ints = [0, 0, -1, 8]> ()", "to_heads = Constant <value_ints = [0, -1, 6, 8]> () to_groups = Constant <value_ints = [0, -1, 2, 8]> ()"),
        ("to_hidden = Constant <value_ints = [0, 0, -1]>", "to_hidden = Constant <value_ints = [0, -1, 48]>"),
        ("Reshape (k1, to_heads)", "Reshape (k1, to_groups)"), ("Reshape (v1, to_heads)", "Reshape (v1, to_groups)"),
    )  # fmt: skip
    whole, split = cached(*edits), cached(*edits)
    for one in (*split.nodes(), *split.constants()):
        one.provenance = Provenance((Origin("layer", "m.py:1", "aten"),))
    run_pass(SplitTp(tp=2), split)
    verify_origins(split)
    assert_close(cached_logits(split, IDS, 3), cached_logits(whole, IDS, 3), REASSOCIATED)


def test_a_mask_with_one_plane_a_head_is_refused() -> None:
    slopes = np.ones((1, 6, 1, 1), np.float32)
    graph = decoder(
        ("Attention <scale = 0.25> (q, ", "Attention <scale = 0.25> (q, "),
        ("mask = Where (hidden, hide, show)", "m1 = Where (hidden, hide, show) mask = Mul (m1, slopes)"),
        slopes=slopes,
    )
    with pytest.raises(CheckError, match="one a head, which is not split"):
        run_pass(SplitTp(tp=2), graph)


@pytest.mark.parametrize(
    ("tp", "ranks", "message"),
    [(0, 1, "tp = 0, at least 1 rank is needed"), (2, 2, "the graph is split over 2 ranks already")],
)
def test_impossible_requests_are_refused(tp: int, ranks: int, message: str) -> None:
    graph = decoder()
    graph.ranks = ranks
    with pytest.raises(VaccError, match=message):
        run_pass(SplitTp(tp=tp), graph)


def test_a_graph_without_attention_is_refused() -> None:
    with pytest.raises(CheckError, match="run fuse-gqa before split-tp"):
        run_pass(SplitTp(tp=2), from_text("g (float[4] x) => (y) { y = Neg (x) }"))


def test_one_rank_changes_nothing() -> None:
    assert run_pass(SplitTp(tp=1), decoder()).changes == 0


def test_the_cost_counts_slices_of_a_head() -> None:
    assert HeadPlan(((0, 1, 2),), ((0,),)).cost() == 2 * 3 + 4

"""The sum over ranks is the unsharded model: the head structures and vocabularies of published models, at any tp."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from vacc_opt.ir import PerRank, UserError
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.tests.shard.models import LAYOUTS, Layer, assert_ranks_agree

# query heads, KV heads, ranks: what a rank gets
HEADS = {
    (32, 2, 4): "8 query + 1 KV heads a rank (KV heads held 4 times instead of 2)",
    (32, 2, 8): "4 query + 1 KV heads a rank (KV heads held 8 times instead of 2)",
    (71, 1, 4): "18 query + 1 KV heads a rank (1 query heads of padding, KV heads held 4 times instead of 1)",
    (28, 4, 8): "4 query + 1 KV heads a rank (4 query heads of padding, KV heads held 8 times instead of 4)",
    (14, 2, 4): "4 query + 1 KV heads a rank (2 query heads of padding, KV heads held 4 times instead of 2)",
    (9, 3, 3): "3 query + 1 KV heads a rank",
    (9, 3, 2): "6 query + 2 KV heads a rank (3 query heads of padding)",
    (9, 3, 4): "3 query + 1 KV heads a rank",
    (52, 52, 8): "7 query + 7 KV heads a rank (4 query heads of padding)",
    (40, 40, 8): "5 query + 5 KV heads a rank",
    (48, 8, 16): "3 query + 1 KV heads a rank (KV heads held 16 times instead of 8)",
    (64, 8, 32): "2 query + 1 KV heads a rank (KV heads held 32 times instead of 8)",
    (8, 1, 4): "2 query + 1 KV heads a rank (KV heads held 4 times instead of 1)",
}
VOCABULARIES = (128133, 60515, 65024, 125696)
# one of each way of sharing: replicated, padded inside groups, whole groups of padding
QUICK = {
    (71, 1, 4, "packed"),
    (28, 4, 8, "separate"),
    (9, 3, 2, "grouped"),
    (9, 3, 4, "separate"),
    (14, 2, 4, "grouped"),
}


@pytest.mark.parametrize(
    ("problem", "layout"),
    [
        pytest.param(p, layout, id=f"{p[0]}/{p[1]}@{p[2]} {layout}", marks=[] if (*p, layout) in QUICK else pytest.mark.full)
        for p in HEADS
        for layout in LAYOUTS
    ],
)  # fmt: skip
def test_the_ranks_of_published_head_structures_agree(problem: tuple[int, int, int], layout: str) -> None:
    heads, kv, tp = problem
    layer = Layer(heads, kv, layout=layout, bias=layout != "separate", alibi=heads == 40)
    _, record = assert_ranks_agree(layer, tp)
    assert HEADS[problem] in str(record.summary)


@pytest.mark.parametrize(
    "layout", [pytest.param(one, marks=[] if one == "packed" else pytest.mark.full) for one in LAYOUTS]
)
def test_slopes_are_split_with_their_heads(layout: str) -> None:  # fmt: skip
    assert_ranks_agree(Layer(10, 5, layout=layout, alibi=True), 4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("size", [pytest.param(v, marks=[] if v == 60515 else pytest.mark.full) for v in VOCABULARIES])
def test_vocabularies_are_padded_and_the_padding_never_seen(size: int, tp: int, tied: bool) -> None:
    graph, _ = assert_ranks_agree(Layer(4, 2, vocabulary=size, tied=tied), tp, steps=2 if tp == 3 else 16)
    table = graph.values["embed"].const
    assert table is not None
    share = table.shape[0]
    assert share % 16 == 0
    assert size <= share * tp < size + 16 * tp
    assert graph.outputs["logits"].shape is not None
    assert graph.outputs["logits"].shape[-1] == size


@pytest.mark.parametrize("bias", [False, True])
def test_a_feed_forward_without_gate_is_split_by_channels(bias: bool) -> None:
    graph, record = assert_ranks_agree(Layer(4, 2, channels=21, gate=False, bias=bias), 2)
    assert [str(graph.values[name].type) for name in ("wg", "wd")] == ["float[11,12]", "float[12,11]"]
    assert record.summary.endswith("3 all-reduces")


def test_every_rank_adds_a_gates_bias_to_its_channels_and_the_last_bias_counts_once() -> None:
    graph, _ = assert_ranks_agree(Layer(4, 2, bias=True), 2)
    assert [str(graph.values[name].type) for name in ("bg", "bu", "bd")] == ["float[10]", "float[10]", "float[12]"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_blocks_side_by_side_share_one_all_reduce(gate: bool, bias: bool) -> None:
    graph, record = assert_ranks_agree(Layer(9, 3, parallel=True, gate=gate, bias=bias), 2)
    assert len(graph.by_op("AllReduce", "Vastai")) == 2  # the embedding's, and one for the layer
    assert record.summary.endswith("2 all-reduces")
    assert any(r.message == "1 all-reduces saved: their parts are added first" for r in record.remarks)


def test_blocks_in_a_row_keep_an_all_reduce_each() -> None:
    graph, record = assert_ranks_agree(Layer(9, 3), 2)
    assert len(graph.by_op("AllReduce", "Vastai")) == 3
    assert not any("saved" in r.message for r in record.remarks)


@pytest.mark.parametrize("tp", [2, 4, 5])
def test_weights_of_heads_are_split_with_their_heads(tp: int) -> None:
    graph, _ = assert_ranks_agree(Layer(8, 4, normed=True), tp)
    shapes = {
        2: ("float[4,1,4]", "float[2,1,4]"),
        4: ("float[2,1,4]", "float[1,1,4]"),
        5: ("float[2,1,4]", "float[1,1,4]"),
    }
    assert tuple(str(graph.values[name].type) for name in ("q_heads", "k_heads")) == shapes[tp]
    assert not isinstance(graph.values["unit"].const, PerRank)


@pytest.mark.parametrize("problem", [p for p in HEADS if p[0] in (9, 71)], ids=str)
def test_more_ranks_than_query_heads_are_refused_with_the_largest(problem: tuple[int, int, int]) -> None:
    heads, kv, _ = problem
    graph = Layer(heads, kv).graph()
    with pytest.raises(UserError, match=f"tp = {heads + 1}, but the model has {heads} query heads\n  the largest tp is {heads}"):  # fmt: skip
        run_pipeline(graph, f"split-tp{{tp={heads + 1}}}")


@st.composite
def problems(draw: st.DrawFn) -> tuple[Layer, int]:
    """A layer of any sizes, and a number of ranks that its query heads allow."""
    kv = draw(st.integers(1, 5))
    heads = kv * draw(st.integers(2 if kv == 1 else 1, 5))
    layer = Layer(
        heads,
        kv,
        width=2 * draw(st.integers(1, 5)),
        hidden=draw(st.integers(1, 24)),
        channels=draw(st.integers(1, 40)),
        vocabulary=draw(st.integers(2, 120)),
        layout=draw(st.sampled_from(LAYOUTS)),
        bias=draw(st.booleans()),
        gate=draw(st.booleans()),
        tied=draw(st.booleans()),
        alibi=draw(st.booleans()),
        parallel=draw(st.booleans()),
        normed=draw(st.booleans()),
    )
    return layer, draw(st.integers(2, min(heads, 9)))


@pytest.mark.parametrize(("first", "cases"), [(0, 15), pytest.param(1, 500, marks=pytest.mark.full)])
def test_any_layer_is_split_over_any_ranks(first: int, cases: int) -> None:
    count = 0

    @seed(first)
    @settings(max_examples=cases, database=None, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])  # fmt: skip
    @given(problems())
    def case(problem: tuple[Layer, int]) -> None:
        nonlocal count
        count += 1
        assert_ranks_agree(*problem, steps=2)

    case()
    assert count >= cases

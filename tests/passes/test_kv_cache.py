"""kv-cache: fixed buffers written at a position compute what growing tensors compute; other masks are refused."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.ir import CheckError, UserError
from vacc_opt.ir.text import to_text
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.testing import REASSOCIATED, assert_close, run_pass
from vacc_opt.passes.legalize.kv_cache import KvCache
from vacc_opt.tests.passes.decoder import cached_logits, decoder, reference_logits

PASS = KvCache(context=32)
IDS = np.random.default_rng(5).integers(0, 40, (2, 12))


@pytest.mark.parametrize("chunk", [1, 4, 12])
def test_buffers_full_of_garbage_compute_what_growing_tensors_compute(chunk: int) -> None:
    expected = reference_logits(decoder(), IDS)
    graph = decoder()
    run_pass(PASS, graph)
    assert_close(cached_logits(graph, IDS, chunk), expected, REASSOCIATED)


def test_the_interface_is_buffers_and_a_position() -> None:
    graph = decoder()
    record = run_pass(PASS, graph)
    assert [v.name for v in graph.inputs] == [
        "input_ids", "past_key_values.0.key", "past_key_values.0.value", "pos", "valid",
    ]  # fmt: skip
    assert str(graph.outputs["present.0.key"].type) == "float[batch,2,32,8]"
    assert list(graph.outputs) == ["logits", "present.0.key", "present.0.value"]
    (attention,) = graph.by_op("Attention")
    assert attention.attributes == {"is_causal": 1, "scale": 0.25}
    assert attention.input(3) is None
    assert record.summary == "1 of 1 layers on KV buffers of 32 tokens"


def test_the_capacity_stays_open_until_a_phase_says_it() -> None:
    graph = decoder()
    record = run_pass(KvCache(context=32, several=True), graph)
    assert record.summary == "1 of 1 layers on KV buffers of up to 32 tokens"
    assert str(graph.outputs["present.0.key"].type) == "float[batch,2,context,8]"
    run_pipeline(graph, "decode{context=16,label=decode-16}(simplify),decode{context=32,label=decode-32}(simplify)")
    for context in (16, 32):
        phase = graph.phases[f"decode-{context}"]
        assert str(phase.outputs["present.0.key"].type) == f"float[1,2,{context},8]"
        fixed = decoder()
        run_pass(KvCache(context=context), fixed)
        assert_close(cached_logits(phase, IDS[:1], 1, context), cached_logits(fixed, IDS[:1], 1, context), REASSOCIATED)


def test_a_phase_without_the_capacity_that_is_open_is_refused() -> None:
    graph = decoder()
    run_pass(KvCache(context=32, several=True), graph)
    with pytest.raises(CheckError, match="decode: the size context of the interface is not bound") as caught:
        run_pipeline(graph, "decode(simplify)")
    assert caught.value.hint == "as in `decode{context=2048}(...)`"


NOT_CAUSAL = [
    ("bidirectional", ("hidden = Or (future, padded)", "hidden = Or (padded, padded)"), "query 0 sees key 1"),
    ("padding is ignored", ("hidden = Or (future, padded)", "hidden = Or (future, future)"), "query 0 sees key 0"),
    ("top-left aligned", ("Range (start, total, unit)", "Range (zero, length, unit)"), "query 0 does not see key 1"),
    ("sees itself not", ("Greater (row, column)", "GreaterOrEqual (row, column)"), "query 0 does not see key 0"),
    ("adds a bias", ("show = Constant <value = float {0.0}>", "show = Constant <value = float {0.5}>"), "it adds a bias to the scores"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "reason"), [c[1:] for c in NOT_CAUSAL], ids=[c[0] for c in NOT_CAUSAL])
def test_another_mask_is_refused_and_the_graph_kept(edit: tuple[str, str], reason: str) -> None:
    graph = decoder(("queries =", "length = Squeeze (new) queries ="), edit)
    before = to_text(graph)
    with pytest.raises(CheckError, match=f"kv-cache: the mask of a0.* is not causal with padding: .*{reason}"):
        run_pass(PASS, graph)
    assert to_text(graph) == before


@pytest.mark.parametrize(("window", "context"), [(4, 32), (200, 256), (200, 128)])
def test_a_sliding_window_goes_into_the_attention_unless_the_buffers_are_shorter(window: int, context: int) -> None:
    graph = decoder(
        ("hidden = Or (future, padded)",
         f"w = Constant <value_int = {window}> () first = Sub (column, w) far = LessOrEqual (row, first) "
         "outside = Or (future, far) hidden = Or (outside, padded)"),
    )  # fmt: skip
    run_pass(KvCache(context=context), graph)
    if window < context:
        (node,) = graph.by_op("Attention", "Vastai")
        assert node.attributes["window"] == window
    else:
        assert graph.by_op("Attention")
        assert not graph.by_op("Attention", "Vastai")


def test_a_mask_of_another_input_is_refused() -> None:
    graph = decoder(
        ("hidden = Or (future, padded)", 'some = Equal (extra, zero) hidden = Or (future, some)'),
        ("(int64[batch,seq] input_ids,", "(int64[batch,seq] input_ids, int64[1,1,1,1] extra,"),
        ('"past_key_values.0.value")\n', '"past_key_values.0.value")\n'),
    )  # fmt: skip
    with pytest.raises(CheckError, match="not causal with padding"):
        run_pass(PASS, graph)


def test_an_attention_without_a_mask_is_refused() -> None:
    graph = decoder((', "present.0.value", mask)', ', "present.0.value")'))
    with pytest.raises(CheckError, match="has no mask: it is bidirectional"):
        run_pass(PASS, graph)


def test_keys_that_are_not_joined_to_a_past_are_refused() -> None:
    graph = decoder(
        (
            'a0 = Attention <scale = 0.25> (q, "present.0.key",',
            'n0 = Neg ("present.0.key") a0 = Attention <scale = 0.25> (q, n0,',
        )
    )
    with pytest.raises(CheckError, match=r"the key of a0.* is not a past input joined with new tokens"):
        run_pass(PASS, graph)


def test_keys_whose_heads_are_permuted_are_refused() -> None:
    """The buffers hold the heads as they were written: fuse-gqa may read them in another order, kv-cache may not."""
    graph = decoder(
        (
            'a0 = Attention <scale = 0.25> (q, "present.0.key",',
            "order = Constant <value_ints = [1, 0]> () "
            'n0 = Gather <axis = 1> ("present.0.key", order) a0 = Attention <scale = 0.25> (q, n0,',
        )
    )
    before = to_text(graph)
    with pytest.raises(CheckError, match=r"the key of a0.* is not a past input joined with new tokens"):
        run_pass(PASS, graph)
    assert to_text(graph) == before


def test_keys_that_a_second_user_reads_are_refused() -> None:
    """It would read the whole buffer, with what is behind the last token."""
    second = 'logits = MatMul (e, lt) longest = ReduceMax <keepdims = 0> ("present.0.key")'
    graph = decoder(
        ("logits = MatMul (e, lt)", second),
        ('"present.0.key", float[batch,2,"past + seq",8] "present.0.value") {', '"present.0.key", float[batch,2,"past + seq",8] "present.0.value", float[] longest) {'),
    )  # fmt: skip
    before = to_text(graph)
    with pytest.raises(CheckError, match=r"longest reads the key of a0.* too"):
        run_pass(PASS, graph)
    assert to_text(graph) == before


def test_a_past_that_is_read_elsewhere_is_refused() -> None:
    graph = decoder(
        ("logits = MatMul (e, lt)", 'size = Shape <start = 2, end = 3> ("past_key_values.0.key") f = Cast <to = 1> (size) '
         "m = MatMul (e, lt) logits = Mul (m, f)"),
    )  # fmt: skip
    before = to_text(graph)
    with pytest.raises(CheckError, match=r"reads the past 'past_key_values\.0\.key', which has no length any more"):
        run_pass(PASS, graph)
    assert to_text(graph) == before


def test_a_graph_without_attention_is_refused() -> None:
    from vacc_opt.ir.text import from_text

    with pytest.raises(CheckError, match="the graph has no Attention node\n  run fuse-gqa before kv-cache"):
        run_pass(PASS, from_text("g (float[4] x) => (y) { y = Neg (x) }"))


def test_a_context_longer_than_the_rotary_table_is_refused() -> None:
    with pytest.raises(CheckError, match="the rotary table has 256 rows, the context is 512"):
        run_pass(KvCache(context=512), decoder())


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(UserError, match="context is -3"):
        run_pass(KvCache(context=-3), decoder())


def test_another_reader_of_the_mask_is_named() -> None:
    graph = decoder(("logits = MatMul (e, lt)", "logits = MatMul (e, lt) dead = ReduceSum (attention_mask)"))
    before = to_text(graph)
    with pytest.raises(CheckError, match="kv-cache: dead reads 'attention_mask', which the new interface has not"):
        run_pass(KvCache(context=32), graph)
    assert to_text(graph) == before


def test_causal_without_a_mask_is_refused_over_a_past() -> None:
    """It counts from the first key: query 0 sees key 0 alone, whatever the past holds."""
    graph = decoder(
        (
            '<scale = 0.25> (q, "present.0.key", "present.0.value", mask)',
            '<scale = 0.25, is_causal = 1> (q, "present.0.key", "present.0.value")',
        )
    )
    before = to_text(graph)
    with pytest.raises(CheckError, match=r"kv-cache: a0.* is causal without a mask: from the first key on"):
        run_pass(PASS, graph)
    assert to_text(graph) == before

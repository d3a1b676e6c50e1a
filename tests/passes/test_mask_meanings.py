"""What a mask means: causal with padding, a sliding window, ALiBi's slopes, or why it is none of these."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.ir import CheckError, Literal
from vacc_opt.ir.evaluate import Executable
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.model.masks import Meaning, recognize_mask
from vacc_opt.passes.infra.testing import REASSOCIATED, assert_close, run_pass
from vacc_opt.passes.legalize.kv_cache import KvCache
from vacc_opt.tests.passes.decoder import MASK, cached_logits, decoder, reference_logits

HEAD = (
    'm (int64[batch,seq] input_ids, int64[batch,"past + seq"] attention_mask, int64[batch,seq] position_ids) => (mask)'
)
PLAIN = "hidden = Or (future, padded)"
FINAL = "mask = Where (hidden, hide, show)"
SLOPES = np.array([0.7, 0.3, 0.11, 0.013, 0.005, 0.0017], np.float32)  # no powers of two: a quotient would not be exact
IDS = np.random.default_rng(7).integers(0, 40, (2, 12))


def window(width: int) -> tuple[str, str]:
    return (
        PLAIN,
        f"w = Constant <value_int = {width}> () first = Sub (column, w) far = LessOrEqual (row, first) "
        "outside = Or (future, far) hidden = Or (outside, padded)",
    )


def bias(distance: str) -> tuple[str, str]:
    """A number for each head times what is made of ``away``, the distance to a key (0 or less)."""
    return (
        FINAL,
        f"steps = Sub (row, column) away = Cast <to = 1> (steps) {distance} "
        "added = Mul (slopes, far_away) mask = Where (hidden, hide, added)",
    )


LINEAR = bias("far_away = Identity (away)")


def meaning(*edits: tuple[str, str], context: int = 128) -> Meaning:
    body = MASK
    for old, new in edits:
        assert old in body, old
        body = body.replace(old, new)
    consts = f'# const "slopes" = {Literal(SLOPES.reshape(1, 6, 1, 1))}\n' if "slopes" in body else ""
    graph = from_text(f"{HEAD} {{ {body} }}\n{consts}")
    return recognize_mask(graph, graph.outputs["mask"], context)


def test_a_mask_that_is_given_has_no_meaning_that_is_known() -> None:
    graph = from_text("m (float[1,1,seq,seq] mask) => (y) { y = Neg (mask) }")
    assert recognize_mask(graph, graph.inputs[0], 32).why == "the input mask says nothing of its meaning"


def test_a_mask_by_chunks_is_no_window_even_where_a_chunk_ends_with_the_context() -> None:
    chunks = (
        "c = Constant <value_int = 64> () mine = Div (column, c) its = Div (row, c) other = Less (its, mine) "
        "outside = Or (future, other) hidden = Or (outside, padded)"
    )
    assert "does not see key" in meaning((PLAIN, chunks), context=128).why


@pytest.mark.parametrize(
    "final", [FINAL, "mask = Not (hidden)", "far = CastLike (hidden, hide) mask = Mul (far, hide)"]
)
def test_causal_with_padding_is_plain(final: str) -> None:
    found = meaning((FINAL, final))
    assert (found.is_plain, found.why) == (True, "")


@pytest.mark.parametrize("context", [16, 128])
def test_a_sliding_window_is_its_number_of_keys(context: int) -> None:
    assert meaning(window(9), context=context) == Meaning(window=9)


def test_a_window_of_one_key_less_than_the_context_is_a_window() -> None:
    assert meaning(window(127)) == Meaning(window=127)


@pytest.mark.parametrize("width", [128, 129, 4096])
def test_a_window_at_least_as_large_as_the_context_is_none(width: int) -> None:
    assert meaning(window(width)) == Meaning()


def test_a_window_over_the_wrong_keys_is_refused() -> None:
    found = meaning(window(9), ("first = Sub (column, w)", "twice = Add (column, column) first = Sub (twice, w)"))
    assert found.why


def test_alibi_is_the_slopes_of_the_graph_bit_for_bit() -> None:
    found = meaning(LINEAR)
    assert (found.why, found.window, found.is_plain) == ("", 0, False)
    assert found.slopes is not None
    np.testing.assert_array_equal(found.slopes, SLOPES)


def test_slopes_times_the_key_are_slopes_of_the_distance() -> None:
    found = meaning(bias("keys_only = Cast <to = 1> (row) far_away = Identity (keys_only)"))
    assert found.why == ""
    np.testing.assert_array_equal(found.slopes, SLOPES)


def test_slopes_that_no_constant_holds_are_measured() -> None:
    found = meaning(bias("half = Constant <value = float {0.5}> () far_away = Mul (away, half)"))
    assert found.why == ""
    assert found.slopes is not None
    np.testing.assert_allclose(found.slopes, SLOPES / np.float32(2), rtol=1e-6)


def test_a_window_and_slopes_are_both_found() -> None:
    found = meaning(window(9), LINEAR)
    assert (found.why, found.window) == ("", 9)
    np.testing.assert_array_equal(found.slopes, SLOPES)


@pytest.mark.parametrize("distance", ["far_away = Mul (away, away)", "n = Abs (away) far_away = Sqrt (n)"])
def test_a_bias_that_is_not_linear_is_refused(distance: str) -> None:
    assert meaning(bias(distance)).why == "it adds a bias to the scores that is no slope of the distance"


def test_a_mask_of_another_input_is_refused() -> None:
    graph = from_text("m (bool[seq,total] given) => (mask) { mask = Not (given) }")
    assert recognize_mask(graph, graph.outputs["mask"], 128).why == "it depends on the input 'given'"


BIDIRECTIONAL = (PLAIN, "seen = Not (future) never = And (future, seen) hidden = Or (never, padded)")


def test_a_bidirectional_mask_is_refused() -> None:
    assert meaning(BIDIRECTIONAL).why == "with 0 past tokens, query 0 sees key 1"
    with pytest.raises(CheckError, match=r"is not causal with padding: .*query 0 sees key 1"):
        run_pass(KvCache(context=32), decoder(BIDIRECTIONAL))


def test_a_bidirectional_mask_becomes_an_input_where_that_is_asked_for() -> None:
    graph = decoder(BIDIRECTIONAL)
    expected = reference_logits(graph, IDS)
    run_pass(KvCache(context=32, other_masks="input"), graph)
    mask = graph.input_named("mask.mask")
    assert mask is not None
    assert graph.by_op("Attention")[0].input(3) is mask
    assert graph.input_named("attention_mask") is None
    batch, new = IDS.shape
    hidden = np.where(np.arange(32) < new, 0, -3.4e38).astype(np.float32)
    sizes = [{"batch": batch, "seq": new}.get(str(d), d) for d in mask.shape or ()]
    feeds = {
        "input_ids": IDS,
        "pos": np.zeros(batch, np.int64),
        "valid": np.full(batch, new),
        "mask.mask": np.broadcast_to(hidden, sizes).copy(),
        **{f"past_key_values.0.{what}": np.full((batch, 2, 32, 8), 77, np.float32) for what in ("key", "value")},
    }
    found = Executable(graph).run({v.name: feeds[v.name] for v in graph.inputs})[0]["logits"]
    assert_close(found, expected, REASSOCIATED)


@pytest.mark.parametrize("edits", [(window(9),), (LINEAR,), (window(5), LINEAR)], ids=["window", "slopes", "both"])
@pytest.mark.parametrize("chunk", [1, 4, 12])
def test_windows_and_slopes_on_buffers_compute_what_the_mask_does(
    edits: tuple[tuple[str, str], ...], chunk: int
) -> None:
    consts = {"slopes": SLOPES.reshape(1, 6, 1, 1)} if LINEAR in edits else {}
    expected = reference_logits(decoder(*edits, **consts), IDS)
    graph = decoder(*edits, **consts)
    run_pass(KvCache(context=32), graph)
    assert_close(cached_logits(graph, IDS, chunk), expected, REASSOCIATED)

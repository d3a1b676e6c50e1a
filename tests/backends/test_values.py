"""The value simulator executes what the text says: corrupt text, other numbers; broken rings, a named error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vacc_opt.backends.vacc import Program, ScheduleError, ValueSimulator, load_target
from vacc_opt.backends.vacc.kernels.builder import param
from vacc_opt.backends.vacc.kernels.kv_append import kv_append
from vacc_opt.backends.vacc.kernels.linear import linear
from vacc_opt.backends.vacc.linear_tiles import LinearTiles
from vacc_opt.backends.vacc.single import execute, single
from vacc_opt.ir import UserError

TARGET = load_target("vacc-reference")
M, N, K = 6, 40, 50


def program() -> Program:
    """A linear in tiles of 4 x 16 x 32: every axis has a tail."""
    tiles = LinearTiles(4, 16, 32, 4)
    px, pw, py = param("X", "in", "f32", (M, K)), param("W", "in", "f32", (N, K)), param("Y", "out", "f32", (M, N))
    return single(linear(px, pw, None, py, TARGET, tiles), TARGET)


def values() -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(0)
    return {"X": rng.standard_normal((M, K), np.float32), "W": rng.standard_normal((N, K), np.float32)}


def edited(old: str, new: str) -> Program:
    text = program().to_text()
    assert text.count(old) == 1, text
    return Program.from_text(text.replace(old, new))


def test_every_tile_operation_is_executed_and_counted() -> None:
    """2 x 3 x 2 products, as many loads of X and of W, 2 x 3 stores."""
    simulator = ValueSimulator(program(), [{}])
    simulator.run({name: value.reshape(-1) for name, value in values().items()})
    assert simulator.tiles_executed == 3 * 12 + 6


def test_a_corrupted_operand_of_one_tile_changes_exactly_what_it_says() -> None:
    """The rows of W are loaded from the other end: nothing but the text tells the simulator what to multiply."""
    given = values()
    found = execute(edited("load(W[n:n+|n|, k:k+|k|])", "load(W[40-n-|n|:40-n, k:k+|k|])"), [given])[0]["Y"]
    reordered = np.concatenate([given["W"][24:40], given["W"][8:24], given["W"][0:8]])
    np.testing.assert_allclose(found, given["X"] @ reordered.T, rtol=0, atol=1e-5)  # f32 sums of 50 terms of size 1
    assert not np.allclose(found, given["X"] @ given["W"].T)


def test_what_was_never_written_is_not_a_number() -> None:
    """The first column of every W tile is not loaded."""
    found = execute(
        edited("w[0:|n|, 0:|k|] <- load(W[n:n+|n|, k:k+|k|])", "w[0:|n|, 1:|k|] <- load(W[n:n+|n|, k+1:k+|k|])"),
        [values()],
    )
    assert np.isnan(found[0]["Y"]).all()


def test_a_sum_that_does_not_start_at_zero_is_not_a_number() -> None:
    assert np.isnan(execute(edited("first=k)", "first=k+1)"), [values()])[0]["Y"]).all()


def test_an_output_tile_that_is_not_stored_is_not_a_number() -> None:
    found = execute(
        edited("Y[m:m+|m|, n:n+|n|] <- store(acc[0:|m|, 0:|n|])", "Y[m:m+|m|, n:n+1] <- store(acc[0:|m|, 0:1])"),
        [values()],
    )
    assert np.isnan(found[0]["Y"]).sum() == M * (N - 3)


def test_a_consumer_without_a_producer_is_named() -> None:
    text = program().to_text()
    head, tail = text.split("engine matrix", 1)
    lost = Program.from_text(head.replace("for k in 0:50:32", "for k in 0:32:32") + "engine matrix" + tail)
    with pytest.raises(ScheduleError, match="matrix waits for slot 0 of ring `x`, which is never committed"):
        execute(lost, [values()])


def test_a_producer_that_overruns_its_ring_is_named() -> None:
    text = program().to_text()
    head, tail = text.split("engine matrix", 1)
    more = Program.from_text(head.replace("for k in 0:50:32", "for k in 0:50:8") + "engine matrix" + tail)
    with pytest.raises(ScheduleError, match="dma_in overruns ring `x`"):
        execute(more, [values()])


def test_a_slot_that_nobody_reads_is_named() -> None:
    text = program().to_text()
    head, tail = text.split("engine matrix", 1)
    extra = Program.from_text(
        head.replace("for k in 0:50:32", "for k in 0:50:25").replace("x2", "x9")
        + "engine matrix"
        + tail.replace("for k in 0:50:32", "for k in 0:25:25")
    )
    with pytest.raises(ScheduleError, match="leaves slots of ring `x` unread"):
        execute(extra, [values()])


def test_a_tile_outside_of_its_tensor_is_refused() -> None:
    with pytest.raises(ScheduleError, match="outside of shape"):
        execute(edited("load(X[m:m+|m|, k:k+|k|])", "load(X[m:m+4, k:k+|k|])"), [values()])


def test_touching_a_ring_outside_of_its_scope_is_a_raw_hazard() -> None:
    text = program().to_text().replace("use x, w {", "use w {")
    with pytest.raises(ScheduleError, match="RAW"):
        execute(Program.from_text(text), [values()])


def test_overlapping_buffers_corrupt_each_other_as_on_the_machine() -> None:
    right = execute(program(), [values()])[0]["Y"]
    buffer = program().kernels[0].buffer["w"]
    wrong = edited(f"@{buffer.offset} dma_in", "@0 dma_in") if buffer.offset else program()
    assert not np.array_equal(execute(wrong, [values()])[0]["Y"], right)


def test_missing_and_misshapen_inputs_are_the_users_error() -> None:
    simulator = ValueSimulator(program(), [{}])
    with pytest.raises(UserError, match="tensor `W` is missing"):
        simulator.run({"X": values()["X"].reshape(-1)})
    with pytest.raises(UserError, match="`X` is float64"):
        simulator.run({name: value.reshape(-1).astype(float) for name, value in values().items()})


def test_each_run_writes_into_the_cache_arrays_given_to_it() -> None:
    """Rows of one store are passed as temporary views, which may reuse the identity of those before."""
    new, cache = param("NEW", "in", "f32", (2, 5, 8)), param("CACHE", "inout", "f32", (2, 20, 8))
    simulator = ValueSimulator(single(kv_append(new, cache, None, None, TARGET), TARGET), [{}])
    store = np.zeros((6, 320), np.float32)
    for row in range(6):
        feeds = {"NEW": np.full(80, row + 1, np.float32), "pos": np.array([3])}
        simulator.run(feeds, [{"CACHE": store[row]}])
    assert store.max(axis=1).tolist() == [1, 2, 3, 4, 5, 6]


def test_a_cache_with_gaps_between_its_elements_is_refused_and_a_weight_is_packed() -> None:
    new, cache = param("NEW", "in", "f32", (2, 5, 8)), param("CACHE", "inout", "f32", (2, 20, 8))
    simulator = ValueSimulator(single(kv_append(new, cache, None, None, TARGET), TARGET), [{}])
    with pytest.raises(UserError, match="contiguous"):
        simulator.run(
            {"NEW": np.ones(80, np.float32), "pos": np.array([3])}, [{"CACHE": np.zeros(640, np.float32)[::2]}]
        )
    one = program()
    tensors = tuple(replace(t, role="weight") if t.name == "W" else t for t in one.tensors)
    wide = np.zeros(2 * N * K, np.float32)
    wide[::2] = values()["W"].reshape(-1)
    found = ValueSimulator(replace(one, tensors=tensors), [{"W": wide[::2]}]).run({"X": values()["X"].reshape(-1)})["Y"]
    assert np.array_equal(found, execute(one, [values()])[0]["Y"])

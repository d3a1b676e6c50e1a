"""What is fused behind a linear: values, predicted time and the verifier, for every step alone and together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vacc_opt.backends.vacc import Program, Target, load_target
from vacc_opt.backends.vacc.epilogue import Epilogue
from vacc_opt.backends.vacc.kernels.linear import linear
from vacc_opt.backends.vacc.linear_space import linear_space
from vacc_opt.backends.vacc.linear_tiles import LinearShape, LinearTiles
from vacc_opt.backends.vacc.linear_time import linear_cycles
from vacc_opt.backends.vacc.schedule import DTYPES, Param
from vacc_opt.backends.vacc.search import search_linear
from vacc_opt.backends.vacc.simulate_time import time_kernel
from vacc_opt.backends.vacc.single import execute, single
from vacc_opt.backends.vacc.verify_kernel import kernel_violations
from vacc_opt.tests.backends.epilogues import CONTEXT, HEAD, fused

Array = npt.NDArray[Any]
EPILOGUES = {
    "bias": ["bias"],
    "row scale": ["row scale"],
    "SwiGLU of scaled rows": ["row scale", "bias", "swiglu"],
    "append of scaled rows that are turned": ["row scale", "rotary", "append", "codes"],
    "SwiGLU": ["swiglu"],
    "GeGLU of biased sums": ["bias", "geglu"],
    "residual": ["residual"],
    "residual of biased sums": ["bias", "residual"],
    "rotary": ["rotary"],
    "rotary of biased sums": ["bias", "rotary"],
    "append": ["append"],
    "append of biased heads": ["bias", "heads", "append"],
    "append of turned heads": ["bias", "rotary", "append"],
    "append of codes": ["bias", "append", "codes"],
    "append of codes of turned heads": ["rotary", "append", "codes"],
}


def values(params: list[Param], seed: int = 0) -> dict[str, Array]:
    rng, found = np.random.default_rng(seed), {}
    for one in params:
        if one.dtype == "i8":
            found[one.name] = rng.integers(-127, 128, one.shape, np.int8)
        else:
            found[one.name] = rng.standard_normal(one.shape).astype(DTYPES[one.dtype])
        if one.name in {"S", "SU", "SCALE"}:
            found[one.name] = np.abs(found[one.name]) / 50 + np.float32(0.01)
    return found


def expected(v: dict[str, Array], after: Epilogue, pos: int) -> Array:
    """[rows, columns] in float64."""
    wide = {name: one.astype(np.float64) for name, one in v.items()}

    def sums(weight: str, scale: str, bias: str) -> Array:
        product = wide["X"] @ wide[weight].T * wide.get("RS", 1.0)
        return np.asarray(product * wide.get(scale, 1.0) + wide.get(bias, 0.0))

    y = sums("W", "S", "B")
    if after.gate:
        other = sums("U", "SU", "BU")
        if after.gate.kind == "swiglu":
            y = y / (1 + np.exp(-y)) * other
        else:
            y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))) * other
    y = y + wide.get("RES", 0.0)
    if after.turn:
        heads = y.reshape(len(y), -1, HEAD)
        cos, sin = (wide[name][pos : pos + len(y), None] for name in ("COS", "SIN"))
        even, odd = heads[..., :10:2].copy(), heads[..., 1:10:2].copy()
        heads[..., :10:2], heads[..., 1:10:2] = even * cos - odd * sin, even * sin + odd * cos
    if after.codes:
        y = np.clip(np.rint((y - wide["ZERO"]) / wide["SCALE"]), -127, 127)
    return y


def machine(sram: int = 12_000, cores: int = 2) -> Target:
    """The reference with few cores of little memory: everything needs several tiles."""
    reference = load_target("vacc-reference")
    core = reference.core.model_copy(update={"sram": reference.core.sram.model_copy(update={"bytes": sram})})
    return reference.model_copy(update={"core": core, "die": reference.die.model_copy(update={"cores": cores})})


@pytest.mark.parametrize("weights", ["f32", "i8"])
@pytest.mark.parametrize("rows", [1, 19])
@pytest.mark.parametrize("steps", EPILOGUES.values(), ids=EPILOGUES)
def test_a_fused_linear_computes_all_of_its_steps_in_any_order_of_engines(
    steps: list[str], rows: int, weights: str
) -> None:
    """f32 sums in another order: a few units in the last place of the largest output; codes at most one step apart."""
    target = machine()
    params, after = fused(steps, rows, 3 * HEAD, 71, weights, "f32")
    kernel = search_linear(*params, target, after).kernel
    for pos in (0, 1, CONTEXT - rows):
        assert kernel_violations(kernel, target, [{"pos": pos}]) == []
    program = Program.from_text(single(kernel, target).to_text())
    given_values = values([one for one in kernel.params if one.mode != "out"])
    pos = 7
    scalars = {name: np.int64(pos) for name in kernel.scalars}
    found = [
        execute(program, [{name: one.copy() for name, one in given_values.items()} | scalars], order)[0]
        for order in range(4)
    ]
    name = params[3].name
    assert all(np.array_equal(found[0][name], other[name]) for other in found)
    want, y = expected(given_values, after, pos), found[0][name]
    if after.append:
        before = given_values[name]
        for part in (slice(0, pos), slice(pos + rows, CONTEXT)):
            assert np.array_equal(y[..., part, :], before[..., part, :])
        y = y[..., pos : pos + rows, :]
    y = y.transpose(1, 0, 2).reshape(rows, -1) if after.head else y
    assert np.max(np.abs(y.astype(np.float64) - want)) <= (1 if after.codes else 2e-6 * np.max(np.abs(want)))
    assert not after.codes or np.mean(y != want) < 0.01


@settings(deadline=None, max_examples=40)
@given(
    steps=st.sampled_from(list(EPILOGUES.values())),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 4), st.integers(1, 60)),
    tiles=st.tuples(*[st.integers(7, 60)] * 4),
    slots=st.tuples(st.sampled_from(["", "x", "w"]), st.integers(1, 2), st.integers(1, 2), st.integers(2, 4)),
    weights=st.sampled_from(["f16", "i8"]),
    split=st.integers(0, 20),
    dealt=st.sampled_from("nm"),
    name=st.sampled_from(["vacc-reference", "peer-64x64-1mib-64bpc"]),
)
def test_the_time_that_the_search_sees_is_that_of_the_fused_kernel(
    steps: list[str],
    sizes: tuple[int, int, int],
    tiles: tuple[int, int, int, int],
    slots: tuple[str, int, int, int],
    weights: str,
    split: int,
    dealt: str,
    name: str,
) -> None:
    target, (m, heads, k) = load_target(name), sizes
    params, after = fused(steps, m, heads * HEAD, k, weights)
    whole = (m, heads * HEAD, k, m)
    chosen = LinearTiles(*(min(tile, size) for tile, size in zip(tiles, whole, strict=True)), *slots)
    chosen = replace(chosen, n=after.head or chosen.n, split=min(split, (m - 1) % chosen.m))
    rows = -(-m // chosen.m)
    if rows % min(rows, target.die.cores) == 0:  # a multicast needs all cores each time
        chosen = replace(chosen, dealt=dealt)
    kernel = linear(*params, target, chosen, after)
    assert kernel_violations(kernel, target, [{"pos": 3}] if kernel.scalars else [{}]) == []
    assert linear_cycles(*params, chosen, target, after) == time_kernel(kernel, target, {"pos": 3}).cycles


@pytest.mark.parametrize("steps", EPILOGUES.values(), ids=EPILOGUES)
def test_the_space_of_tiles_counts_the_memory_of_a_fused_kernel(steps: list[str]) -> None:
    target = machine(40_000)
    params, after = fused(steps, 37, 5 * HEAD, 100)
    for one in linear_space(LinearShape.of(*params, after), target, 60).best:
        kernel = linear(*params, target, one.tiles, after)
        assert max(buffer.end for buffer in kernel.buffers) == one.sram <= target.core.sram.bytes
        assert time_kernel(kernel, target, {"pos": 3}).bytes == one.ddr


@pytest.mark.parametrize("steps", EPILOGUES.values(), ids=EPILOGUES)
def test_no_candidate_of_a_fused_kernel_is_faster_than_its_own_bound(steps: list[str]) -> None:
    target = load_target("vacc-reference")
    params, after = fused(steps, 30, 20 * HEAD, 129, "i8")
    every = linear_space(LinearShape.of(*params, after), target, 1 << 20).best
    for one in every[:: max(len(every) // 20, 1)]:
        assert linear_cycles(*params, one.tiles, target, after) >= one.floor

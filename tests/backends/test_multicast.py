"""One transfer for all cores of a die: what it computes, which ones are refused, and that native code does the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vacc_opt.backends.vacc.kernels.attention import Scores
from vacc_opt.backends.vacc.kernels.builder import KernelBuilder, param
from vacc_opt.backends.vacc.kernels.linear import linear
from vacc_opt.backends.vacc.linear_tiles import LinearTiles
from vacc_opt.backends.vacc.native import NativeProgram
from vacc_opt.backends.vacc.schedule import Kernel, Program
from vacc_opt.backends.vacc.simulate_time import time_kernel
from vacc_opt.backends.vacc.simulate_values import ValueSimulator
from vacc_opt.backends.vacc.single import execute, single
from vacc_opt.backends.vacc.text import parse_kernel, print_kernel
from vacc_opt.backends.vacc.verify_kernel import kernel_violations
from vacc_opt.ir.errors import CheckError
from vacc_opt.tests.backends.mutation_bases import ORDERS, machine
from vacc_opt.tests.backends.natives import results, together, values
from vacc_opt.tests.backends.test_attention_kernels import Case, error
from vacc_opt.tests.backends.test_native import FLOAT, HALF, compiler_is_missing

Array = npt.NDArray[Any]
DIE = machine(64 << 10, cores=8)

# rows, tiles (m, n, k, strip, resident, results, panels, streams, split): 8 q tiles of rows, the last one with a tail
LINEARS = {
    "a tile a core": (16, (2, 16, 64, 2)),
    "two tiles a core, one row in the last": (121, (8, 16, 64, 3)),
    "panels of X": (63, (4, 24, 128, 4, "x", 2, 2, 3)),
    "panels of W": (61, (4, 24, 64, 2, "w", 1, 2, 2)),
    "sums in two parts": (64, (8, 16, 64, 2, "", 1, 1, 2, 6)),
}
SIZES = {"n": 37, "k": 131}


def product(name: str, weights: str, dealt: str = "m") -> tuple[Kernel, dict[str, Array]]:
    """Y[M, 37] = X[M, 131] @ W[37, 131]^T on eight cores, and its operands."""
    rows, sizes = LINEARS[name]
    n, k, rng = SIZES["n"], SIZES["k"], np.random.default_rng(rows)
    x, y = param("X", "in", "f16", (rows, k)), param("Y", "out", "f16", (rows, n))
    w, scale = param("W", "in", weights, (n, k)), param("S", "in", "f32", (n,)) if weights == "i8" else None
    values: dict[str, Array] = {"X": rng.standard_normal((rows, k)).astype(np.float16)}
    values["W"] = rng.integers(-127, 128, (n, k)).astype(np.int8 if weights == "i8" else np.float16)
    if scale:
        values["S"] = rng.uniform(0.01, 0.03, n).astype(np.float32)
    tiles = LinearTiles(*sizes[:4], *sizes[4:], dealt=dealt)  # type: ignore[arg-type]
    return linear(x, w, scale, y, DIE, tiles), values


def run(kernel: Kernel, values: dict[str, Any], order: int = 0) -> Array:
    return execute(Program.from_text(single(kernel, DIE).to_text()), [values], order)[0]["Y"]


@pytest.mark.parametrize("weights", ["f16", "i8"])
@pytest.mark.parametrize("name", LINEARS)
def test_rows_dealt_to_the_cores_give_the_product_in_every_order_of_the_engines(name: str, weights: str) -> None:
    """The same tiles dealt by columns, without a multicast, give the same bits: who multiplies changes nothing."""
    kernel, values = product(name, weights)
    assert "multicast(W[" in print_kernel(kernel)
    assert kernel_violations(kernel, DIE, [{}]) == []
    found = [run(kernel, values, order) for order in range(ORDERS)]
    assert all(np.array_equal(found[0], other) for other in found[1:])
    by_columns, _ = product(name, weights, dealt="n")
    assert "multicast" not in print_kernel(by_columns)
    assert np.array_equal(found[0], run(by_columns, values))
    expected = values["X"].astype(np.float64) @ values["W"].astype(np.float64).T * values.get("S", 1)
    # an f16 rounding of the result, beside which f32 sums of 131 products are exact
    assert np.max(np.abs(found[0] - expected)) <= 2.0**-10 * np.max(np.abs(expected))


def test_the_bytes_of_w_cross_the_port_once_for_all_cores() -> None:
    """Two tiles a core: W and its scales are received twice, X and Y pass once."""
    kernel, values = product("two tiles a core, one row in the last", "i8")
    rows, n, k = 121, SIZES["n"], SIZES["k"]
    w_passes, x_passes = 2, -(-n // 16)
    least = w_passes * (n * k + 4 * n) + x_passes * rows * k * 2 + rows * n * 2
    timed = time_kernel(kernel, DIE, {})
    # every run of a chunk takes whole bursts, so a little more than the bytes themselves; of eight cores it would be
    # eight times the bytes of W
    assert least <= timed.bytes < least + 6 * w_passes * (n * k + 4 * n)
    alone = parse_kernel(print_kernel(kernel).replace("multicast(", "load("))
    assert time_kernel(alone, DIE, {}).bytes - timed.bytes >= 7 * w_passes * (n * k + 4 * n)
    assert timed.cycles < time_kernel(alone, DIE, {}).cycles
    assert values["W"].nbytes == n * k


# KV heads, group, rows, channels, cache, pos: rows in tiles of 2 and 4, in one round and in two, with a short last one
ATTENTIONS = {
    "float, window": ((2, 2, 16, 16, 64, 29), "float", Scores(0.3, window=9), False),
    "float, ALiBi": ((3, 2, 31, 8, 96, 50), "float", Scores(0.3), True),
    "int8": ((1, 3, 63, 16, 96, 30), "int8", Scores(0.3), False),
    "int8 with new float keys": ((2, 2, 15, 16, 64, 40), "apart", Scores(0.3), False),
    "int8 with new float keys, window, ALiBi": ((1, 2, 32, 16, 96, 41), "apart", Scores(0.3, window=9), True),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_rows_that_pass_the_cache_together_attend_as_defined_in_every_order_of_the_engines(name: str) -> None:
    """With loads of its own each core gives the same bits; the tolerances are those of the other attention kernels."""
    size, kv, scores, alibi = ATTENTIONS[name]
    case = Case(size, kv, scores, alibi, "f32")
    kernel = case.kernel(DIE)
    text = print_kernel(kernel)
    assert "multicast(K[" in text
    assert ("multicast(KN[" in text) == (kv == "apart")
    assert kernel_violations(kernel, DIE, [{"pos": pos} for pos in (0, 1, case.pos)]) == []
    given = {key: value for key, value in case.values.items() if key in kernel.param or key == "pos"}
    found = [run(kernel, given, order) for order in range(ORDERS)]
    assert all(np.array_equal(found[0], other) for other in found[1:])
    alone = parse_kernel(text.replace("multicast(", "load("))
    assert np.array_equal(found[0], run(alone, given))
    # f32 sums; int8: q . codes and q . zero are rounded apart and then added
    assert error(found[0], case.expected) < (1e-6 if kv == "float" else 1e-5)
    assert time_kernel(kernel, DIE, {"pos": case.pos}).bytes < time_kernel(alone, DIE, {"pos": case.pos}).bytes


@pytest.mark.skipif(bool(compiler_is_missing()), reason=compiler_is_missing() or "there is a C compiler")
def test_native_code_computes_what_the_simulator_computes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of this file in one program, on one thread and on three, memory poisoned before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cases = {f"attention{n}": Case(*one, "f32") for n, one in list(enumerate(ATTENTIONS.values()))[1::3]}
    made = {name: case.kernel(DIE) for name, case in cases.items()}
    made |= {f"linear{n}": product(name, "i8")[0] for n, name in enumerate(LINEARS) if n % 3 == 1}
    program = Program.from_text(together(made, DIE, 1).to_text())
    scalars = {name: {"pos": cases[name].pos} if name in cases else {} for name in made}
    given = values(program, scalars)
    expected = results(ValueSimulator(program, [{}]), program, given)[0]
    natives = [results(NativeProgram(program, [{}], threads=n, poison=True), program, given)[0] for n in (1, 3)]
    for name, want in expected.items():
        found = natives[0][name].astype(np.float64)
        tolerance = FLOAT if want.dtype == np.float32 else HALF
        assert np.max(np.abs(found - want)) <= tolerance * np.max(np.abs(want.astype(np.float64))), name
        assert np.array_equal(natives[0][name], natives[1][name]), name


def broadcast(rows: int, *, own: bool) -> Kernel:
    """Adds the first rows of B to each tile of 2 rows of A; with `own` each core wants its own rows of B."""
    b = KernelBuilder("broadcast")
    pa, pb, py = (b.param(param(n, mode, "f32", (rows, 4))) for n, mode in (("A", "in"), ("B", "in"), ("Y", "out")))
    ra, rb = (b.ring(name, "f32", (2, 4), "dma_in", "vector") for name in "ab")
    ry = b.ring("y", "f32", (2, 4), "vector", "dma_out")
    with b.engine("dma_in"), b.loop("m", 0, rows, 2, parallel=True) as m:
        with b.fill(ra):
            b.op("load", ra[m, :], pa[m, :])
        with b.fill(rb):
            b.op("multicast", rb[m, :], pb[m, :] if own else pb[0:2, :])
    with b.engine("vector"), b.loop("m", 0, rows, 2, parallel=True) as m, b.use(ra, rb), b.fill(ry):
        b.op("add", ry[m, :], ra[m, :], rb[m, :])
    with b.engine("dma_out"), b.loop("m", 0, rows, 2, parallel=True) as m, b.use(ry):
        b.op("store", py[m, :], ry[m, :])
    return b.build()


def refusals(kernel: Kernel) -> list[str]:
    found = kernel_violations(kernel, machine(4096, cores=3), [{}])
    return [one.message for one in found if one.kind == "multicast"]


def test_cores_that_receive_the_same_multicasts_are_not_refused() -> None:
    assert refusals(broadcast(6, own=False)) == []
    assert refusals(broadcast(12, own=False)) == []


def test_cores_that_receive_different_tiles_as_one_multicast_are_refused_by_core_and_box() -> None:
    (message,) = refusals(broadcast(6, own=True))
    assert "as number 0 core 0 receives B[0:2, 0:4], core 1 B[2:4, 0:4]" in message
    assert "multicast(B[m:m+|m|, 0:4])" in message


def test_a_core_that_receives_fewer_multicasts_than_another_is_refused() -> None:
    """Four tiles on three cores: the first core would wait for a transfer that the others never ask for."""
    assert refusals(broadcast(8, own=False)) == ["core 0 receives 2 multicasts, core 1 1"]


def test_a_load_of_a_cores_own_rows_cannot_become_a_multicast() -> None:
    """In a kernel of the compiler: X belongs to a core where rows are dealt."""
    kernel, _ = product("a tile a core", "i8")
    broken = parse_kernel(print_kernel(kernel).replace("load(X[", "multicast(X["))
    found = [one for one in kernel_violations(broken, DIE, [{}]) if one.kind == "multicast"]
    assert len(found) == 1
    assert "core 0 receives X[0:2, 0:64], core 1 X[2:4, 0:64]" in found[0].message


def test_a_multicast_that_one_core_leaves_out_deadlocks_the_time_simulator_by_name() -> None:
    """What the verifier would refuse: without it the cores wait for each other, and say so."""
    with pytest.raises(CheckError, match="deadlock"):
        time_kernel(broadcast(8, own=False), machine(4096, cores=3), {})

"""Small kernels of every kind, each cut into several tiles with tails, with values to run them on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.backends.vacc.epilogue import Epilogue
from vacc_opt.backends.vacc.fusion import EVERY
from vacc_opt.backends.vacc.kernels.add_rms_norm import add_rms_norm
from vacc_opt.backends.vacc.kernels.attention import Scores
from vacc_opt.backends.vacc.kernels.builder import param
from vacc_opt.backends.vacc.kernels.collectives import all_gather, all_reduce, reduce_scatter
from vacc_opt.backends.vacc.kernels.elementwise import elementwise
from vacc_opt.backends.vacc.kernels.embedding import embedding
from vacc_opt.backends.vacc.kernels.kv_append import kv_append
from vacc_opt.backends.vacc.kernels.layer_norm import layer_norm
from vacc_opt.backends.vacc.kernels.move import copy, select_row
from vacc_opt.backends.vacc.kernels.rms_norm import rms_norm
from vacc_opt.backends.vacc.kernels.rotary import rotary
from vacc_opt.backends.vacc.kernels.row_scale import row_scale
from vacc_opt.backends.vacc.lower import lower
from vacc_opt.backends.vacc.schedule import DTYPES, Kernel, Param, Program
from vacc_opt.backends.vacc.search import search_linear
from vacc_opt.backends.vacc.simulate_values import ValueSimulator
from vacc_opt.backends.vacc.single import execute, single
from vacc_opt.backends.vacc.target import Target, load_target
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.tests.backends.conftest import attend
from vacc_opt.tests.backends.epilogues import fused
from vacc_opt.tests.backends.llama import Llama, inputs
from vacc_opt.tests.backends.pack import empty_caches, rank_weights

Array = npt.NDArray[Any]
ORDERS = 4  # interleavings in which every mutant runs
RELATIVE = 1e-5  # a sum in another order is no change of values
TOKENS, CONTEXT = 5, 24


@dataclass(frozen=True)
class Base:
    """A valid kernel, its machine, values of its run-time scalars, and how many ranks run it."""

    name: str
    kernel: Kernel
    target: Target
    scalars: Sequence[Mapping[str, int]] = ({},)
    ranks: int = 1


def machine(sram: int, cores: int = 2) -> Target:
    """The reference with few cores of little memory: everything needs several tiles."""
    reference = load_target("vacc-reference")
    core = reference.core.model_copy(update={"sram": reference.core.sram.model_copy(update={"bytes": sram})})
    return reference.model_copy(update={"core": core, "die": reference.die.model_copy(update={"cores": cores})})


@cache
def bases() -> list[Base]:
    """One kernel of every kind, and the variants of those with several."""
    small = machine(4096)
    at = tuple({"pos": pos} for pos in (0, 1, CONTEXT - TOKENS))
    a, b, y = (param(name, mode, "f32", (13, 60)) for name, mode in (("A", "in"), ("B", "in"), ("Y", "out")))
    x, w = param("X", "in", "f32", (13, 60)), param("W", "in", "f32", (60,))
    row = param("B", "in", "f32", (60,))
    new, cache = param("NEW", "in", "f32", (2, TOKENS, 8)), param("CACHE", "inout", "f32", (2, CONTEXT, 8))
    codes = param("CACHE", "inout", "i8", (2, CONTEXT, 8))
    scale, zero = (param(name, "in", "f32", (2, 1, 8)) for name in ("SCALE", "ZERO"))
    turn = param("X", "in", "f32", (3, TOKENS, 8)), *(param(n, "in", "f32", (CONTEXT, 3)) for n in ("COS", "SIN"))
    table, ids = param("T", "in", "f32", (50, 24)), param("IDS", "in", "i64", (13,))
    vector = [param(name, mode, "f32", (40_000,)) for name, mode in (("X", "in"), ("Y", "out"))]
    return [
        Base("linear", _gemm("f32", None, 8000), machine(8000)),
        Base("linear_resident", _gemm("f16", None, 10000), machine(10000)),
        Base("linear_f16", _gemm("f16", None, 4000), machine(4000)),
        Base("linear_w8", _gemm("f16", "i8", 4000), machine(4000)),
        Base("linear_w8_rows", _gemm("f16", "i8", 7000, rows=16, cores=8), machine(7000, 8)),
        Base("linear+all_reduce", _gemm("f32", None, 8000, 3), machine(8000), ranks=3),
        Base("linear+residual+all_reduce", _fused(["residual"], 10_000, ranks=3), machine(10_000), ranks=3),
        Base("linear+bias+residual", _fused(["bias", "residual"], 8000), machine(8000)),
        Base("linear+row_scale+bias", _fused(["row scale", "bias"], 8000), machine(8000)),
        Base("row_scale", row_scale(x, param("Y", "out", "f32", (13, 1)), 1e-5, small), small),
        Base("linear+bias+swiglu", _fused(["bias", "swiglu"], 10_000), machine(10_000)),
        Base("linear_w8+swiglu", _fused(["swiglu"], 8000, "i8"), machine(8000)),
        Base("linear+bias+rotary", _fused(["bias", "rotary"], 8000), machine(8000), at),
        Base("linear+rotary+append", _fused(["rotary", "append"], 8000), machine(8000), at),
        Base("linear_w8+bias+append", _fused(["bias", "append", "codes"], 8000, "i8"), machine(8000), at),
        Base("attention", _attention(), machine(7000), at),
        Base("attention_by_row", _attention(cores=3), machine(7000, 3), at),
        Base("attention_rows", _attention("i8", True, tokens=8, cores=8), machine(7000, 8), ({"pos": 0}, {"pos": 13})),
        Base("attention_decode", _attention(tokens=1, cache="i8", new=True), machine(7000), at),
        Base("attention_i8", _attention(cache="i8"), machine(7000), at),
        Base("attention_i8_new", _attention(cache="i8", new=True), machine(7000), at),
        Base("attention_window", _attention(scores=Scores(0.3, window=4)), machine(7000), at),
        Base("attention_alibi", _attention("i8", True, Scores(0.3, clamp=2.0), alibi=True), machine(7000), at),
        Base("kv_append", kv_append(new, cache, None, None, machine(1700)), machine(1700), at),
        Base("kv_append_i8", kv_append(new, codes, scale, zero, machine(1700)), machine(1700), at),
        Base("rms_norm", rms_norm(x, w, y, 1e-5, small), small),
        Base(
            "add_rms_norm",
            add_rms_norm(x, param("R", "in", "f32", (13, 60)), w, y, param("S", "out", "f32", (13, 60)), 1e-5, small),
            small,
        ),
        Base("layer_norm", layer_norm(x, w, param("C", "in", "f32", (60,)), y, 1e-5, small), small),
        Base("rotary", rotary(*turn, param("Y", "out", "f32", (3, TOKENS, 8)), False, machine(1500)), machine(1500), at),
        Base("add", elementwise("add", a, b, y, small), small),
        Base("bias", elementwise("add", a, row, y, small), small),
        Base("swiglu", elementwise("silu_mul", a, b, y, small), small),
        Base("gelu", elementwise("gelu", a, None, y, small, tanh=0), small),
        Base("cast", elementwise("cast", a, None, param("Y", "out", "f16", (13, 60)), small), small),
        Base("embedding", embedding(table, ids, None, param("Y", "out", "f32", (13, 24)), machine(800)), machine(800)),
        Base(
            "embedding_shard",
            embedding(table, ids, param("FIRST", "in", "i64", ()), param("Y", "out", "f32", (13, 24)), machine(800)),
            machine(800),
        ),
        Base("copy", copy(param("X", "in", "f32", (13, 5, 12), (60, 1, 5)), param("Y", "out", "f32", (13, 5, 12)), small), small),
        Base("select_row", select_row(x, param("Y", "out", "f32", (1, 60)), small), small, ({"valid": 1}, {"valid": 7}, {"valid": 13})),
        Base("all_reduce", all_reduce(*vector), small, ranks=3),
        Base(
            "reduce_scatter",
            reduce_scatter(param("X", "in", "f32", (3, 9_000)), param("Y", "out", "f32", (9_000,))),
            small,
            ranks=3,
        ),
        Base(
            "all_gather",
            all_gather(param("X", "in", "f32", (3, 20_000)), param("Y", "out", "f32", (3, 3, 20_000))),
            small,
            ranks=3,
        ),
    ]  # fmt: skip


def _gemm(activations: str, weights: str | None, sram: int, ranks: int = 0, rows: int = 10, cores: int = 2) -> Kernel:
    """Y[rows, 37] = X[rows, 130] @ W[37, 130]^T in several tiles."""
    columns, depth = 37, 130
    x, y = (
        param(n, mode, activations, s) for n, mode, s in (("X", "in", (rows, depth)), ("Y", "out", (rows, columns)))
    )
    w = param("W", "in", weights or activations, (columns, depth))
    scale = param("S", "in", "f32", (columns,)) if weights else None
    return search_linear(x, w, scale, y, machine(sram, cores), Epilogue(ranks=ranks)).kernel


def _fused(steps: list[str], sram: int, weights: str = "f32", ranks: int = 0) -> Kernel:
    """5 rows of 24 columns of 50 numbers, with what is fused behind them."""
    params, after = fused(steps, TOKENS, 24, 50, weights, "f32", head=8, context=CONTEXT)
    return search_linear(*params, machine(sram), replace(after, ranks=ranks)).kernel


def _attention(
    cache: str = "f32",
    new: bool = False,
    scores: Scores = Scores(0.3),  # noqa: B008
    alibi: bool = False,
    tokens: int = TOKENS,
    cores: int = 2,
) -> Kernel:
    """Two query heads a KV head, 8 channels; blocks of few keys."""
    return attend(machine(7000, cores), tokens, CONTEXT, cache, new, scores, alibi, group=2, width=8)


def values(base: Base, scalars: Mapping[str, int]) -> list[dict[str, Any]]:
    """Inputs of every rank; rows of a cache that this call may not see hold NaN."""
    found = []
    for rank in range(base.ranks):
        rng, seen = np.random.default_rng(rank), scalars.get("pos", 0) + _tokens(base.kernel)
        found.append(
            {one.name: _filled(one, seen, rng) for one in base.kernel.params if one.mode != "out"} | dict(scalars)
        )
    return found


def _tokens(kernel: Kernel) -> int:
    """Rows of this call, in an attention."""
    return kernel.param["Q"].shape[2] if "Q" in kernel.param else TOKENS


def _filled(one: Param, seen: int, rng: np.random.Generator) -> Array:
    """Random contents; of a cache, rows from `seen` on are NaN."""
    if one.dtype == "i64":
        return np.asarray(rng.integers(0, 60, one.shape) if one.shape else np.int64(7), np.int64) % 50
    if one.dtype == "i8":
        return rng.integers(-127, 128, one.shape, np.int8)
    array = rng.standard_normal(one.shape).astype(DTYPES[one.dtype])
    if one.name in {"KS", "VS", "SCALE", "S", "SU"}:
        array = np.abs(array) / 50 + array.dtype.type(0.01)
    if one.name in {"K", "V"}:
        array[:, seen:] = np.nan
    return array


FAILURES = (CheckError, UserError, ValueError, KeyError, IndexError, TypeError, ArithmeticError)


def results(base: Base, kernel: Kernel) -> Iterator[list[dict[str, Array]] | None]:
    """What each rank computes, for each choice of scalars in each interleaving; None where it cannot run to its end."""
    program = single(kernel, base.target, base.ranks)
    for scalars in base.scalars:
        for order in range(ORDERS):
            try:
                yield execute(program, values(base, scalars), order)
            except FAILURES:
                yield None
                return


def same(good: Sequence[list[dict[str, Array]]], found: Iterator[list[dict[str, Array]] | None]) -> bool:
    """Whether results agree up to the rounding of sums in another order; ends at the first that does not."""
    return all(
        other is not None and all(_close(a[n], b[n]) for a, b in zip(one, other, strict=True) for n in a)
        for one, other in zip(good, found, strict=False)
    )


def _close(one: Array, other: Array) -> bool:
    if one.dtype.kind != "f":
        return np.array_equal(one, other)
    a, b = one.astype(np.float64), other.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return False
    scale = max(float(np.max(np.abs(a[np.isfinite(a)]), initial=0)), 1e-30)
    return bool(np.max(np.abs(a - b)[np.isfinite(a)], initial=0) <= RELATIVE * scale)


@dataclass(frozen=True)
class ProgramBase:
    """A valid program with what it needs to run."""

    name: str
    model: Llama
    program: Program
    weights: Sequence[Mapping[str, Array]]


@cache
def program_bases() -> list[ProgramBase]:
    """A layer or two of each kind of model, prefill and decode."""
    models = {
        "prefill": Llama(length=3, context=8),
        "prefill, int8 weights and KV, 2 ranks": Llama(length=3, context=8, layers=1, ranks=2, int8_weights=True, kv="int8"),
        "prefill, two rows": Llama(length=3, context=8, layers=1, batch=2),
        "decode, new tokens quantised": Llama(length=1, context=8, kv="int8-quantised"),
        "decode, 3 ranks, window": Llama(length=1, context=8, layers=1, ranks=3, window=3),
        "prefill, nothing fused": Llama(length=3, context=8, layers=1),
    }  # fmt: skip
    found = []
    for name, model in models.items():
        graph = model.graph()
        phase, fusions = "prefill" if model.length > 1 else "decode", () if "nothing fused" in name else EVERY
        program = lower(graph, load_target("vacc-card4"), phase=phase, fusions=fusions)
        found.append(ProgramBase(name, model, program, [rank_weights(program, graph, r) for r in range(model.ranks)]))
    return found


def program_results(base: ProgramBase, program: Program) -> Iterator[list[dict[str, Array]] | None]:
    """Outputs and caches of each rank, for two choices of `pos` in each interleaving; None where it cannot run."""
    model = base.model
    for pos in ([4, 0], [1, model.context - model.length]):
        for order in range(ORDERS):
            rng, caches = np.random.default_rng(1), empty_caches(base.program)
            for array in (array for one in caches for array in one.values()):
                if array.dtype == np.int8:
                    array[...] = rng.integers(-127, 128, array.shape)
                else:
                    array[...] = rng.standard_normal(array.shape)
            feeds = inputs(model, pos[: model.batch], [min(2, model.length), model.length][: model.batch])
            try:
                simulator = ValueSimulator(program, base.weights[: program.ranks], order=order)
                simulator.run(feeds, caches[: program.ranks])
                outputs = [simulator.read(rank) for rank in range(program.ranks)]
            except FAILURES:
                yield None
                return
            yield [one | dict(caches[rank]) for rank, one in enumerate(outputs)]

"""An SRAM of banks: engines that do not share their buffers have banks of their own, and values are those without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vacc_opt.backends.vacc import Program, Target, load_target, lower, simulate_time, verify
from vacc_opt.backends.vacc.banks import laid_out
from vacc_opt.backends.vacc.kernels.add_rms_norm import add_rms_norm
from vacc_opt.backends.vacc.kernels.builder import param
from vacc_opt.backends.vacc.kernels.collectives import reduce_scatter
from vacc_opt.backends.vacc.kernels.elementwise import elementwise
from vacc_opt.backends.vacc.kernels.embedding import embedding
from vacc_opt.backends.vacc.kernels.layer_norm import layer_norm
from vacc_opt.backends.vacc.kernels.linear import linear
from vacc_opt.backends.vacc.kernels.rms_norm import rms_norm
from vacc_opt.backends.vacc.kernels.rotary import rotary
from vacc_opt.backends.vacc.linear_space import linear_space
from vacc_opt.backends.vacc.linear_tiles import LinearShape
from vacc_opt.backends.vacc.schedule import Buffer, Kernel
from vacc_opt.backends.vacc.search import search_linear
from vacc_opt.backends.vacc.target import overlay
from vacc_opt.backends.vacc.text import print_kernel
from vacc_opt.backends.vacc.verify_kernel import kernel_violations
from vacc_opt.cli.main import main
from vacc_opt.ir.errors import UserError
from vacc_opt.tests.backends.conftest import attend, gemm, zoo
from vacc_opt.tests.backends.epilogues import CONTEXT, HEAD, fused
from vacc_opt.tests.backends.llama import Llama
from vacc_opt.tests.backends.mutation_bases import Base, ProgramBase, program_results, results, same
from vacc_opt.tests.backends.pack import rank_weights
from vacc_opt.tests.backends.test_epilogues import EPILOGUES

PLAIN, BANKED = load_target("vacc-reference"), load_target("vacc-reference-16banks")
Example = tuple[Kernel, Sequence[dict[str, int]], int]  # with values of its run-time scalars, and its ranks


def small(banks: int | None, sram: int = 96 << 10) -> Target:
    """The reference with 3 cores of little memory, where everything needs several tiles."""
    memory = PLAIN.core.sram.model_copy(update={"bytes": sram, "banks": banks})
    die = PLAIN.die.model_copy(update={"cores": 3})
    return PLAIN.model_copy(update={"core": PLAIN.core.model_copy(update={"sram": memory}), "die": die})


def families(target: Target) -> dict[str, Example]:
    """Kernels of every family, and linears with every epilogue."""
    ranks = {"all_reduce": 3, "all_gather": 3}
    made = {name: (kernel, scalars, ranks.get(name, 1)) for name, (kernel, scalars) in zoo(target).items()}
    x, r, y, s = (param(n, m, "f32", (13, 100)) for n, m in (("X", "in"), ("R", "in"), ("Y", "out"), ("S", "out")))
    w, none = param("W", "in", "f32", (100,)), [dict[str, int]()]
    made["add_rms_norm"] = add_rms_norm(x, r, w, y, s, 1e-5, target), none, 1
    made["bias"] = elementwise("add", replace(x, name="A"), param("B", "in", "f32", (100,)), y, target), none, 1
    table, ids, first = (
        param("T", "in", "f32", (50, 96)),
        param("IDS", "in", "i64", (13,)),
        param("FIRST", "in", "i64", ()),
    )
    made["embedding_shard"] = embedding(table, ids, first, param("Y", "out", "f32", (13, 96)), target), none, 1
    scattered = param("X", "in", "f32", (3, 9_000)), param("Y", "out", "f32", (9_000,))
    made["reduce_scatter"] = reduce_scatter(*scattered), none, 3
    for name, steps in EPILOGUES.items():
        for weights in ("f32", "i8"):
            params, after = fused(steps, 19, 3 * HEAD, 71, weights, "f32")
            kernel = search_linear(*params, target, after).kernel
            at = [{"pos": pos} for pos in (0, CONTEXT - 19)] if kernel.scalars else none
            made[f"{weights} linear with {name}"] = kernel, at, 1
    params, after = fused(["residual"], 19, 3 * HEAD, 71, "f32", "f32")
    made["linear with residual and all-reduce"] = (
        search_linear(*params, target, replace(after, ranks=3)).kernel,
        none,
        3,
    )
    return made


NAMES = sorted(families(PLAIN))
MACHINES = {"16 banks of 128 KiB": (BANKED, PLAIN), "12 banks of 8 KiB": (small(12), small(None))}


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, Example]]:
    """The families on each machine, with and without its banks."""
    made = {name: families(banked) for name, (banked, _) in MACHINES.items()}
    return made | {f"{name}, ignored": families(plain) for name, (_, plain) in MACHINES.items()}


def groups(kernel: Kernel) -> dict[frozenset[str], list[Buffer]]:
    """Buffers by the engines that touch them."""
    found: dict[frozenset[str], list[Buffer]] = {}
    for one in kernel.buffers:
        found.setdefault(frozenset({one.producer, *one.consumers}), []).append(one)
    return found


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", NAMES)
def test_buffers_of_the_same_engines_begin_at_a_bank_and_no_bank_has_buffers_of_others(
    name: str, machine: str, built: dict[str, dict[str, Example]]
) -> None:
    kernel, scalars, _ = built[machine][name]
    target, _ = MACHINES[machine]
    size, owners = target.core.sram.bytes // (target.core.sram.banks or 1), dict[int, frozenset[str]]()
    for engines, buffers in groups(kernel).items():
        assert min(one.offset for one in buffers) % size == 0
        for one in buffers:
            for bank in range(one.offset // size, (one.end - 1) // size + 1):
                assert owners.setdefault(bank, engines) == engines
    assert kernel.sram_bytes <= target.core.sram.bytes
    assert kernel_violations(kernel, target, scalars) == []


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_computes_in_any_order_of_engines_what_it_computes_without_banks(
    name: str, machine: str, built: dict[str, dict[str, Example]]
) -> None:
    """To the bit where tiles are the same; sums in another order are a rounding apart, of f16 results the last bit."""
    (banked, scalars, ranks), (plain, _, _) = built[machine][name], built[f"{machine}, ignored"][name]
    bases = [
        Base(name, kernel, target, scalars, ranks)
        for kernel, target in zip((banked, plain), MACHINES[machine], strict=True)
    ]
    found, expected = (list(results(base, base.kernel)) for base in bases)
    assert len(found) == len(expected) >= 4
    exact = [replace(one, offset=0) for one in banked.buffers] == [replace(one, offset=0) for one in plain.buffers]
    assert exact or machine != "16 banks of 128 KiB"
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        for rank, arrays in enumerate(one):
            for key, array in arrays.items():
                close(array, other[rank][key], exact)


def close(found: Any, expected: Any, exact: bool) -> None:
    assert found.dtype == expected.dtype
    if exact or found.dtype.kind != "f":
        assert np.array_equal(found, expected, equal_nan=found.dtype.kind == "f")
        return
    tolerance = 1e-5 if found.dtype == np.float32 else 2.0**-10
    seen = np.isfinite(expected)
    assert np.array_equal(seen, np.isfinite(found))
    largest = np.max(np.abs(expected[seen].astype(np.float64)), initial=1e-30)
    assert np.max(np.abs(found[seen].astype(np.float64) - expected[seen]), initial=0) <= tolerance * largest


@pytest.mark.parametrize("name", NAMES)
def test_the_verifier_finds_buffers_of_different_engines_in_one_bank(
    name: str, built: dict[str, dict[str, Example]]
) -> None:
    """The buffers one after the other, as without banks, touch in the banks where one ends and the next begins."""
    kernel, scalars, _ = built["16 banks of 128 KiB"][name]
    moved = replace(kernel, buffers=laid_out(kernel.name, kernel.buffers, PLAIN.core.sram))
    assert kernel_violations(moved, PLAIN, scalars) == []
    found = kernel_violations(moved, BANKED, scalars)
    assert {one.kind for one in found} == ({"bank"} if len(groups(kernel)) > 1 else set())
    assert all(one.kernel == kernel.name for one in found)


def test_what_is_said_of_two_buffers_in_one_bank_names_them_their_engines_and_the_bank() -> None:
    kernel = gemm(BANKED, 70, 203, 129)
    x, w, acc, *rest = kernel.buffers
    assert [one.name for one in (x, w, acc)] == ["x", "w", "acc"]
    moved = replace(kernel, buffers=(replace(x, offset=acc.offset + (acc.end - acc.offset)), w, acc, *rest))
    found = kernel_violations(moved, BANKED, [{}])
    (bank,) = {acc.end // (128 << 10)}
    text = f"bank: linear: buffer `acc` (matrix -> vector) and buffer `x` (dma_in -> matrix) share bank {bank}"
    assert text in [str(one) for one in found]


def test_buffers_of_the_same_engines_may_share_a_bank_and_bytes_are_still_their_own() -> None:
    kernel = gemm(BANKED, 70, 203, 129)
    x, w = kernel.buffers[:2]
    assert x.end == w.offset
    assert w.offset // BANKED.core.sram.bank_bytes == 0  # type: ignore[operator]
    over = replace(kernel, buffers=(x, replace(w, offset=x.offset), *kernel.buffers[2:]))
    assert {one.kind for one in kernel_violations(over, BANKED, [{}])} == {"overlap"}


COS, SIN = (param(name, "in", "f32", (64, 16)) for name in ("COS", "SIN"))
ROWS = [param(name, mode, "f32", (13, 100)) for name, mode in (("X", "in"), ("Y", "out"), ("R", "in"), ("S", "out"))]
WIDE = param("W", "in", "f32", (100,))
NEEDS: dict[str, tuple[int, Callable[[Target], Kernel]]] = {
    "rms_norm": (3, lambda target: rms_norm(ROWS[0], WIDE, ROWS[1], 1e-5, target)),
    "add_rms_norm": (3, lambda target: add_rms_norm(ROWS[0], ROWS[2], WIDE, ROWS[1], ROWS[3], 1e-5, target)),
    "layer_norm": (3, lambda target: layer_norm(ROWS[0], WIDE, None, ROWS[1], 1e-5, target)),
    "swiglu": (2, lambda target: elementwise("silu_mul", ROWS[0], ROWS[2], ROWS[1], target)),
    "rotary": (
        2,
        lambda target: rotary(
            param("X", "in", "f32", (3, 13, 32)), COS, SIN, param("Y", "out", "f32", (3, 13, 32)), False, target
        ),
    ),
    "linear": (2, lambda target: gemm(target, 13, 100, 129, "f32", "f32")),
    "linear_w8": (4, lambda target: gemm(target, 13, 100, 129, "i8")),
    "linear+bias+swiglu": (5, lambda target: _fused(["bias", "swiglu"], target)),
    "attention": (4, lambda target: attend(target, 13, 64, "f32", False)),
    "attention_i8": (6, lambda target: attend(target, 13, 64, "i8", True)),
}


def _fused(steps: list[str], target: Target) -> Kernel:
    params, after = fused(steps, 19, 3 * HEAD, 71)
    return linear(*params, target, None, after)


@pytest.mark.parametrize("name", NEEDS)
def test_a_kernel_with_buffers_of_more_sets_of_engines_than_banks_is_refused(name: str) -> None:
    needed, build = NEEDS[name]
    for banks in (1, needed - 1):
        with pytest.raises(UserError) as caught:
            build(small(banks, (2 << 20) // banks // 64 * 64 * banks))
        expected = f"{name} has buffers of {needed} different sets of engines, but core.sram.banks = {banks}"
        assert str(caught.value).splitlines()[0] == f"kernel {expected}"
    kernel = build(small(needed, (2 << 20) // needed // 64 * 64 * needed))
    assert len(groups(kernel)) == needed


@pytest.mark.parametrize("steps", [[], *EPILOGUES.values()], ids=["nothing", *EPILOGUES])
@pytest.mark.parametrize("weights", ["f16", "i8"])
@pytest.mark.parametrize("banks", [8, 16, 40])
def test_the_space_of_tiles_counts_whole_banks(steps: list[str], weights: str, banks: int) -> None:
    target = small(banks, 40_960)
    params, after = fused(steps, 37, 5 * HEAD, 100, weights)
    for one in linear_space(LinearShape.of(*params, after), target, 60).best:
        kernel = linear(*params, target, one.tiles, after)
        assert kernel.sram_bytes == one.sram <= target.core.sram.bytes
        assert kernel_violations(kernel, target, [{"pos": 3}] if kernel.scalars else [{}]) == []


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 300),
    width=st.integers(1, 900),
    heads=st.integers(1, 4),
    banks=st.sampled_from([4, 8, 12, 24]),
    dtype=st.sampled_from(["f32", "f16"]),
    name=st.sampled_from(["rms_norm", "add_rms_norm", "layer_norm", "swiglu", "rotary", "attention"]),
)
def test_tiles_of_rows_fit_their_banks(rows: int, width: int, heads: int, banks: int, dtype: str, name: str) -> None:
    """Or the kernel is refused for want of memory: nothing is built that the verifier refuses."""
    target = small(banks, 24 << 10)
    x, y, r, s = (param(one.name, one.mode, dtype, (rows, width)) for one in ROWS)
    w = param("W", "in", dtype, (width,))
    half = 4 * (1 + width % 20)
    turned = [param(n, m, dtype, (heads, rows, 2 * half)) for n, m in (("X", "in"), ("Y", "out"))]
    cos, sin = (param(n, "in", dtype, (rows, half)) for n in ("COS", "SIN"))
    c = param("C", "in", dtype, (width,))
    makers: dict[str, Callable[[], Kernel]] = {
        "rms_norm": lambda: rms_norm(x, w, y, 1e-5, target),
        "add_rms_norm": lambda: add_rms_norm(x, r, w, y, s, 1e-5, target),
        "layer_norm": lambda: layer_norm(x, w, c, y, 1e-5, target),
        "swiglu": lambda: elementwise("silu_mul", x, r, y, target),
        "rotary": lambda: rotary(turned[0], cos, sin, turned[1], False, target),
        "attention": lambda: attend(target, rows, rows, "f32", False, group=heads, width=8 * (1 + width % 16)),
    }

    try:
        kernel = makers[name]()
    except UserError as error:
        if "fit" not in str(error):
            raise
        return
    assert kernel.sram_bytes <= target.core.sram.bytes
    offsets = laid_out(kernel.name, kernel.buffers, target.core.sram)
    assert kernel.buffers == offsets


MODELS = {
    "prefill": Llama(length=3, context=8),
    "prefill, int8 weights and KV, 2 ranks": Llama(length=3, context=8, layers=1, ranks=2, int8_weights=True, kv="int8"),
    "decode, new tokens quantised": Llama(length=1, context=8, kv="int8-quantised"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_is_lowered_verified_and_executed_on_a_machine_with_banks(name: str) -> None:
    model = MODELS[name]
    graph, phase = model.graph(), "prefill" if model.length > 1 else "decode"
    found = []
    for target in (PLAIN, BANKED):
        program = Program.from_text(lower(graph, target, phase=phase).to_text())
        verify(program, target)
        weights = [rank_weights(program, graph, rank) for rank in range(model.ranks)]
        found.append(ProgramBase(name, model, program, weights))
        assert simulate_time(program, target).cycles > 0
    plain, banked = found
    assert plain.program.to_text() != banked.program.to_text()
    good = [one for one in program_results(plain, plain.program) if one is not None]
    assert len(good) == 8
    assert same(good, program_results(banked, banked.program))


def test_a_command_takes_banks_as_a_what_if_and_refuses_the_schedule_of_a_machine_without(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file, size = tmp_path / "gemm.schedule", ["--m", "64", "--n", "200", "--k", "300"]
    machine = ["--target", "vacc-reference", "--what-if", "core.sram.banks=16"]
    assert main(["schedule", "gemm", *size, *machine, "-o", str(file)]) == 0
    assert main(["schedule", "check", str(file), *machine, "--execute"]) == 0
    text = file.read_text()
    changed = overlay(PLAIN, {"core.sram.banks": 16})
    assert f"target={changed.name} sha={changed.sha}" in text
    (kernel,) = Program.from_text(text).kernels
    moved = replace(kernel, buffers=laid_out(kernel.name, kernel.buffers, None))
    file.write_text(text.replace(print_kernel(kernel), print_kernel(moved)))
    capsys.readouterr()
    assert main(["schedule", "check", str(file), *machine]) == 1
    assert "bank: linear" in capsys.readouterr().err
    few = ["--target", "vacc-reference", "--what-if", "core.sram.banks=1"]
    assert main(["schedule", "gemm", *size, *few]) == 2
    assert "core.sram.banks = 1" in capsys.readouterr().err

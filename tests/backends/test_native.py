"""Native code computes what the value simulator computes: the same tiles, the same values, and the same refusals."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vacc_opt.backends.vacc import Program, ScheduleError, ValueSimulator, load_target, lower
from vacc_opt.backends.vacc.epilogue import Epilogue
from vacc_opt.backends.vacc.kernels.builder import param
from vacc_opt.backends.vacc.kernels.collectives import reduce_scatter
from vacc_opt.backends.vacc.kernels.elementwise import elementwise
from vacc_opt.backends.vacc.kernels.embedding import embedding
from vacc_opt.backends.vacc.kernels.linear import linear
from vacc_opt.backends.vacc.kernels.rotary import rotary
from vacc_opt.backends.vacc.native import NativeProgram, find_compiler
from vacc_opt.backends.vacc.native.build import build
from vacc_opt.backends.vacc.native.emit import emit
from vacc_opt.backends.vacc.native.operations import OPERATIONS
from vacc_opt.backends.vacc.ops import PRIMITIVES
from vacc_opt.backends.vacc.schedule import Kernel, Loop, Scope
from vacc_opt.backends.vacc.text import parse_kernel, print_kernel
from vacc_opt.ir import DType, UserError
from vacc_opt.tests.backends.conftest import TARGETS, machine, zoo
from vacc_opt.tests.backends.llama import Llama, inputs
from vacc_opt.tests.backends.natives import results, together, values
from vacc_opt.tests.backends.pack import empty_caches, rank_weights

Array = npt.NDArray[Any]
RANKS = 3
HALF = 2.0**-10  # one f16 rounding of a result
# f32: a sum in another order, and exp, tanh and erf to their last bits, relative to the largest output
FLOAT = 2e-6
# no product of matrices and no exp, tanh or erf: equal in every bit, sums of rows included
EXACT = {
    "add", "all_gather", "all_reduce", "copy", "embedding", "embedding_shard", "kv_append", "kv_append_i8",
    "layer_norm", "layer_norm_plain", "reduce_scatter", "rms_norm", "rotary", "rotary_interleaved", "select_row",
}  # fmt: skip


def compiler_is_missing() -> str:
    try:
        find_compiler()
    except UserError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(compiler_is_missing()), reason=compiler_is_missing() or "there is a C compiler")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing is taken from or left in the cache of the person who runs the tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def kernels(name: str) -> tuple[dict[str, Kernel], list[dict[str, dict[str, int]]]]:
    """One kernel of every kind for a machine, f16 and odd sizes too, and three settings of their run-time scalars."""
    target = machine(name)
    made = zoo(target)
    found = {kind: kernel for kind, (kernel, _) in made.items()}
    scalars = {kind: settings for kind, (_, settings) in made.items()}
    for m, n, k in ((1, 1, 1), (1, 131, 257), (7, 64, 67), (5, 300, 1201)):
        for weights, activations in (("f16", "f16"), ("f32", "f32"), ("i8", "f16")):
            scale = param("S", "in", "f32", (n,)) if weights == "i8" else None
            x, w = param("X", "in", activations, (m, k)), param("W", "in", weights, (n, k))
            kernel = linear(x, w, scale, param("Y", "out", activations, (m, n)), target)
            found[f"linear_{m}_{n}_{k}_{weights}_{activations}"] = kernel
    half = [param(one, mode, "f16", (29, 543)) for one, mode in (("A", "in"), ("B", "in"), ("Y", "out"))]
    found["swiglu_f16"] = elementwise("silu_mul", half[0], half[1], half[2], target)
    # X lies as [S, heads, D] and is read as [heads, S, D]; only 12 of 16 channels turn
    turned = [param(one, mode, "f16", (3, 11, 16), (16, 48, 1)) for one, mode in (("X", "in"), ("Y", "out"))]
    tables = [param(one, "in", "f16", (64, 6)) for one in ("COS", "SIN")]
    found["rotary_interleaved"] = rotary(turned[0], *tables, turned[1], True, target)
    scalars["rotary_interleaved"] = [{"pos": pos} for pos in (0, 5, 53)]
    shard = param("T", "in", "f32", (10, 33)), param("IDS", "in", "i64", (5,)), param("FIRST", "in", "i64", ())
    found["embedding_shard"] = embedding(*shard, param("Y", "out", "f32", (5, 33)), target)
    scatter = param("X", "in", "f16", (RANKS, 20_000)), param("Y", "out", "f16", (20_000,))
    found["reduce_scatter"] = reduce_scatter(*scatter)
    x, w = param("X", "in", "f16", (19, 67)), param("W", "in", "f16", (131, 67))
    y = param("Y", "out", "f16", (19, 131))
    found["linear_all_reduce"] = linear(x, w, None, y, target, after=Epilogue(ranks=RANKS))
    pick = [{kind: options[at % len(options)] for kind, options in scalars.items()} for at in range(3)]
    return found, [{kind: one.get(kind, {}) for kind in found} for one in pick]


def compare(name: str, found: Array, expected: Array, what: str) -> None:
    assert found.dtype == expected.dtype
    if name in EXACT:
        assert np.array_equal(found, expected), f"{name}: {what}"
        return
    tolerance = FLOAT if found.dtype == np.float32 else HALF
    largest = float(np.max(np.abs(expected.astype(np.float64))))
    assert np.all(np.isfinite(expected.astype(np.float64)))
    error = float(np.max(np.abs(found.astype(np.float64) - expected)))
    assert error <= tolerance * largest, f"{name}: {what}: {error / largest:.2e} of the largest output"


@pytest.mark.parametrize("name", [TARGETS[-1], *(pytest.param(one, marks=pytest.mark.full) for one in TARGETS[:-1])])
def test_every_kernel_computes_what_the_simulator_computes(name: str) -> None:
    """SRAM and each slot of a ring hold NaN before they are written, in both."""
    made, settings = kernels(name)
    program = Program.from_text(together(made, machine(name), RANKS).to_text())
    native = NativeProgram(program, [{}] * RANKS, poison=True)
    simulator = ValueSimulator(program, [{}] * RANKS)
    for seed, scalars in enumerate(settings):
        given = values(program, scalars, seed)
        found, expected = results(native, program, given), results(simulator, program, given)
        for rank in range(RANKS):
            assert found[rank].keys() == expected[rank].keys()
            for tensor, array in expected[rank].items():
                compare(tensor.partition(".")[0], found[rank][tensor], array, f"{scalars}, rank {rank}, {tensor}")
    assert native.tiles_executed == simulator.tiles_executed > 1000


def test_every_primitive_has_native_code() -> None:
    assert OPERATIONS.keys() == PRIMITIVES.keys()


def lanes(x: Array, w: Array) -> Array:
    """X @ w.T as `products.c` says: eight lanes over k, lane k mod 8, added as ((0+1)+(2+3))+((4+5)+(6+7))."""
    depth = -(-x.shape[1] // 8) * 8
    left, right = (np.zeros((len(one), depth), np.float32) for one in (x, w))
    left[:, : x.shape[1]], right[:, : x.shape[1]] = x, w
    sums = np.zeros((len(x), len(w), 8), np.float32)
    for at in range(0, depth, 8):
        sums += left[:, None, at : at + 8] * right[None, :, at : at + 8]
    s = [sums[..., lane] for lane in range(8)]
    return np.asarray(((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])))


def test_a_product_is_summed_in_the_order_that_is_written_down() -> None:
    """Bit for bit, for few and for many rows; tiles of k are added one after the other."""
    made, settings = kernels(TARGETS[-1])
    program = together(made, machine(TARGETS[-1]), RANKS)
    native = NativeProgram(program, [{}] * RANKS, poison=True)
    given = values(program, settings[0])
    found = results(native, program, given)[0]
    names = [name for name in made if name.startswith("linear_") and name.endswith("f32_f32")]
    assert {made[name].param["X"].shape[0] for name in names} == {1, 5, 7}
    for name in names:
        x, w = (given[0][f"{name}.{one}"].reshape(made[name].param[one].shape) for one in "XW")
        tile = min(made[name].buffer[one].shape[1] for one in "xw")  # what stays is a panel of all K
        parts = [lanes(x[:, at : at + tile], w[:, at : at + tile]) for at in range(0, x.shape[1], tile)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        assert np.array_equal(found[f"{name}.Y"], total), name


def test_the_number_of_threads_changes_no_bit() -> None:
    made, settings = kernels(TARGETS[-1])
    program = together(made, machine(TARGETS[-1]), RANKS)
    given = values(program, settings[1])
    first, *others = (
        results(NativeProgram(program, [{}] * RANKS, threads=threads, poison=True), program, given)
        for threads in (1, 2, 5)
    )
    for other in others:
        for rank in range(RANKS):
            assert all(np.array_equal(other[rank][tensor], array) for tensor, array in first[rank].items())


@pytest.mark.full
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other instruction set is one of x86-64")
def test_a_cpu_without_avx_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of four, halves converted in software: what a CPU has decides how long it takes and nothing else."""
    made, settings = kernels(TARGETS[-1])
    program = together(made, machine(TARGETS[-1]), RANKS)
    given = values(program, settings[1])
    expected = results(NativeProgram(program, [{}] * RANKS, poison=True), program, given)
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {find_compiler().command} "$@" -mno-avx -mno-avx2 -mno-f16c\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert "__AVX__" not in find_compiler().macros
    found = results(NativeProgram(program, [{}] * RANKS, poison=True), program, given)
    for rank in range(RANKS):
        for tensor, array in expected[rank].items():
            assert np.array_equal(found[rank][tensor], array), tensor


def test_the_text_does_not_depend_on_the_hash_seed_and_keeps_loops() -> None:
    made, _ = kernels(TARGETS[0])
    program = together(made, machine(TARGETS[0]), RANKS)
    text = emit(program).text
    assert text == emit(Program.from_text(program.to_text())).text
    loops = sum(line.count("for (e->") for line in text.splitlines())
    written = sum(1 for kernel in program.kernels for line in print_kernel(kernel).splitlines() if " in " in line)
    assert 0 < loops <= written


@pytest.fixture(scope="module")
def broken() -> Callable[[str], Program]:
    """Programs of one call each, of a kernel that breaks a rule when it runs; all are compiled together."""
    target = load_target("vacc-reference")
    line = [param(name, mode, "f32", (4, 64)) for name, mode in (("A", "in"), ("Y", "out"))]
    text = print_kernel(elementwise("tanh", line[0], None, line[1], target))
    texts = {
        "fine": text,
        "unused": text.replace("x2 @0 dma_in -> vector", "x2 @0 dma_in -> vector, dma_out"),
        "unread": _without(text, "engine dma_out"),
        "lost": _without(text, "engine dma_in"),
        "shape": text.replace("<- tanh(a[0:|m|, 0:|n|]", "<- tanh(a[0:|m|, 0:|n|-1]"),
        "beyond": text.replace("load(A[m:m+|m|", "load(A[m+pos:m+|m|+pos").replace(") {", ") with pos {", 1),
    }
    made = {name: parse_kernel(one) for name, one in texts.items()}
    table = param("T", "in", "f32", (500, 96)), param("IDS", "in", "i64", (5,)), None, param("Y", "out", "f32", (5, 96))
    made["row"] = embedding(*table, target)
    program = together(made, target, 1)
    calls = {call.kernel: call for call in program.calls}
    return lambda name: replace(program, calls=(calls[name],))


def _without(text: str, tree: str) -> str:
    """The text of a kernel without the tree of an engine."""
    before, _, after = text.partition(f"  {tree} {{\n")
    return before + after.partition("\n  }\n")[2]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("unused", "lost-signal", "left unread"),
        ("unread", "lost-signal", "left unread"),
        ("lost", "lost-signal", "wait for slots"),
        ("shape", "operands", "tanh.*do not fit"),
        ("beyond", "bounds", "load.*|lies outside"),
        ("row", "operands", "outside of the table"),
    ],
)
def test_what_the_simulator_refuses_is_refused(
    name: str, kind: str, message: str, broken: Callable[[str], Program]
) -> None:
    """Without a read or write outside of a tensor, on any number of threads."""
    program = broken(name)
    given = values(program, {kernel.name: {"pos": 1} if kernel.scalars else {} for kernel in program.kernels})
    given[0]["row.IDS"][3] = 500
    for threads in (1, 2):
        with pytest.raises(ScheduleError, match=message) as caught:
            results(NativeProgram(program, [{}], threads=threads), program, given)
        assert [(one.kind, one.kernel) for one in caught.value.violations] == [(kind, name)]
    with pytest.raises(ScheduleError):
        results(ValueSimulator(program, [{}]), program, given)


def test_a_program_runs_again_after_a_refusal(broken: Callable[[str], Program]) -> None:
    program = broken("fine")
    given = values(program, {kernel.name: {"pos": 0} if kernel.scalars else {} for kernel in program.kernels})
    found = results(NativeProgram(program, [{}]), program, given)
    assert np.allclose(found[0]["fine.Y"], np.tanh(given[0]["fine.A"].reshape(4, 64)))


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("<- tanh(", "<- mma(", "op"),
        ("load(A[m:m+|m|", "load(A[q:m+|m|", "name"),
        ("load(A[", "load(B[", "name"),
        ("use a {", "use y {", "scope"),
        ("load(A[m:m+|m|, n:n+|n|]", "load(A[m:m+|m|, 0:65]", "bounds"),
    ],
)
def test_text_without_a_meaning_is_refused_before_it_is_compiled(old: str, new: str, kind: str) -> None:
    target = load_target("vacc-reference")
    line = [param(name, mode, "f32", (4, 64)) for name, mode in (("A", "in"), ("Y", "out"))]
    text = print_kernel(elementwise("tanh", line[0], None, line[1], target))
    assert old in text
    kernel = parse_kernel(text.replace(old, new))
    with pytest.raises(ScheduleError) as caught:
        emit(together({"broken": kernel}, target, 1))
    assert caught.value.violations[0].kind == kind


def test_names_that_are_no_c_names_are_refused() -> None:
    text = "kernel k(in X f32[4], out Y f32[4]) {\n  engine link {\n  }\n}\n"
    kernel = replace(parse_kernel(text), params=(param("X;exit;", "in", "f32", (4,)),))
    with pytest.raises(ScheduleError, match="no name in C"):
        emit(together({"k": kernel}, load_target("vacc-reference"), 1))


def test_a_kernel_name_cannot_end_a_comment() -> None:
    kernel = parse_kernel("kernel k*/(in X f32[4]) {\n}\n")
    program = together({"k": kernel}, load_target("vacc-reference"), 1)
    named = replace(program, kernels=(replace(kernel, name="k*/"),))
    assert "*/(" not in emit(named).text
    assert "k*/" not in emit(named).text


def both(m: Llama) -> tuple[Program, Any, Any]:
    """The native program of a small llama and the simulator, on the same weights."""
    graph = m.graph()
    phase = "prefill" if m.length > 1 else "decode"
    program = Program.from_text(lower(graph, load_target("vacc-reference"), phase=phase).to_text())
    weights = [rank_weights(program, graph, rank) for rank in range(m.ranks)]
    return program, NativeProgram(program, weights, poison=True), ValueSimulator(program, weights)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"int8_weights": True, "kv": "int8", "dtype": DType.FLOAT16}, id="fp16, int8 weights and KV"),
        pytest.param(
            {"int8_weights": True, "kv": "int8", "alibi": True, "window": 4, "clamp": 0.4, "softcap": 0.5, "batch": 2},
            id="int8 weights and KV, ALiBi, window and limits, two rows",
            marks=pytest.mark.full,
        ),
    ],
)
def test_prefill_and_decode_of_a_whole_model_are_those_of_the_simulator(options: dict[str, Any], ranks: int) -> None:
    """A prompt of 5 tokens, then four tokens one by one, each engine on its own caches."""
    m = Llama(ranks=ranks, **options)
    program, *prefill = both(m)
    _, *decode = both(replace(m, length=1))
    caches = [empty_caches(program) for _ in prefill]
    start = list(range(m.batch))
    logits = [one.run(inputs(m, start, [5] * m.batch), own)["logits"] for one, own in zip(prefill, caches, strict=True)]
    steps = [logits]
    for step in range(4):
        feeds = inputs(replace(m, length=1), [at + 5 + step for at in start], [1] * m.batch, seed=step)
        steps.append([one.run(feeds, own)["logits"] for one, own in zip(decode, caches, strict=True)])
    # f16 activations are rounded to 11 bits some twenty times on the way to the logits
    tolerance = 1e-5 if m.dtype == DType.FLOAT else 8 * 2.0**-11
    for found, expected in steps:
        wide = expected.astype(np.float64)
        assert np.max(np.abs(found - wide)) <= tolerance * np.max(np.abs(wide))
    for found, expected in zip(*caches, strict=True):
        for name, codes in expected.items():
            apart = np.abs(found[name].astype(np.float64) - codes)
            assert np.max(apart) <= (1 if codes.dtype == np.int8 else tolerance * np.max(np.abs(codes)))
    assert prefill[0].tiles_executed == prefill[1].tiles_executed > 0


def test_a_program_is_compiled_once(cache: Path, broken: Callable[[str], Program]) -> None:
    program = broken("fine")
    first = NativeProgram(program, [{}]).library
    made = {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}
    assert NativeProgram(program, [{}]).library == first
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()} == made
    assert {file.suffix for file in made} == {".o", ".so"}  # nothing half-written, no C text


def test_another_compiler_or_cpu_makes_another_library(broken: Callable[[str], Program], tmp_path: Path) -> None:
    program = broken("fine")
    first = NativeProgram(program, [{}]).library
    other = tmp_path / "cc"
    other.write_text(f'#!/bin/sh\nexec {find_compiler().command} "$@" -DANOTHER\n')
    other.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", str(other))
        assert NativeProgram(program, [{}]).library != first


def test_a_missing_compiler_is_named(broken: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UserError, match="'no-such-compiler', the C compiler that CC names, is not on the PATH"):
        NativeProgram(broken("fine"), [{}])
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="there is no C compiler"):
        NativeProgram(broken("fine"), [{}])


def test_a_cache_that_cannot_be_written_is_named(
    broken: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot keep a compiled program in"):
        NativeProgram(broken("fine"), [{}])


def test_a_damaged_library_is_named(
    broken: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = build(emit(broken("row")))
    library.unlink()
    library.write_bytes(b"half of a library")
    with pytest.raises(UserError, match=f"{library.name} cannot be loaded"):
        NativeProgram(broken("row"), [{}])


def statements(kernel: Kernel) -> int:
    def count(body: Any) -> int:
        return sum(1 + (count(one.body) if isinstance(one, Loop | Scope) else 0) for one in body)

    return sum(count(tree) for _, tree in kernel.trees)


def test_the_text_grows_with_the_statements_and_not_with_the_sizes() -> None:
    target = load_target("vacc-reference")
    sizes = []
    for n in (512, 4096, 32768):
        x, w = param("X", "in", "f16", (1, 4096)), param("W", "in", "f16", (n, 4096))
        kernel = linear(x, w, None, param("Y", "out", "f16", (1, n)), target)
        text = emit(together({"k": kernel}, target, 1)).text
        sizes.append(text.count("\n") / statements(kernel))
    assert max(sizes) <= 1.1 * min(sizes)

"""The verifier refuses programs whose caches, outputs or products go wrong although every call is valid alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

import pytest

from vacc_opt.backends.vacc import Program, load_target, lower
from vacc_opt.backends.vacc.kernels.builder import param
from vacc_opt.backends.vacc.kernels.linear import linear
from vacc_opt.backends.vacc.schedule import Argument, Call, Kernel
from vacc_opt.backends.vacc.single import single
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.text import parse_kernel, print_kernel
from vacc_opt.backends.vacc.verify import check
from vacc_opt.backends.vacc.verify_caches import cache_violations
from vacc_opt.backends.vacc.verify_kernel import kernel_violations
from vacc_opt.ir import UserError
from vacc_opt.tests.backends.llama import Llama

TARGET = load_target("vacc-reference")
CACHES = ["float", "int8-quantised", "int8"]
HALVES = [("m:m+3", "0:3"), ("m+3:m+|m|", "3:|m|")]  # rows of X and of its tile
FIRST, SECOND = "past_key_values.0.", "past_key_values.1."


@lru_cache
def llama(kv: str, batch: int = 1, length: int = 5) -> Program:
    """A lowered model of two layers; `int8` attends the new tokens as floats, beside the cache."""
    return lower(Llama(kv=kv, batch=batch, length=length).graph(), TARGET, phase="prefill" if length > 1 else "decode")


def ordered(program: Program, calls: Iterable[Call]) -> Program:
    return replace(program, calls=tuple(replace(call, index=index) for index, call in enumerate(calls)))


def of_layer(program: Program, kind: str, cache: str) -> list[Call]:
    """Calls of a kind of kernel that touch a cache of a layer."""
    return [
        call
        for call in program.calls
        if call.kernel.startswith(kind) and any(one.tensor.startswith(cache) for one in call.arguments)
    ]


def appends(program: Program, cache: str) -> list[Call]:
    """Calls that write new rows into a cache of a layer."""
    written = [[one.tensor for one in call.arguments if one.name == "CACHE"] for call in program.calls]
    return [call for call, names in zip(program.calls, written, strict=True) if any(n.startswith(cache) for n in names)]


def with_arguments(program: Program, call: Call, change: Callable[[Argument], Argument]) -> Program:
    changed = replace(call, arguments=tuple(change(one) for one in call.arguments))
    return replace(program, calls=tuple(changed if one.index == call.index else one for one in program.calls))


def after_attention(program: Program) -> Program:
    """The appends of the first layer follow its attention."""
    late = appends(program, FIRST)
    (attention,) = of_layer(program, "attention", FIRST)
    calls = [one for one in program.calls if one not in late]
    at = calls.index(attention) + 1
    return ordered(program, [*calls[:at], *late, *calls[at:]])


def kinds(program: Program) -> set[str]:
    return {one.kind for one in cache_violations(program, TARGET)}


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize(("batch", "length"), [(1, 5), (2, 5), (2, 1)])
def test_a_lowered_model_raises_no_false_alarm(kv: str, batch: int, length: int) -> None:
    assert check(llama(kv, batch, length), TARGET) == []


@pytest.mark.parametrize("kv", CACHES)
def test_a_layer_that_appends_nothing_is_uncovered(kv: str) -> None:
    program = llama(kv)
    lost = appends(program, FIRST)
    assert len(lost) == 2
    found = check(ordered(program, [one for one in program.calls if one not in lost]), TARGET)
    assert f"uncovered: llama: new rows of cache `{FIRST}key` are not all written" in map(str, found)


@pytest.mark.parametrize("kv", ["float", "int8-quantised"])
def test_attention_that_reads_new_rows_from_the_cache_must_follow_the_append(kv: str) -> None:
    assert kinds(after_attention(llama(kv))) == {"RAW"}


def test_attention_that_is_given_the_new_rows_apart_may_come_before_the_append() -> None:
    assert kinds(after_attention(llama("int8"))) == set()


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize(("own", "other"), [(FIRST, SECOND), (SECOND, FIRST)])
def test_attention_over_the_cache_of_another_layer_is_found(kv: str, own: str, other: str) -> None:
    program = llama(kv)
    (attention,) = of_layer(program, "attention", own)
    wrong = with_arguments(program, attention, lambda one: replace(one, tensor=one.tensor.replace(own, other)))
    found = kinds(wrong)
    assert "uncovered" in found  # nobody reads the old rows of the right cache
    assert kv != "int8" or "coverage" in found  # nor are the new rows those of the wrong one


def test_two_layers_that_read_each_others_int8_cache_are_found() -> None:
    program = llama("int8")
    for own, other in ((FIRST, SECOND), (SECOND, FIRST)):
        (call,) = of_layer(llama("int8"), "attention", own)
        program = with_arguments(
            program, call, lambda one, own=own, other=other: replace(one, tensor=one.tensor.replace(own, other))
        )
    assert kinds(program) == {"coverage"}


def test_an_append_into_the_cache_of_another_layer_writes_it_twice() -> None:
    program = llama("float")
    call = appends(program, FIRST)[0]
    wrong = with_arguments(program, call, lambda one: replace(one, tensor=one.tensor.replace(FIRST, SECOND)))
    assert {"WAW", "uncovered"} <= kinds(wrong)


def test_an_append_at_the_position_of_another_row_of_the_batch_is_found() -> None:
    program = llama("float", batch=2)
    call = appends(program, FIRST)[0]
    scalars = tuple(replace(one, offset=1 - one.offset) for one in call.scalars)
    calls = tuple(replace(one, scalars=scalars) if one.index == call.index else one for one in program.calls)
    assert {"WAW", "uncovered"} <= kinds(replace(program, calls=calls))


@pytest.mark.parametrize("length", [1, 5])
def test_rows_of_a_window_that_no_loop_visits_are_found(length: int) -> None:
    """Nothing but the attribute says that rows further back than 6 may be left out."""
    program = lower(Llama(length=length, window=6).graph(), TARGET, phase="prefill")
    assert check(program, TARGET) == []
    text = program.to_text()
    start = "max(0, m+pos-5)"
    assert start in text
    assert "uncovered" in kinds(Program.from_text(text.replace(start, "max(0, m+pos-3)")))
    assert kinds(Program.from_text(text.replace("window=6", "window=4"))) == set()
    assert "uncovered" in kinds(Program.from_text(text.replace(", window=6", "")))


# Products


def gemm() -> Kernel:
    """Y[6, 40] = X[6, 50] @ W[40, 50]^T."""
    x, w = param("X", "in", "f32", (6, 50)), param("W", "in", "f32", (40, 50))
    return linear(x, w, None, param("Y", "out", "f32", (6, 40)), TARGET)


def line_with(text: str, part: str) -> str:
    return next(line for line in text.splitlines() if part in line)


def violations(text: str, scalars: dict[str, int] | None = None, target: Target = TARGET) -> list[str]:
    return [str(one) for one in kernel_violations(parse_kernel(text), target, [scalars or {}])]


def test_a_second_mma_that_adds_the_product_again_is_found() -> None:
    text = print_kernel(gemm())
    mma = line_with(text, "<- mma(")
    again = mma[: mma.index("first=")] + "first=1)"
    found = violations(text.replace(mma, f"{mma}\n{again}"))
    assert any(one.startswith("coverage") and "two mma cover" in one for one in found)


def in_two_loads(text: str, tiles: Sequence[str] = ()) -> str:
    """A tile of X is filled by two loads, of which each goes to its own half, or to those given."""
    load = line_with(text, "load(X")
    places = tiles or [tile for _, tile in HALVES]
    top, rest = (
        load.replace("m:m+|m|", rows).replace("0:|m|", to) for (rows, _), to in zip(HALVES, places, strict=True)
    )
    return text.replace(load, f"{top}\n{rest}")


def test_a_tile_may_be_loaded_in_parts_that_lie_as_in_the_parameter() -> None:
    assert violations(in_two_loads(print_kernel(gemm()))) == []
    swapped = in_two_loads(print_kernel(gemm())).replace("X[m:m+3,", "X[m+1:m+4,")
    assert any(one.startswith("coverage") for one in violations(swapped))


def test_a_loaded_operand_that_cannot_be_followed_is_refused_in_an_unknown_family() -> None:
    """The halves of a tile of X lie in each other's place, so no rows of X say what the product multiplies."""
    text = print_kernel(gemm()).replace("kernel linear(", "kernel foreign(")
    found = violations(in_two_loads(text, [tile for _, tile in reversed(HALVES)]))
    assert any(one.startswith("coverage") and "cannot be followed" in one for one in found)


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("mma(", lambda line: f"{line}\n{line.replace('first=0', 'first=1')}", "two mma add k 0:32"),
        ("mma_nn(", lambda line: f"{line}\n{line.replace('first=0', 'first=1')}", "two mma add k"),
        ("mma(", lambda line: line.replace("0:32", "0:31"), "no mma adds k 31:32"),
        ("mma(", lambda line: line.replace("0:32", "1:32", 1).replace("0:32", "0:31", 1), "multiplies k 1:32"),
    ],
    ids=["scores twice", "values twice", "a lost channel", "shifted channels"],
)
def test_a_product_of_attention_sums_each_k_once(
    make_attention: Callable[..., Kernel], kind: str, change: Callable[[str], str], expected: str
) -> None:
    text = print_kernel(make_attention(TARGET, 13, 64, "f32", False))
    line = line_with(text, f"<- {kind}")
    assert violations(text, {"pos": 7}) == []
    found = violations(text.replace(line, change(line)), {"pos": 7})
    assert any(expected in one for one in found)


def test_accumulators_beyond_those_of_the_array_are_refused() -> None:
    kernel = gemm()
    size = sum(one.depth * one.slot_bytes for one in kernel.buffers if one.producer == "matrix")
    for space, expected in ((size, []), (size - 1, [f"accumulators need {size} bytes of {size - 1}"])):
        acc = TARGET.core.matrix.acc.model_copy(update={"bytes": space})
        matrix = TARGET.core.matrix.model_copy(update={"acc": acc})
        target = TARGET.model_copy(update={"core": TARGET.core.model_copy(update={"matrix": matrix})})
        assert [one.message for one in kernel_violations(kernel, target, [{}])] == expected


# Names and outputs


@pytest.mark.parametrize(
    ("part", "message"),
    [("  ring x", "`x` is declared twice"), ("  engine vector", "has a tree already")],
)
def test_a_name_that_is_given_twice_is_refused_with_its_line(part: str, message: str) -> None:
    text = print_kernel(gemm())
    extra = line_with(text, "  ring x") if "ring" in part else "  engine dma_in {\n  }"
    at = text.index("  engine matrix")
    broken = text[:at] + extra + "\n" + text[at:] if "engine" in part else text.replace(extra, extra + "\n" + extra)
    with pytest.raises(UserError, match="line") as caught:
        parse_kernel(broken)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["X f32[6, 50], in X", "x"])
def test_a_parameter_and_another_thing_of_one_name_are_refused(name: str) -> None:
    text = print_kernel(gemm()).replace("in X", f"in {name}", 1)
    text = text.replace("(X[", f"({name}[") if name == "x" else text
    with pytest.raises(UserError, match="declared twice"):
        parse_kernel(text)


def test_a_kernel_object_with_two_trees_of_one_engine_is_refused() -> None:
    kernel = gemm()
    twice = replace(kernel, trees=(*kernel.trees, kernel.trees[-1]))
    assert "name" in {one.kind for one in kernel_violations(twice, TARGET, [{}])}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"tensor": "QQ"}, "output"),
        ({"offset": 1}, "bounds"),
        ({"offset": 100000}, "bounds"),
        ({"offset": -1}, "bounds"),
        ({"strides": (41, 1)}, "bounds"),
        ({"strides": (0, 1)}, "output"),
        ({"strides": (-40, 1)}, "output"),
        ({"strides": (1,)}, "output"),
        ({"shape": (6, 0)}, "output"),
    ],
)
def test_an_output_that_is_not_a_window_of_its_tensor_is_refused(change: dict[str, object], kind: str) -> None:
    program = single(gemm(), TARGET)
    broken = replace(program, outputs=(replace(program.outputs[0], **change),))  # type: ignore[arg-type]
    assert [one.kind for one in check(broken, TARGET)] == [kind]


@pytest.mark.parametrize("strides", ["0, 1", "1, 1", "39, 1"])
def test_a_written_parameter_with_one_element_at_two_places_is_refused(strides: str) -> None:
    text = print_kernel(gemm()).replace("out Y f32[6, 40]", f"out Y f32[6, 40]/[{strides}]")
    assert any(one.startswith("WAW") and "at two places" in one for one in violations(text))

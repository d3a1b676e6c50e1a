"""The text form: printing and parsing are inverse, and what cannot be read is named by its line."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vacc_opt.backends.vacc import Program, load_target
from vacc_opt.backends.vacc.kernels.attention import AttentionParams, Scores, attention
from vacc_opt.backends.vacc.kernels.builder import KernelBuilder, param
from vacc_opt.backends.vacc.schedule import Affine, affine
from vacc_opt.backends.vacc.single import single
from vacc_opt.backends.vacc.text import parse_kernel, print_kernel
from vacc_opt.ir import UserError

TARGET = load_target("vacc-reference")
NAMES = st.sampled_from(["m", "|m|", "n", "pos", "k2"])


def program() -> Program:
    q, k = (1, 3, 5, 8), (1, 16, 8)
    cache = param("K", "in", "f32", k), param("V", "in", "f32", k)
    params = AttentionParams(param("Q", "in", "f32", q, (8, 40, 8, 1)), *cache, param("Y", "out", "f32", q))
    return single(attention(params, Scores(0.125), TARGET), TARGET)


def test_a_program_reads_back_exactly() -> None:
    text = program().to_text()
    assert Program.from_text(text) == program()
    assert Program.from_text(text).to_text() == text


def test_indentation_blank_lines_and_comments_are_free() -> None:
    text = program().to_text()
    loose = "# by hand\n\n" + "\n\n".join("\t" + line.strip() for line in text.splitlines())
    assert Program.from_text(loose).to_text() == text


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(NAMES, st.integers(-70, 70)), max_size=4), st.integers(-9999, 9999), st.floats(allow_nan=False)
)
def test_any_affine_bound_and_any_float_reads_back(terms: list[tuple[str, int]], constant: int, value: float) -> None:
    bound = affine(constant)
    for name, factor in terms:
        bound = bound + affine(name) * factor
    b = KernelBuilder("k")
    x = b.param(param("X", "out", "f32", (9,)))
    buffer = b.ring("x", "f32", (9,), "vector", "dma_out")
    with b.engine("vector"), b.loop("m", 0, bound, 3, parallel=True), b.fill(buffer):
        b.op("constant", buffer[bound : bound + 1], value=value)
        b.op("constant", buffer[:], value=bound)
    kernel = b.build()
    assert x.shape == (9,)
    assert parse_kernel(print_kernel(kernel)) == kernel


@given(st.lists(st.text(min_size=1), min_size=1, max_size=3))
def test_any_name_of_a_graph_node_reads_back(nodes: list[str]) -> None:
    whole = program()
    named = replace(whole, calls=(replace(whole.calls[0], nodes=tuple(nodes)),))
    assert Program.from_text(named.to_text()) == named
    assert named.to_text().count("\n") == whole.to_text().count("\n")  # a call stays one line


def test_terms_print_in_one_order_however_they_were_added() -> None:
    m, size, pos = affine("m"), affine("|m|"), affine("pos")
    assert str(pos + size + m - 1) == str(m + pos - 1 + size) == "m+|m|+pos-1"
    assert str(m - m) == "0"
    assert m + 2 - m == Affine((), 2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schedule 1", "schedule 9", "line 1: expected `schedule 1`"),
        ("f32[1, 16, 8]", "f33[1, 16, 8]", "unknown type `f33`"),
        ("engine matrix", "engine martix", "unknown engine"),
        ("fill q {", "fil q {", "not a loop, scope or operation"),
        ("h:h+|h|", "h:h*h", "not a sum of variables and numbers"),
        ("call 0 attention", "call 0 atention", "unknown kernel `atention`"),
        ("K=K", "K=L", "unknown tensor `L`"),
        ("pos=pos", "poss=pos", "do not match the parameters"),
    ],
)
def test_what_cannot_be_read_is_named(old: str, new: str, message: str) -> None:
    text = program().to_text()
    assert old in text
    with pytest.raises(UserError) as caught:
        Program.from_text(text.replace(old, new, 1))
    assert message in str(caught.value)


def test_a_text_cut_short_is_refused_wherever_it_ends() -> None:
    """Cut behind the last kernel line it is a shorter program; everywhere before, something is missing."""
    lines = program().to_text().splitlines()
    end = max(number for number, line in enumerate(lines) if line == "}")
    start = next(number for number, line in enumerate(lines) if line.startswith("kernel"))
    for cut in range(start + 1, end):
        with pytest.raises(UserError):
            Program.from_text("\n".join(lines[:cut]))

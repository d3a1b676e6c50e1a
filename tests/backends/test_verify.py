"""The verifier accepts every kernel that we generate and names the hazard in every broken one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import pytest

from vacc_opt.backends.vacc.kernels.builder import KernelBuilder, param
from vacc_opt.backends.vacc.memory import Lifetime, plan_ddr
from vacc_opt.backends.vacc.schedule import ALIGN, Argument, Call, Kernel, Output, Program, ScheduleError, Tensor
from vacc_opt.backends.vacc.target import Target, load_target
from vacc_opt.backends.vacc.text import parse_kernel, print_kernel
from vacc_opt.backends.vacc.verify import check, verify
from vacc_opt.backends.vacc.verify_kernel import kernel_violations

SMALL = """
kernel matmul(in X f32[5, 8], in W f32[6, 8], out Y f32[5, 6]) {
  ring x f32[5, 4] x2 @0 dma_in -> matrix
  ring w f32[4, 4] x2 @256 dma_in -> matrix
  ring acc f32[5, 4] x2 @384 matrix -> dma_out
  engine dma_in {
    par n in 0:6:4 {
      for k in 0:8:4 {
        fill x {
          x[0:5, 0:|k|] <- load(X[0:5, k:k+|k|])
        }
        fill w {
          w[0:|n|, 0:|k|] <- load(W[n:n+|n|, k:k+|k|])
        }
      }
    }
  }
  engine matrix {
    par n in 0:6:4 {
      fill acc {
        for k in 0:8:4 {
          use x, w {
            acc[0:5, 0:|n|] <- mma(x[0:5, 0:|k|], w[0:|n|, 0:|k|], first=k)
          }
        }
      }
    }
  }
  engine dma_out {
    par n in 0:6:4 {
      use acc {
        Y[0:5, n:n+|n|] <- store(acc[0:5, 0:|n|])
      }
    }
  }
}
"""

# two full tiles of columns and a square weight, so that calls can be chained
SQUARE = SMALL.replace("W f32[6, 8]", "W f32[8, 8]").replace("Y f32[5, 6]", "Y f32[5, 8]").replace("0:6:4", "0:8:4")

# what is broken, the text before, the text after, the hazard that must be named
MUTATIONS = [
    ("a fill is dropped", "fill w {\n          w[0:|n|, 0:|k|] <- load(W[n:n+|n|, k:k+|k|])\n        }", "", "RAW"),
    ("a use is dropped", "use acc {\n        Y[0:5, n:n+|n|] <- store(acc[0:5, 0:|n|])\n      }", "", "lost-signal"),
    ("a tile is touched outside its scope", "use x, w {", "use x {", "RAW"),
    ("a consumer writes", "acc[0:5, 0:|n|] <- mma(x", "x[0:5, 0:|n|] <- mma(x", "WAR"),
    ("the last k chunk is lost in both trees", "for k in 0:8:4", "for k in 0:4:4", "uncovered"),
    ("the k loop of the loads is short", "for k in 0:8:4 {\n        fill", "for k in 0:4:4 {\n        fill", "RAW"),
    (
        "columns are lost",
        "Y[0:5, n:n+|n|] <- store(acc[0:5, 0:|n|])",
        "Y[0:5, n:n+1] <- store(acc[0:5, 0:1])",
        "uncovered",
    ),
    ("stores cut the columns elsewhere", "par n in 0:6:4 {\n      use acc", "par n in 0:6:3 {\n      use acc", "RAW"),
    ("all tiles are stored at one place", "Y[0:5, n:n+|n|]", "Y[0:5, 0:|n|]", "WAW"),
    ("a store runs past the end", "Y[0:5, n:n+|n|]", "Y[0:5, n+1:n+|n|+1]", "bounds"),
    ("a load misses a row", "x[0:5, 0:|k|] <- load(X[0:5, k:k+|k|])", "x[0:4, 0:|k|] <- load(X[0:4, k:k+|k|])", "RAW"),
    ("a load is shifted in k", "load(W[n:n+|n|, k:k+|k|])", "load(W[n:n+|n|, 4-k:4-k+|k|])", "coverage"),
    ("one k chunk is multiplied twice", "load(X[0:5, k:k+|k|])", "load(X[0:5, 0:|k|])", "coverage"),
    ("the accumulator is never started", "first=k", "first=1", "RAW"),
    ("the accumulator starts again at each chunk", "first=k", "first=0", "WAW"),
    (
        "tiles do not fit each other",
        "x[0:5, 0:|k|], w[0:|n|, 0:|k|], first",
        "x[0:5, 0:|k|], w[0:|n|, 0:3], first",
        "shape",
    ),
    ("two buffers overlap", "w f32[4, 4] x2 @256", "w f32[4, 4] x2 @192", "overlap"),
    ("a ring gets slots that nobody placed", "x f32[5, 4] x2 @0", "x f32[5, 4] x3 @0", "overlap"),
    ("a buffer lies outside the memory", "@384", "@2097152", "capacity"),
    ("a buffer is not aligned", "@384", "@388", "alignment"),
    ("an input is written", "Y[0:5, n:n+|n|] <- store", "X[0:5, n:n+|n|] <- store", "mode"),
    ("an operation runs on the wrong engine", "<- store(", "<- load(", "op"),
]


@pytest.fixture
def reference() -> Target:
    return load_target("vacc-reference")


def kinds(kernel: Kernel, target: Target) -> set[str]:
    return {one.kind for one in kernel_violations(kernel, target, [{}])}


class Example(Protocol):
    """What the fixture `example` gives: a kernel, its machine, legal values of its run-time scalars."""

    kernel: Kernel
    target: Target
    scalars: Sequence[dict[str, int]]


def test_a_generated_kernel_raises_no_false_alarm(example: Example) -> None:
    assert kernel_violations(example.kernel, example.target, example.scalars) == []


def test_a_kernel_is_judged_by_its_text(example: Example) -> None:
    again = parse_kernel(print_kernel(example.kernel))
    assert kernel_violations(again, example.target, example.scalars) == []


def test_the_small_kernel_is_valid(reference: Target) -> None:
    assert kinds(parse_kernel(SMALL), reference) == set()


@pytest.mark.parametrize(("old", "new", "kind"), [one[1:] for one in MUTATIONS], ids=[one[0] for one in MUTATIONS])
def test_a_broken_kernel_is_refused_by_the_name_of_its_hazard(reference: Target, old: str, new: str, kind: str) -> None:
    assert SMALL.count(old) >= 1
    assert kind in kinds(parse_kernel(SMALL.replace(old, new)), reference)


def test_engines_that_wait_for_each_other_deadlock(reference: Target) -> None:
    """The loads fill x for all k before the first w; with one slot, the second x waits for the array, which waits for w."""
    text = SMALL.replace("x f32[5, 4] x2", "x f32[5, 4] x1").replace(
        "fill x {\n          x[0:5, 0:|k|] <- load(X[0:5, k:k+|k|])\n        }\n        fill w {",
        "fill w {",
    )
    late = "for k in 0:8:4 {\n        fill x {\n          x[0:5, 0:|k|] <- load(X[0:5, k:k+|k|])\n        }\n      }\n"
    text = text.replace(
        "      for k in 0:8:4 {\n        fill w", f"      {late}      for k in 0:8:4 {{\n        fill w", 1
    )
    (found,) = kernel_violations(parse_kernel(text), reference, [{}])
    assert found.kind == "deadlock"
    assert "dma_in at acquire of `x`, matrix at wait of `w`" in found.message


def test_a_message_names_the_kernel_the_statement_and_the_tile(reference: Target) -> None:
    broken = parse_kernel(
        SMALL.replace("x[0:5, 0:|k|] <- load(X[0:5, k:k+|k|])", "x[0:4, 0:|k|] <- load(X[0:4, k:k+|k|])")
    )
    text = "\n".join(map(str, kernel_violations(broken, reference, [{}])))
    assert "RAW: matmul: `acc[0:5, 0:|n|] <- mma(x[0:5, 0:|k|], w[0:|n|, 0:|k|], first=k)` reads x[0:5, 0:4]" in text


def test_tiles_stored_at_each_others_place_are_found(reference: Target) -> None:
    """Every output is written once and every MAC is done, but columns 0..4 and 4..8 trade places."""
    found = kernel_violations(parse_kernel(SQUARE.replace("Y[0:5, n:n+|n|]", "Y[0:5, 4-n:4-n+|n|]")), reference, [{}])
    assert [one.kind for one in found] == ["coverage", "coverage"]
    assert "stores rows and columns[0:5, 0:4] at Y[0:5, 4:8]" in found[0].message


COPY = """
kernel append(in X f32[4, 8], inout C f32[16, 8]) with pos {
  ring x f32[4, 8] x1 @0 dma_in -> dma_out
  engine dma_in {
    fill x {
      x[0:4, 0:8] <- load(X[0:4, 0:8])
    }
  }
  engine dma_out {
    use x {
      C[pos:pos+4, 0:8] <- store(x[0:4, 0:8])
    }
  }
}
"""


def test_a_loaded_tail_that_nobody_stores_is_found(reference: Target) -> None:
    short = parse_kernel(
        COPY.replace("C[pos:pos+4, 0:8] <- store(x[0:4, 0:8])", "C[pos:pos+3, 0:8] <- store(x[0:3, 0:8])")
    )
    (found,) = kernel_violations(short, reference, [{"pos": 0}])
    assert str(found) == "uncovered: append: part of x[0:4, 0:8] is filled and never read"


def test_an_input_that_is_not_all_read_is_found(reference: Target) -> None:
    text = COPY.replace("X f32[4, 8]", "X f32[5, 8]")
    (found,) = kernel_violations(parse_kernel(text), reference, [{"pos": 0}])
    assert str(found) == "uncovered: append: X[4:5, 0:8] of input [5, 8] is never read"


def test_cores_take_turns_on_the_links_of_their_die(reference: Target) -> None:
    text = """
kernel sum(in X f32[8], out Y f32[8]) {
  engine link {
    par m in 0:8:4 {
      Y[m:m+|m|] <- all_reduce(X[m:m+|m|])
    }
  }
}
"""
    for loop in ("par m", "for m"):
        assert kinds(parse_kernel(text.replace("par m", loop)), reference) == set()


def test_a_tail_that_only_a_runtime_value_shows_is_found(reference: Target) -> None:
    assert kernel_violations(parse_kernel(COPY), reference, [{"pos": 0}, {"pos": 12}]) == []
    (found,) = kernel_violations(parse_kernel(COPY), reference, [{"pos": 0}, {"pos": 13}])
    assert found.kind == "bounds"


# Programs: two products in a chain, h = X @ W^T, y = h2 @ W^T with square weights.


def chain(target: Target) -> Program:
    kernel = parse_kernel(SQUARE)
    sizes = {"x": (5, 8), "w": (8, 8), "h": (5, 8), "g": (5, 8), "y": (5, 8)}
    roles = {"x": "input", "w": "weight"}
    temps = [Lifetime("h", 160, 0, 1), Lifetime("g", 160, 1, 2), Lifetime("y", 160, 2, 2)]
    plan = plan_ddr([("x", 160), ("w", 256)], temps, ALIGN, 3)
    tensors = tuple(Tensor(n, "f32", shape, roles.get(n, "temp"), plan.region(n).offset) for n, shape in sizes.items())
    calls = tuple(
        Call(i, "matmul", (Argument("X", a), Argument("W", "w"), Argument("Y", b)), ())
        for i, (a, b) in enumerate([("x", "h"), ("h", "g"), ("g", "y")])
    )
    out = (Output("y", "y", 0, (5, 8), (8, 1)),)
    where = (target.die.cores, target.name, target.sha)
    return Program("chain", "prefill", 1, *where, tensors, (kernel,), calls, out, plan.bytes, plan.bound)


def moved(program: Program, name: str, offset: int) -> Program:
    return replace(program, tensors=tuple(replace(t, offset=offset) if t.name == name else t for t in program.tensors))


def rewired(program: Program, call: int, name: str, argument: Argument) -> Program:
    arguments = tuple(argument if one.name == name else one for one in program.calls[call].arguments)
    calls = tuple(replace(c, arguments=arguments) if c.index == call else c for c in program.calls)
    return replace(program, calls=calls)


def program_kinds(program: Program, target: Target) -> set[str]:
    return {one.kind for one in check(program, target)}


def test_a_valid_program_passes(reference: Target) -> None:
    verify(chain(reference), reference)
    assert check(chain(reference), reference) == []


def test_a_program_for_another_target_is_refused(reference: Target) -> None:
    with pytest.raises(ScheduleError, match="target: chain: made for vacc-reference"):
        verify(chain(reference), load_target("vacc-card4"))


def test_a_tensor_read_before_its_writer_is_a_raw_hazard(reference: Target) -> None:
    (found,) = check(rewired(chain(reference), 0, "X", Argument("X", "g")), reference)
    assert str(found) == "RAW: call 0 (matmul): X reads `g`, of which 40 of 40 elements are not written yet"


def test_two_live_tensors_at_one_address_overlap(reference: Target) -> None:
    program = chain(reference)
    assert "overlap" in program_kinds(moved(program, "g", program.tensor["h"].offset), reference)


def test_a_temporary_over_a_weight_overlaps(reference: Target) -> None:
    program = chain(reference)
    assert "overlap" in program_kinds(moved(program, "h", program.tensor["w"].offset), reference)


def test_an_argument_that_leaves_its_tensor_is_out_of_bounds(reference: Target) -> None:
    assert program_kinds(rewired(chain(reference), 1, "Y", Argument("Y", "g", 1)), reference) == {"bounds"}


def test_a_written_weight_is_a_hazard(reference: Target) -> None:
    assert "WAW" in program_kinds(rewired(chain(reference), 1, "Y", Argument("Y", "w")), reference)


def test_a_call_that_writes_what_it_reads_is_a_hazard(reference: Target) -> None:
    assert "WAR" in program_kinds(rewired(chain(reference), 1, "Y", Argument("Y", "h")), reference)


def test_an_output_that_nobody_writes_is_uncovered(reference: Target) -> None:
    assert "uncovered" in program_kinds(rewired(chain(reference), 2, "Y", Argument("Y", "h")), reference)


def test_a_tensor_beyond_the_stated_memory_is_refused(reference: Target) -> None:
    assert "capacity" in program_kinds(moved(chain(reference), "y", 1 << 20), reference)


def test_more_ranks_than_the_target_has_dies_are_refused() -> None:
    """A target of one die stands for any number of them."""
    card, die = load_target("vacc-card4"), load_target("vacc-reference")
    assert check(replace(chain(card), ranks=4), card) == check(replace(chain(die), ranks=8), die) == []
    (found,) = check(replace(chain(card), ranks=5), card)
    assert str(found) == "target: chain: 5 ranks, a die each, but vacc-card4 has 4 dies"


# Tiles of one operation


def applied(kind: str, out: tuple[int, ...], *ins: tuple[int, ...], **attributes: int) -> Kernel:
    """A kernel of one vector operation on all of its parameters."""
    k = KernelBuilder("applied")
    given = [k.param(param(f"X{i}", "in", "f32", shape)) for i, shape in enumerate(ins)]
    rings = [k.ring(f"x{i}", "f32", shape, "dma_in", "vector", 1) for i, shape in enumerate(ins)]
    y, result = k.param(param("Y", "out", "f32", out)), k.ring("y", "f32", out, "vector", "dma_out", 1)
    with k.engine("dma_in"):
        for ring, x in zip(rings, given, strict=True):
            with k.fill(ring):
                k.op("load", ring[...], x[...])
    with k.engine("vector"), k.use(*rings), k.fill(result):
        k.op(kind, result[...], *(ring[...] for ring in rings), **attributes)
    with k.engine("dma_out"), k.use(result):
        k.op("store", y[...], result[...])
    return k.build()


def exchanged(kind: str, out: tuple[int, ...], given: tuple[int, ...]) -> Kernel:
    """A kernel of one collective on all of its parameters."""
    k = KernelBuilder("exchanged")
    x, y = k.param(param("X", "in", "f32", given)), k.param(param("Y", "out", "f32", out))
    with k.engine("link"):
        k.op(kind, y[...], x[...])
    return k.build()


TURNED = [(2, 4, 8), (4, 4), (4, 4)]
MISFITS = [
    (applied("rotary", (2, 4, 8), *TURNED, interleaved=0), applied("rotary", (2, 4, 8), (2, 4, 8), (3, 4), (3, 4), interleaved=0)),
    (applied("rotary", (2, 4, 8), *TURNED, interleaved=0), applied("rotary", (2, 4, 8), (2, 4, 8), (4, 5), (4, 5), interleaved=0)),
    (applied("row_dot", (4, 1), (4, 8), (1, 8)), applied("row_dot", (4, 1), (4, 8), (2, 4, 8))),
    (exchanged("all_reduce", (64,), (64,)), exchanged("all_reduce", (64,), (1,))),
    (exchanged("reduce_scatter", (4,), (3, 4)), exchanged("reduce_scatter", (4,), (3, 1))),
    (exchanged("all_gather", (5, 3, 4), (5, 4)), exchanged("all_gather", (5, 3, 4), (1, 4))),
    (parse_kernel(COPY), parse_kernel(COPY.replace("X f32[4, 8]", "X f32[4, 1, 8]").replace("X[0:4, 0:8]", "X[0:4, 0:1, 0:8]"))),
]  # fmt: skip


@pytest.mark.parametrize(("fits", "misfits"), MISFITS, ids=lambda one: "")
def test_tiles_that_the_simulators_cannot_take_are_refused(reference: Target, fits: Kernel, misfits: Kernel) -> None:
    scalars = [dict.fromkeys(fits.scalars, 0)]
    assert kernel_violations(fits, reference, scalars) == []
    assert "shape" in {one.kind for one in kernel_violations(misfits, reference, scalars)}

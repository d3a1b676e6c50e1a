"""Broken kernels and programs, by the hundred: those that compute something else are refused, valid ones are not.

Each mutant is run on values, in several interleavings of the engines, with poisoned memory. `caught`: it changes values
(or does not run to its end) and is refused. `missed`: it changes values and is accepted. `strict`: values stay, but a
rule is broken, as by two buffers that share bytes while only luck keeps them apart. `harmless`: nothing changes and
nothing is said.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from vacc_opt.backends.vacc import load_target
from vacc_opt.backends.vacc.schedule import Violation
from vacc_opt.backends.vacc.verify import check
from vacc_opt.backends.vacc.verify_kernel import kernel_violations
from vacc_opt.tests.backends.mutants import Mutant, kernel_mutants
from vacc_opt.tests.backends.mutation_bases import (
    Base,
    ProgramBase,
    bases,
    program_bases,
    program_results,
    results,
    same,
)
from vacc_opt.tests.backends.program_mutants import Broken, program_mutants

OUTCOMES = ("caught", "strict", "harmless", "missed")
WIRING = {
    "read the wrong tensor",
    "swap two arguments",
    "wrong output",
}  # which of two tensors is meant: the graph knows
CARD = load_target("vacc-card4")
QUICK = {
    "linear_w8",
    "linear+bias+rotary",
    "attention_i8_new",
    "kv_append_i8",
    "rms_norm",
    "rotary",
    "add",
    "select_row",
}

Table = dict[str, Counter[str]]


def picked(mutants: Iterable[Any], each: int) -> Iterator[Any]:
    """At most `each` mutants of every kind, by a fixed seed."""
    kinds: dict[str, list[Any]] = defaultdict(list)
    for one in mutants:
        kinds[one.kind].append(one)
    rng = random.Random(8)
    for group in kinds.values():
        yield from rng.sample(group, min(each, len(group)))


def judge(good: Sequence[Any], found: Iterator[Any], violations: list[Violation]) -> str:
    """The outcome of a mutant."""
    if same(good, found):
        return "strict" if violations else "harmless"
    return "caught" if violations else "missed"


def kernel_table(chosen: list[Base], each: int, missed: list[str]) -> Table:
    table: Table = defaultdict(Counter)
    for base in chosen:
        good = list(results(base, base.kernel))
        assert None not in good
        for one in picked(kernel_mutants(base.kernel), each):
            assert isinstance(one, Mutant)
            found = kernel_violations(one.kernel, base.target, base.scalars)
            outcome = judge(good, results(base, one.kernel), found)
            table[one.kind][outcome] += 1
            if outcome == "missed":
                missed.append(f"{base.name}: {one.kind}: {one.where}")
    return table


def program_table(chosen: list[ProgramBase], each: int, missed: list[str]) -> Table:
    table: Table = defaultdict(Counter)
    for base in chosen:
        good = list(program_results(base, base.program))
        assert None not in good
        for one in picked(program_mutants(base.program), each):
            assert isinstance(one, Broken)
            outcome = judge(good, program_results(base, one.program), check(one.program, CARD))
            table[one.kind][outcome] += 1
            if outcome == "missed":
                missed.append(f"{base.name}: {one.kind}: {one.where}")
    return table


def show(table: Table, missed: Sequence[str] = ()) -> None:
    """A line a kind of mutant, then those that were missed."""
    width = max(map(len, table))
    lines = [f"{'mutants':<{width}} {' '.join(f'{one:>8}' for one in OUTCOMES)}"]
    total: Counter[str] = Counter()
    for kind, counts in table.items():
        total += counts
        lines.append(f"{kind:<{width}} {' '.join(f'{counts[one]:>8}' for one in OUTCOMES)}")
    lines.append(f"{'all':<{width}} {' '.join(f'{total[one]:>8}' for one in OUTCOMES)}")
    sys.stdout.write("\n".join(["", *lines, *missed, ""]))


def sums(table: Table, kinds: Callable[[str], bool] = lambda kind: True) -> Counter[str]:
    total: Counter[str] = Counter()
    for kind, counts in table.items():
        if kinds(kind):
            total += counts
    return total


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Mutants compute with NaN, by intent."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def test_valid_kernels_and_programs_raise_no_alarm() -> None:
    for base in bases():
        assert kernel_violations(base.kernel, base.target, base.scalars) == [], base.name
    for program in program_bases():
        assert check(program.program, CARD) == [], program.name


def test_a_sample_of_broken_kernels_is_refused() -> None:
    missed: list[str] = []
    table = kernel_table([one for one in bases() if one.name in QUICK], 1, missed)
    show(table)
    assert missed == []
    assert sums(table)["caught"] >= 100


def test_a_sample_of_broken_programs_is_refused() -> None:
    missed: list[str] = []
    chosen = [one for one in program_bases() if one.name == "decode, new tokens quantised"]
    table = program_table(chosen, 3, missed)
    show(table)
    assert [one for one in missed if not any(kind in one for kind in WIRING)] == []
    assert sums(table)["caught"] >= 20


@pytest.mark.full
def test_broken_kernels_of_every_kind_are_refused() -> None:
    missed: list[str] = []
    table = kernel_table(bases(), 6, missed)
    show(table, missed)
    total = sums(table)
    assert total["caught"] + total["missed"] >= 500
    assert total["missed"] <= 0.01 * (total["caught"] + total["missed"])


@pytest.mark.full
def test_broken_programs_are_refused() -> None:
    """Beside those that name another tensor of the same type, of which most are found and the rest only the graph shows."""
    missed: list[str] = []
    table = program_table(program_bases(), 8, missed)
    show(table, missed)
    order = sums(table, lambda kind: kind not in WIRING)
    assert order["missed"] <= 0.01 * (order["caught"] + order["missed"])
    wiring = sums(table, lambda kind: kind in WIRING)
    assert wiring["missed"] <= 0.25 * (wiring["caught"] + wiring["missed"])

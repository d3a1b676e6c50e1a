"""Seeded stand-ins: deterministic, readable in parts, of a useful size, and derived weights stay derived from them."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.ir import Literal, PerRank, Seeded, Source
from vacc_opt.ir.seeded import stand_in, with_leaves
from vacc_opt.ir.tensor import Codes, Gguf, Scales, Sliced, TensorExpr, parse_expr

WEIGHT = Seeded("w", "float", (3000, 1024))


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    np.testing.assert_array_equal(WEIGHT.read(), Seeded("w", "float", (3000, 1024)).read())
    assert np.mean(WEIGHT.read() == Seeded("v", "float", (3000, 1024)).read()) < 1e-3


@pytest.mark.parametrize("part", [(slice(2047, 2900),), (slice(0, 3), slice(5, 1000)), (slice(9, 9),)])
def test_a_part_is_the_part_of_the_whole(part: tuple[slice, ...]) -> None:
    np.testing.assert_array_equal(WEIGHT.read(part), WEIGHT.read()[part])


def test_a_matrix_keeps_the_size_of_what_it_multiplies() -> None:
    x = np.random.default_rng(0).standard_normal((4, 1024)).astype(np.float32)
    square = Seeded("s", "float", (1024, 1024)).read()
    # the deviation of a sum of 1024 products with deviation 1/32 is 1
    assert 0.9 < np.std(x @ square.T) < 1.1


def test_no_two_rows_are_equal() -> None:
    assert len(np.unique(WEIGHT.read(), axis=0)) == 3000


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("int8", -97, 97), ("uint8", 31, 225), ("int64", 0, 1), ("bool", 0, 1), ("float16", 0.2, 1.8), ("bfloat16", 0.2, 1.8)],
)  # fmt: skip
def test_every_type_has_numbers_that_it_can_be_used_with(dtype: str, low: float, high: float) -> None:
    values = Seeded("v", dtype, (500,)).read()
    assert values.dtype == Seeded("v", dtype, (500,)).dtype.numpy
    assert low <= values.astype(np.float64).min() < values.astype(np.float64).max() <= high


def test_a_scalar_is_a_number_near_one() -> None:
    assert Seeded("x", "float", ()).read().shape == ()


def test_text_holds_it() -> None:
    assert parse_expr(str(Codes(WEIGHT))) == Codes(WEIGHT)


def test_a_stand_in_does_not_depend_on_the_directory() -> None:
    here, there = (Source(f"/{folder}/m.safetensors", 8, "float16", (4, 4), "w") for folder in ("a", "b"))
    assert stand_in(here) == stand_in(there) == Seeded("m.safetensors:w", "float16", (4, 4))


def test_codes_and_scales_of_a_replaced_weight_belong_together() -> None:
    source = Source("/nowhere", 0, "float", (8, 4))
    codes, scales = with_leaves(Codes(source), stand_in), with_leaves(Scales(source), stand_in)
    rounded = codes.read() * scales.read()[:, None]
    # half a step of each row
    assert (np.abs(rounded - stand_in(source).read()) <= scales.read()[:, None] * 0.5001).all()


def test_every_rank_gets_its_part_of_the_same_weight() -> None:
    table = Gguf("/nowhere.gguf", 0, "Q4_0", (8, 32))
    halves = PerRank((Sliced(table, (0, 0), (4, 32)), Sliced(table, (4, 0), (8, 32))))
    replaced = with_leaves(halves, stand_in)
    assert isinstance(replaced, PerRank)
    np.testing.assert_array_equal(np.concatenate([p.read() for p in replaced.parts]), stand_in(table).read())


def test_what_reads_no_file_stays_the_same_object() -> None:
    literal: TensorExpr = Codes(Literal(np.ones((2, 2), np.float32)))
    assert with_leaves(literal, stand_in) is literal

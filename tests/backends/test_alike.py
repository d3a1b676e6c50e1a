"""Cores that are alike: told apart where anything but a shift differs, and followed once to what each would give."""

from __future__ import annotations

import pytest

from vacc_opt.backends.vacc.alike import Alike
from vacc_opt.backends.vacc.binding import Lanes, lanes
from vacc_opt.backends.vacc.expressions import Expressions, Node
from vacc_opt.backends.vacc.follow import stores
from vacc_opt.backends.vacc.kernels.builder import KernelBuilder, param
from vacc_opt.backends.vacc.schedule import Kernel
from vacc_opt.tests.backends.mutation_bases import Base, bases

CORES = 5


def moves(rows: int, twice: bool = False) -> Kernel:
    """Tiles of 4 of `rows` rows from X to Y, dealt out to the cores; `twice`: row 2 * m of X comes with row m."""
    b = KernelBuilder("moves")
    px, py = b.param(param("X", "in", "f32", (2 * rows, 4))), b.param(param("Y", "out", "f32", (rows, 4)))
    pz = b.param(param("Z", "out", "f32", (rows, 4)))
    ring, other = (b.ring(name, "f32", (4, 4), "dma_in", "dma_out", depth=2) for name in ("ring", "other"))
    with b.engine("dma_in"), b.loop("m", 0, rows, 4, parallel=True) as m, b.fill(ring, other):
        b.op("load", ring[m, :], px[m, :])
        place = m.start * 2 if twice else m.start
        b.op("load", other[slice(0, 1), :], px[slice(place, place + 1), :])
    with b.engine("dma_out"), b.loop("m", 0, rows, 4, parallel=True) as m, b.use(ring, other):
        b.op("store", py[m, :], ring[m, :])
        b.op("store", pz[slice(m.start, m.start + 1), :], other[slice(0, 1), :])
    return b.build()


def test_cores_with_equal_tiles_are_like_the_first_one_shifted() -> None:
    found = lanes(moves(20), CORES, {}).alike
    assert [one.first for one in found] == [0] * 5
    assert found[3] == Alike(3, 0, {"X": (12, 0), "Y": (12, 0), "Z": (12, 0)})


def test_a_core_with_a_tail_is_not_like_the_others() -> None:
    assert [one.first for one in lanes(moves(18), CORES, {}).alike] == [0, 0, 0, 0, 4]


def test_boxes_of_a_parameter_that_move_by_unequal_steps_make_cores_unlike() -> None:
    assert [one.first for one in lanes(moves(20, twice=True), CORES, {}).alike] == [0, 1, 2, 3, 4]


def test_cores_with_another_number_of_tiles_are_unlike() -> None:
    assert [one.first for one in lanes(moves(28), CORES, {}).alike] == [0, 0, 2, 2, 2]


def test_the_distinct_lanes_are_those_of_the_first_of_each_kind() -> None:
    assert {core for core, _ in lanes(moves(18), CORES, {}).distinct} == {0, 4}


def followed(kernel: Kernel, unrolled: Lanes, make: Expressions) -> list[tuple[object, Node]]:
    return [(one.box, one.node) for one in stores(kernel, unrolled, make)]


@pytest.mark.parametrize("base", bases(), ids=lambda base: str(base.name))
def test_what_is_moved_from_another_core_is_what_the_core_itself_gives(base: Base) -> None:
    """Expressions are one object when they are equal, so that this is identity."""
    unrolled, make = lanes(base.kernel, CORES, base.scalars[-1]), Expressions()
    each = Lanes(base.kernel, unrolled)
    each.__dict__["alike"] = [Alike(one.core, one.core, {}) for one in unrolled.alike]
    pairs = zip(followed(base.kernel, unrolled, make), followed(base.kernel, each, make), strict=True)
    for (box, node), (own_box, own) in pairs:
        assert box == own_box
        assert node is own

"""views: what a chain of layout operators makes of a tensor, and how a layout is made or found."""

from __future__ import annotations

import pytest

from vacc_opt.ir import Graph
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.model.heads import ROWS_LAST, TRANSPOSED, as_heads
from vacc_opt.passes.infra.model.views import REPEAT, arranged, views

HEAD = "g (float[S,B,2,8] x) => (y)"


def graph(body: str, head: str = HEAD) -> Graph:
    return from_text(f"{head} {{ {body} }}")


def farthest(body: str, head: str = HEAD) -> tuple[str, list[list[int]]]:
    """The farthest base and the axes of each dimension, a repetition written as -1."""
    view = list(views(graph(body, head).values["y"]))[-1]
    return view.base.name, [[axis.source for axis in dim] for dim in view.dims]


SHAPE = "s = Constant <value_ints = {}> () "
CHAINS = {
    "a value itself": ("y = Neg (x)", ("y", [[0], [1], [2], [3]])),
    "a transpose": ("y = Transpose <perm = [1, 2, 0, 3]> (x)", ("x", [[1], [2], [0], [3]])),
    "two transposes": (
        "t = Transpose <perm = [1, 2, 0, 3]> (x) y = Transpose <perm = [0, 2, 1, 3]> (t)",
        ("x", [[1], [0], [2], [3]]),
    ),
    "joined axes": (SHAPE.format([0, -1, 8]) + "y = Reshape (x, s)", ("x", [[0], [1, 2], [3]])),
    "joined and split again": (
        SHAPE.format([0, -1, 8]) + "j = Reshape (x, s) t = Transpose <perm = [1, 0, 2]> (j)"
        " u = Constant <value_ints = [-1, 2, 8]> () y = Reshape (j, s)",
        ("x", [[0], [1, 2], [3]]),
    ),
    "repeated inside": (
        "a = Constant <value_ints = [3]> () e = Constant <value_ints = [1, 1, 1, 4, 1]> () " + SHAPE.format([0, 0, 8, 8])
        + "u = Unsqueeze (x, a) w = Expand (u, e) y = Reshape (w, s)",
        ("x", [[0], [1], [2, REPEAT], [3]]),
    ),
    "repeated outside": ("r = Constant <value_ints = [1, 1, 4, 1]> () y = Tile (x, r)", ("x", [[0], [1], [REPEAT, 2], [3]])),
    "a squeezed axis": (
        "a = Constant <value_ints = [0]> () u = Unsqueeze (x, a) y = Squeeze (u, a)", ("x", [[0], [1], [2], [3]])
    ),
    "a split of one axis": (SHAPE.format([0, 0, 2, 4, 2]) + "y = Reshape (x, s)", ("y", [[0], [1], [2], [3], [4]])),
    "axes dealt anew": (SHAPE.format([0, 0, 4, 4]) + "y = Reshape (x, s)", ("y", [[0], [1], [2], [3]])),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAINS)
def test_each_dimension_is_written_in_axes_of_the_base(case: str) -> None:
    body, expected = CHAINS[case]
    assert farthest(body) == expected


@pytest.mark.parametrize(("axis", "expected"), [(2, ("x", 4)), (1, ("y", 1))])
def test_heads_repeated_one_by_one_group_and_rows_of_heads_do_not(axis: int, expected: tuple[str, int]) -> None:
    times = [1, 1, 1, 1, 1]
    times[axis] = 4
    body = f"""
        axis = Constant <value_ints = [{axis}]> ()
        times = Constant <value_ints = {times}> ()
        joined = Constant <value_ints = [0, 8, -1, 8]> ()
        u = Unsqueeze (x, axis)
        w = Expand (u, times)
        y = Reshape (w, joined)"""
    heads = as_heads(graph(body, "g (float[B,2,S,8] x) => (y)").values["y"])
    assert heads is not None
    assert (heads.base.name, heads.group) == expected


def test_heads_that_are_made_with_a_place_for_their_copies_are_read_without_it() -> None:
    body = """
        apart = Constant <value_ints = [0, 0, 2, 1, 8]> ()
        times = Constant <value_ints = [1, 1, 1, 4, 1]> ()
        joined = Constant <value_ints = [0, 0, 8, 8]> ()
        r = Reshape (x, apart)
        w = Expand (r, times)
        z = Reshape (w, joined)
        y = Transpose <perm = [0, 2, 1, 3]> (z)"""
    g = graph(body, "g (float[B,S,16] x) => (y)")
    heads = as_heads(g.values["y"])
    assert heads is not None
    assert (heads.base.name, heads.group, heads.unit) == ("r", 4, 3)
    rw = Rewriter(g, by="test")
    with rw.applying():
        assert str(heads.value(rw).type) == "float[B,2,S,8]"


def test_keys_of_a_product_are_read_from_their_other_side() -> None:
    value = graph("y = Transpose <perm = [1, 2, 3, 0]> (x)").values["y"]
    keys, values = as_heads(value, TRANSPOSED), as_heads(value, ROWS_LAST)
    assert keys is not None
    assert values is not None
    assert keys.perm == (1, 2, 0, 3)
    assert values.perm == (1, 2, 3, 0)


def test_a_layout_that_exists_is_found() -> None:
    g = graph("y = Transpose <perm = [1, 2, 0, 3]> (x)")
    assert arranged(Rewriter(g), g.values["x"], (1, 2, 0, 3)) is g.values["y"]


def test_transposes_cancel() -> None:
    g = graph("y = Transpose <perm = [1, 2, 0, 3]> (x)")
    assert arranged(Rewriter(g), g.values["y"], (2, 0, 1, 3)) is g.values["x"]


def test_a_join_with_a_turned_part_is_made_in_the_wanted_layout_and_serves_all_that_turned_it() -> None:
    g = graph(
        """
        old = Transpose <perm = [2, 0, 1, 3]> (past)
        joined = Concat <axis = 0> (old, x)
        y = Transpose <perm = [1, 2, 0, 3]> (joined)""",
        "g (float[B,2,P,8] past, float[S,B,2,8] x) => (y)",
    )
    rw = Rewriter(g, by="test")
    with rw.applying():
        made = arranged(rw, g.values["joined"], (1, 2, 0, 3))
    assert made.producer is not None
    assert (made.producer.op, made.producer.attributes["axis"]) == ("Concat", 2)
    assert made.producer.inputs[0] is g.values["past"]
    assert g.outputs["y"] is made

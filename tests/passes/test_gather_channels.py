"""gather-channels: an index by a list, along an axis that was brought forward, is a Gather of that axis."""

from __future__ import annotations

import pytest

from vacc_opt.passes.fuse.gather_channels import GatherChannels
from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites

HEAD = "pick (float[B,S,5,4] x) => (y)"
FRONT = "front = Transpose <perm = [2, 0, 1, 3]> (x)"
BACK = "y = Transpose <perm = [1, 2, 0, 3]> (picked)"


def text(body: str, rows: str = "int64[1,1] rows = {-2}", head: str = HEAD) -> str:
    return f"{head} <{rows}> {{ {body} }}"


@pytest.mark.parametrize(("count", "rows"), [(1, "-2"), (3, "4, 0, -1"), (2, "1, 1")])
def test_a_list_of_rows_is_one_gather(count: int, rows: str) -> None:
    assert_rewrites(
        GatherChannels(expect=1),
        before=text(f"{FRONT} picked = GatherND (front, rows) {BACK}", f"int64[{count},1] rows = {{{rows}}}"),
        after=text("y = Gather <axis = 2> (x, rows)", f"int64[{count}] rows = {{{rows}}}"),
    )


def test_rows_that_stay_in_front_are_turned_after_the_gather() -> None:
    assert_rewrites(
        GatherChannels(expect=1),
        before=text(f"{FRONT} y = GatherND (front, rows)"),
        after=text(
            "picked = Gather <axis = 2> (x, rows) y = Transpose <perm = [2, 0, 1, 3]> (picked)",
            "int64[1] rows = {-2}",
        ),
    )


def test_another_order_than_before_is_one_transpose() -> None:
    assert_rewrites(
        GatherChannels(expect=1),
        before=text(f"{FRONT} picked = GatherND (front, rows) y = Transpose <perm = [1, 0, 2, 3]> (picked)"),
        after=text(
            "picked = Gather <axis = 2> (x, rows) y = Transpose <perm = [0, 2, 1, 3]> (picked)",
            "int64[1] rows = {-2}",
        ),
    )


@pytest.mark.parametrize(
    ("rows", "shown"),
    [("int64[1,2] rows = {-2, 0}", "several axes"), ("int64[1] rows = {-2}", "one index"), ("int64[1,1,1] rows = {-2}", "a grid")],
    ids=lambda v: v if "int64" not in v else "",
)  # fmt: skip
def test_what_is_no_list_of_rows_stays(rows: str, shown: str) -> None:
    assert_no_match(
        GatherChannels(), text(f"{FRONT} y = GatherND (front, rows)", rows), "is no list of rows of one axis"
    )


def test_rows_that_are_in_a_file_stay() -> None:
    body = f"{HEAD} {{ {FRONT} y = GatherND (front, rows) }}\n# const \"rows\" = Seeded('rows', 'int64', (2, 1))\n"
    assert_no_match(GatherChannels(), body, "is no list of rows of one axis")


def test_a_transpose_without_an_order_stays() -> None:
    assert_no_match(
        GatherChannels(),
        text("front = Transpose (x) y = GatherND (front, rows)"),
        "does not bring a number of rows to the front",
    )


def test_rows_that_are_not_there_stay() -> None:
    body = "front = Transpose <perm = [2, 0, 1, 3]> (x) y = GatherND (front, rows)"
    assert_no_match(GatherChannels(), text(body, "int64[1,1] rows = {5}"), "name rows that x has not")


def test_rows_within_a_batch_stay() -> None:
    head = HEAD.replace("B,S,5,4", "3,5,2,4")
    body = "front = Transpose <perm = [1, 0, 2, 3]> (x) y = GatherND <batch_dims = 1> (front, rows)"
    assert_no_match(GatherChannels(), text(body, "int64[5,1] rows = {0, 1, 2, 0, 1}", head), "batch_dims is 1")

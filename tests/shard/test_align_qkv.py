"""``align_qkv`` of a configuration is answered: heads that do not divide are aligned, and it is said."""

from __future__ import annotations

import pytest

from vacc_opt.passes.shard.heads import plan_heads
from vacc_opt.runtime.compile import alignment
from vacc_opt.tests.shard.models import Layer


@pytest.mark.parametrize(
    ("heads", "kv", "tp", "said"),
    [
        (8, 4, 4, "align_qkv: not needed, heads divide by tp 4"),
        (9, 3, 1, "align_qkv: not needed, heads divide by tp 1"),
        (9, 3, 2, "align_qkv: needed and done"),  # query heads of padding
        (8, 2, 4, "align_qkv: needed and done"),  # KV heads held twice
    ],
)
def test_it_is_said_whether_heads_had_to_be_aligned(heads: int, kv: int, tp: int, said: str) -> None:
    assert alignment(Layer(heads, kv).graph(), tp) == said


@pytest.mark.parametrize(("problem", "even"), [((8, 4, 2), True), ((8, 4, 8), False), ((10, 5, 4), False)])
def test_a_plan_knows_whether_heads_divide(problem: tuple[int, int, int], even: bool) -> None:
    assert plan_heads(*problem).even is even

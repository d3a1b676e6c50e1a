"""Masks as kv-cache reads them: what rows of padding see does not matter, what other rows see does."""

from __future__ import annotations

import pytest

from vacc_opt.ir import CheckError
from vacc_opt.passes.infra.testing import run_pass
from vacc_opt.passes.legalize.kv_cache import KvCache
from vacc_opt.tests.passes.decoder import decoder

# queries that are padding see every key, so that no row of the softmax is empty
OPEN_PADDING = """i13 = Constant <value_ints = [1, 3]> ()
    own = Slice (attention_mask, before, all, i1)
    pad = Equal (own, zero)
    pads = Unsqueeze (pad, i13)
    kept_rows = Not ({rows})
    either = Or (future, padded)
    hidden = And (either, kept_rows)"""


def convert(rows: str) -> None:
    graph = decoder(("hidden = Or (future, padded)", OPEN_PADDING.format(rows=rows)))
    run_pass(KvCache(context=32), graph)
    assert graph.input_named("attention_mask") is None


def test_queries_of_padding_may_see_anything() -> None:
    convert("pads")


def test_other_queries_may_not() -> None:
    with pytest.raises(CheckError, match="query 0 sees key 1"):
        convert("future")

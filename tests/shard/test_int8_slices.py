"""With int8 weights and an int8 cache, what a rank holds is exactly a part of what the unsplit model holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vacc_opt.ir import Graph, Literal
from vacc_opt.ir.copy import copy
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.storage import write_safetensors
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.model.linear import as_linear
from vacc_opt.passes.infra.testing import REASSOCIATED, assert_close
from vacc_opt.passes.shard.heads import PAD, plan_heads
from vacc_opt.tests.shard.models import LAYOUTS, Layer, logits

LAYER = Layer(9, 3, width=6, hidden=20, channels=25, vocabulary=70, bias=True)
TPS = (2, 4, 5)


def quantized(path: Path, layer: Layer, new_tokens: str = "float") -> Graph:
    """The layer with int8 weights, lm_head's too, and an int8 cache of scales and zeros of its own a channel."""
    graph, rng = layer.graph(), np.random.default_rng(4)
    shape = (layer.kv, layer.width)
    stored = {
        f"layers.0.{what}.{part}": Literal(rng.uniform(low, high, shape).astype(np.float32))
        for what in ("key", "value")
        for part, low, high in (("scale", 0.02, 0.03), ("zero", -0.2, 0.2))
    }
    write_safetensors(path / "kv.safetensors", stored)
    scales = f'kv8{{scales="{path / "kv.safetensors"}",new_tokens={new_tokens}}}'
    run_pipeline(graph, f"w8a16{{lm_head=true}},{scales}")
    return graph


def padded(whole: np.ndarray, places: list[int], fill: float = 0) -> np.ndarray:
    """Rows of ``whole`` at ``places``; a negative place is a row of ``fill``."""
    rows = np.take(whole, [max(p, 0) for p in places], axis=0)
    rows[[p < 0 for p in places]] = fill
    return rows


def channels(heads: tuple[int, ...], width: int) -> list[int]:
    return [PAD if h == PAD else h * width + i for h in heads for i in range(width)]


def run_of(size: int, tp: int, rank: int, multiple: int = 1) -> list[int]:
    share = -(-size // (tp * multiple)) * multiple
    return [i if i < size else PAD for i in range(rank * share, (rank + 1) * share)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tp", TPS)
def test_codes_and_scales_of_weights_are_slices_bit_for_bit(tp: int, layout: str, tmp_path: Path) -> None:
    layer = replace(LAYER, layout=layout)
    whole = quantized(tmp_path, layer)
    split = copy(whole)
    run_pipeline(split, f"split-tp{{tp={tp}}}")
    plan = plan_heads(layer.heads, layer.kv, tp)
    seen = 0
    for linear in (found for node in whole.nodes() if (found := as_linear(node)) is not None):
        name = linear.weight.name
        assert linear.scale is not None
        assert linear.scale.const is not None
        stored, scale = split.values[name].const, split.values[linear.scale.name].const
        assert stored is not None
        assert scale is not None
        codes, scales = linear.rows.read(), linear.scale.const.read()
        assert codes.dtype == np.int8
        for rank in range(tp):
            rows, columns = _places(codes.shape, layer, plan.query[rank], plan.kv[rank], rank, tp, name)
            expected = padded(codes, rows) if rows is not None else codes
            expected = padded(expected.T, columns).T if columns is not None else expected
            np.testing.assert_array_equal(stored.rank(rank).read(), expected, err_msg=f"{name} of rank {rank}")
            np.testing.assert_array_equal(scale.rank(rank).read(), padded(scales, rows) if rows is not None else scales)
        seen += 1
    assert seen == 8  # q, k, v, o, gate, up, down, head


def _places(
    shape: tuple[int, ...], layer: Layer, query: tuple[int, ...], kv: tuple[int, ...], rank: int, tp: int, name: str
) -> tuple[list[int] | None, list[int] | None]:
    """Rows and columns of a weight that a rank holds, by what the layer is."""
    if name.startswith(("wg", "wu")):
        return run_of(layer.channels, tp, rank), None
    if name.startswith("wd"):
        return None, run_of(layer.channels, tp, rank)
    if name.startswith("head"):
        return run_of(layer.vocabulary, tp, rank, 16), None
    if name.startswith("wo"):
        return None, channels(query, layer.width)
    return channels(query if shape[0] == layer.heads * layer.width else kv, layer.width), None


@pytest.mark.parametrize("tp", TPS)
def test_scales_and_zeros_of_the_cache_are_those_of_the_heads(tp: int, tmp_path: Path) -> None:
    whole = quantized(tmp_path, LAYER)
    split = copy(whole)
    run_pipeline(split, f"split-tp{{tp={tp}}}")
    plan = plan_heads(LAYER.heads, LAYER.kv, tp)
    grids = {v for n in whole.by_op("QuantizeKV", "Vastai") for v in n.inputs[1:] if v is not None}
    assert len(grids) == 4
    for grid in grids:
        assert grid.const is not None
        stored, values = split.values[grid.name].const, grid.const.read()
        assert stored is not None
        for rank, heads in enumerate(plan.kv):
            found = stored.rank(rank).read()
            for place, head in enumerate(heads):
                if head != PAD:
                    np.testing.assert_array_equal(found[place], values[head])
            assert np.isfinite(found).all()


@pytest.mark.parametrize("new_tokens", ["float", "quantized"])
@pytest.mark.parametrize("tp", TPS)
def test_the_ranks_compute_what_the_unsplit_int8_model_computes(tp: int, new_tokens: str, tmp_path: Path) -> None:
    whole = quantized(tmp_path, LAYER, new_tokens)
    split = copy(whole)
    run_pipeline(split, f"split-tp{{tp={tp}}}")
    for step, (have, want) in enumerate(zip(logits(split, 16), logits(whole, 16), strict=True)):
        assert_close(have, want, REASSOCIATED, f"step {step}")


@pytest.mark.parametrize("late", ["w8a16", "kv8"])
def test_quantizing_after_the_split_is_refused(late: str) -> None:
    with pytest.raises(UserError, match=f"'{late}' must come before 'split-tp'"):
        run_pipeline(LAYER.graph(), f"split-tp{{tp=2}},{late}")

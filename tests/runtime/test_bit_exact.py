"""Quantized numbers bit for bit: the artifact's weights against the definition, the cache's codes between the engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from vacc_opt.backends.vacc.kernels.kv_append import kv_append
from vacc_opt.backends.vacc.schedule import Param, row_major
from vacc_opt.backends.vacc.single import execute, single
from vacc_opt.backends.vacc.target import Target, load_target
from vacc_opt.ir.evaluate import evaluate
from vacc_opt.ir.text import from_text
from vacc_opt.runtime.artifact import Artifact

Array = npt.NDArray[Any]
HEADS, TOKENS, DEPTH = 3, 16, 64


def reference(weight: Array) -> tuple[Array, Array]:
    """SEMANTICS: fp32, scale = max|row| / 127, q = clip(rint(w / scale), -127, 127), a zero row has scale 1."""
    w = weight.astype(np.float32)
    codes, scales = np.zeros(w.shape, np.int8), np.ones(len(w), np.float32)
    for i, row in enumerate(w):
        largest = np.abs(row).max()
        if largest > 0:
            scales[i] = largest / np.float32(127)
            codes[i] = np.clip(np.rint(row / scales[i]), -127, 127)
    return codes, scales


def test_the_weights_of_an_artifact_on_two_ranks_are_the_definition(artifact: Artifact, checkpoint: Path) -> None:
    ranks = [load_file(artifact.path / f"rank{rank}.safetensors") for rank in range(2)]
    weights = load_file(checkpoint / "model.safetensors")
    for name in [n for n in weights if n.endswith("proj.weight")]:
        codes, scales = reference(weights[name])
        stem = name.removesuffix(".weight")
        by_columns = name.split(".")[-2] in ("o_proj", "down_proj")  # split along K: every rank has all scales
        shards = [rank[f"{stem}.qweight"] for rank in ranks]
        np.testing.assert_array_equal(np.concatenate(shards, axis=1 if by_columns else 0), codes)
        held = [rank[f"{stem}.scale"] for rank in ranks]
        assert {one.dtype for one in held} == {np.dtype(np.float32)}
        if by_columns:
            assert all((one == scales).all() for one in held)
        else:
            np.testing.assert_array_equal(np.concatenate(held), scales)


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("vacc-reference")


@pytest.mark.parametrize("zero", [0.0, 0.3])
def test_both_engines_make_the_same_codes_of_the_same_keys(target: Target, zero: float) -> None:
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.01, 0.1, (HEADS, DEPTH)).astype(np.float32)
    offset = (rng.standard_normal((HEADS, DEPTH)) * zero).astype(np.float32)
    keys = rng.standard_normal((HEADS, TOKENS, DEPTH)).astype(np.float32) * 4
    # halves between two codes, and numbers beyond the last one
    keys[:, :4] = (rng.integers(-140, 140, (HEADS, 4, DEPTH)) + np.float32(0.5)) * scale[:, None] + offset[:, None]
    graph = from_text(
        "g (float[1,H,S,D] x, float[H,D] scale, float[H,D] zero) => (q) { q = Vastai.QuantizeKV (x, scale, zero) }"
    )
    by_graph = evaluate(graph, {"x": keys[None], "scale": scale, "zero": offset})["q"][0]
    by_tiles = appended(target, keys, scale, offset)
    expected = np.clip(np.rint((keys - offset[:, None]) / scale[:, None]), -127, 127)
    np.testing.assert_array_equal(by_graph, expected)
    np.testing.assert_array_equal(by_tiles, expected)
    assert {-127, 127} <= set(by_tiles.flat)


def appended(target: Target, keys: Array, scale: Array, zero: Array) -> Array:
    """What the schedule's kernel writes into an empty cache."""

    def param(name: str, mode: str, dtype: str, shape: tuple[int, ...]) -> Param:
        return Param(name, dtype, shape, row_major(shape), mode)

    kernel = kv_append(
        param("NEW", "in", "f32", keys.shape),
        param("CACHE", "inout", "i8", keys.shape),
        param("S", "in", "f32", (HEADS, 1, DEPTH)),
        param("Z", "in", "f32", (HEADS, 1, DEPTH)),
        target,
    )
    given = {"NEW": keys, "CACHE": np.zeros(keys.shape, np.int8), "S": scale[:, None], "Z": zero[:, None]}
    (found,) = execute(single(kernel, target), [{**given, **dict.fromkeys(kernel.scalars, 0)}])
    return found["CACHE"]

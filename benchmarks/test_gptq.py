"""GPTQ on one layer of ChatGLM2-6B's size (hidden 4096, feed-forward 13696): time and memory of its own process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from vacc_opt.calibration.gptq_model import Options, quantize_model
from vacc_opt.ir import Graph
from vacc_opt.ir.text import from_text
from vacc_opt.runtime.memory import PeakMemory

HIDDEN, CHANNELS, HEADS, GROUPS, WIDTH = 4096, 13696, 32, 2, 128
SAMPLES, TOKENS, RANK = 16, 512, 256
SECONDS, BYTES = 8 * 60, 6e9
SHAPES = {
    "wq": (HIDDEN, HIDDEN), "wk": (GROUPS * WIDTH, HIDDEN), "wv": (GROUPS * WIDTH, HIDDEN), "wo": (HIDDEN, HIDDEN),
    "wg": (CHANNELS, HIDDEN), "wu": (CHANNELS, HIDDEN), "wd": (HIDDEN, CHANNELS), "head": (64, HIDDEN),
}  # fmt: skip
LAYER = f"""
layer (float[1,S,{HIDDEN}] x) => (float[1,S,64] logits)
<int64[4] apart = {{0, 0, -1, {WIDTH}}}, int64[3] joined = {{0, 0, -1}}> {{
    n = RMSNormalization <axis = -1> (x, norm)
    TURNED
    q0 = MatMul (n, wqt) q1 = Reshape (q0, apart) q = Transpose <perm = [0, 2, 1, 3]> (q1)
    k0 = MatMul (n, wkt) k1 = Reshape (k0, apart) k = Transpose <perm = [0, 2, 1, 3]> (k1)
    v0 = MatMul (n, wvt) v1 = Reshape (v0, apart) v = Transpose <perm = [0, 2, 1, 3]> (v1)
    a0 = Attention <is_causal = 1> (q, k, v) a1 = Transpose <perm = [0, 2, 1, 3]> (a0) a = Reshape (a1, joined)
    o = MatMul (a, wot) r = Add (x, o)
    m = RMSNormalization <axis = -1> (r, norm)
    g = MatMul (m, wgt) u = MatMul (m, wut) s = Vastai.SwiGLU (g, u)
    d = MatMul (s, wdt) e = Add (r, d)
    logits = MatMul (e, headt)
}}
"""


def layer() -> Graph:
    """The layer with seeded weights, which are read when they are needed."""
    turned = " ".join(f"{name}t = Transpose <perm = [1, 0]> ({name})" for name in SHAPES)
    consts = {**SHAPES, "norm": (HIDDEN,)}
    lines = "".join(f"# const \"{n}\" = Seeded({n!r}, 'float', {shape!r})\n" for n, shape in consts.items())
    return from_text(LAYER.replace("TURNED", turned) + lines)


def feeds() -> list[dict[str, np.ndarray]]:
    """Hidden states whose channels depend on each other, as those of models do."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((RANK, HIDDEN), np.float32) / 16

    def one() -> np.ndarray:
        noise = rng.standard_normal((1, TOKENS, HIDDEN), np.float32)
        return rng.standard_normal((1, TOKENS, RANK), np.float32) @ mix + noise / 2

    return [{"x": one()} for _ in range(SAMPLES)]


def measure() -> None:
    """Quantize the layer; prints seconds, peak bytes and the losses."""
    started = time.perf_counter()
    with PeakMemory() as peak, tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        options = Options(threads=2, true_sequential=True)
        found = quantize_model(layer(), feeds(), folder / "codes.safetensors", folder / "work", "k", options)
    seconds = time.perf_counter() - started
    ratio = {one.name: one.loss / one.rounding_loss for one in found}
    print(json.dumps({"seconds": seconds, "bytes": peak.bytes, "ratio": ratio}))


def test_one_layer_of_chatglm2_6b(benchmark: Any) -> None:
    command = [sys.executable, "-c", "from vacc_opt.benchmarks.test_gptq import measure; measure()"]

    def run() -> dict[str, Any]:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    found = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info["peak_memory_gb"] = round(found["bytes"] / 1e9, 2)
    tokens = SAMPLES * TOKENS
    print(f"\nGPTQ of 4096 x 13696: {found['seconds']:.0f} s, {found['bytes'] / 1e9:.2f} GB at most, {tokens} tokens")
    assert all(ratio < 1 for ratio in found["ratio"].values())
    assert found["seconds"] < SECONDS
    assert found["bytes"] < BYTES

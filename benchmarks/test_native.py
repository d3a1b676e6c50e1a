"""Tokens a second of the demo's model on its native code, beside the other two engines in the same run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from vacc_opt.backends.vacc import Program
from vacc_opt.backends.vacc.native.emit import emit
from vacc_opt.runtime.artifact import Artifact, open_artifact
from vacc_opt.runtime.compile import compile_model
from vacc_opt.runtime.engines import Engine, make_engine
from vacc_opt.runtime.generate import decode, prefill
from vacc_opt.tests.listener import Silent

ROOT = Path(__file__).parents[1]
CONFIG = "examples/smollm2-135m_w8kv8_tp3.yaml"
GOAL = 5.0  # tokens a second on two cores
TOKENS = {"native": 40, "onnxruntime": 10, "schedule": 4}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        report = compile_model(Path(CONFIG), [f"workspace.path={tmp_path_factory.mktemp('artifact')}"], Silent())
    return open_artifact(Path(report.path))


def rate(engine: Engine, tokens: int) -> float:
    """Tokens a second after a prompt of 37 tokens; the first call of a phase reads the weights and is not counted."""
    prompt = list(range(100, 137))
    prefill(engine, prompt)
    decode(engine, 50, len(prompt))
    started = time.perf_counter()
    for step in range(tokens):
        decode(engine, 50 + step, len(prompt) + 1 + step)
    return tokens / (time.perf_counter() - started)


def test_native_code_reaches_a_speed_for_use(
    benchmark: Any, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native = make_engine("native", artifact)
    started = time.perf_counter()
    native.prepare()
    built = time.perf_counter() - started
    lines = {phase: emit(Program.from_text(artifact.schedule(phase))).text.count("\n") for phase in artifact.phases}
    rates = {name: rate(make_engine(name, artifact), count) for name, count in TOKENS.items()}
    print(f"\n{lines} lines of C, compiled in {built:.1f} s")
    print("tokens a second: " + ", ".join(f"{name} {found:.1f}" for name, found in rates.items()))
    benchmark.extra_info.update({name: round(found, 2) for name, found in rates.items()})
    benchmark.pedantic(rate, (native, 10), rounds=3)
    assert rates["native"] >= GOAL
    assert rates["native"] >= 4 * rates["schedule"]

"""SmolLM2 over 1 to 4 ranks: the tokens of the unsharded model in one process and in several, and the plan of a split."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vacc_opt import frontends
from vacc_opt.ir import Graph
from vacc_opt.ir.copy import copy
from vacc_opt.runtime.engines import make_engine
from vacc_opt.runtime.generate import greedy
from vacc_opt.runtime.tp_plan import tp_plan
from vacc_opt.tests.e2e.test_smollm2 import (
    DEMO,
    FP32,
    FP32_TOLERANCE,
    ROOT,
    clear_steps,
    greedy_logits,
    teacher_forced,
    top1_differs_beyond_a_tie,
)
from vacc_opt.tests.runtime.ranks import run_ranks
from vacc_opt.tests.runtime.test_tp_plan import assert_as_compiled

pytestmark = pytest.mark.full
PROMPT, TOKENS = "Explain why the sky is blue.", 64


@pytest.fixture(scope="module")
def unsharded(compiled: Callable[..., Any]) -> tuple[list[int], Any, list[int]]:
    """The prompt, and of one rank the logits [65, vocab] and the 64 tokens that they choose."""
    artifact = compiled(FP32, "frontend.model_kwargs.tp=1").artifact
    ids = artifact.tokenizer().encode_prompt(PROMPT)
    logits, made = greedy_logits(make_engine("onnxruntime", artifact), ids, TOKENS)
    return ids, logits, made


def parted(found: Sequence[int], expected: Sequence[int]) -> int | None:
    """The first step at which two answers differ."""
    return next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), None)


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_64_tokens_are_those_of_the_unsharded_model_in_one_process_and_in_several(
    tp: int,
    compiled: Callable[..., Any],
    unsharded: tuple[list[int], Any, list[int]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    ids, expected, made = unsharded
    artifact = compiled(FP32, f"frontend.model_kwargs.tp={tp}").artifact
    engine = make_engine("onnxruntime", artifact)
    forced = teacher_forced(engine, [*ids, *made], len(ids))
    scale = float(np.abs(expected).max())
    worst = float(np.abs(forced - expected).max()) / scale
    assert worst <= FP32_TOLERANCE
    assert top1_differs_beyond_a_tie(forced, expected, FP32_TOLERANCE * scale) == []
    free, _, _ = greedy(engine, ids, max_new_tokens=TOKENS)
    clear = clear_steps(expected, FP32_TOLERANCE * scale)[:TOKENS]
    step = parted(free, made)
    assert step is None or not clear[step]
    record_property(
        "summary",
        f"SmolLM2 tp {tp}: {sum(a == b for a, b in zip(free, made, strict=True))} of {TOKENS} tokens equal, "
        f"{int((~clear).sum())} ties, largest difference {worst:.1e} of the scale",
    )
    run = run_ranks(tmp_path, tp, artifact.path, "--prompt", PROMPT, "--max-new-tokens", TOKENS, "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout[0])["token_ids"] == free
    assert run.stdout[1:] == ("",) * (tp - 1)


def test_three_ranks_hold_and_exchange_what_was_planned(
    compiled: Callable[..., Any], smollm2_graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(frontends, "export_checkpoint", lambda *_, **__: copy(smollm2_graph))
    (row,) = tp_plan(ROOT / "examples" / DEMO, (3,))
    assert_as_compiled(row, compiled(DEMO).artifact)

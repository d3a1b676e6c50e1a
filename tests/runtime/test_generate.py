"""Engines and generation: all engines compute the same model, chunked or not, and tiles are really executed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from vacc_opt.backends.vacc.native import find_compiler
from vacc_opt.cli.main import main
from vacc_opt.ir.errors import UserError
from vacc_opt.runtime.artifact import Artifact
from vacc_opt.runtime.engines import Engine, NativeEngine, OnnxRuntimeEngine, ScheduleEngine, make_engine
from vacc_opt.runtime.generate import decode, generate, greedy, prefill
from vacc_opt.runtime.simulate import simulate

PROMPT = list(range(3, 16))
# fp32 rounding of a reassociated sum, relative to the largest logit
TOLERANCE = 1e-5


# fp16 rounds to 11 bits (4.9e-4 of a value) after each operation; two layers of sums in another order stay within four
HALF_TOLERANCE = 4 * 2.0**-11


def compiler_is_missing() -> str:
    try:
        find_compiler()
    except UserError as error:
        return str(error)
    return ""


NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(bool(compiler_is_missing()), reason=compiler_is_missing() or "there is a C compiler"),
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Native code is compiled into a cache of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def assert_close(first: np.ndarray, second: np.ndarray) -> None:
    tolerance = HALF_TOLERANCE if first.dtype == np.float16 else TOLERANCE
    first, second = first.astype(np.float64), second.astype(np.float64)
    assert np.abs(first - second).max() <= tolerance * np.abs(second).max()


def logits_of(engine: Engine, prompt: Sequence[int], then: Sequence[int]) -> list[np.ndarray]:
    """Logits after the prompt and after each forced token."""
    engine.reset()
    found = [prefill(engine, prompt)]
    for index, token in enumerate(then):
        found.append(decode(engine, token, len(prompt) + index))
    return found


def test_schedule_and_onnxruntime_agree_without_quantization(plain: Artifact) -> None:
    then = [7, 9, 200, 31]
    pairs = zip(
        logits_of(ScheduleEngine(plain), PROMPT, then), logits_of(OnnxRuntimeEngine(plain), PROMPT, then), strict=True
    )
    for tiles, graph in pairs:
        assert_close(tiles, graph)


def test_schedule_and_onnxruntime_agree_on_two_ranks_with_int8(artifact: Artifact) -> None:
    schedule, runtime = ScheduleEngine(artifact), OnnxRuntimeEngine(artifact)
    assert_close(logits_of(schedule, PROMPT, [])[0], logits_of(runtime, PROMPT, [])[0])
    for rank in range(2):
        for name, codes in schedule.caches[rank].items():
            assert codes.dtype == np.int8
            # a value on the edge between two codes may fall either way, no further
            assert np.abs(codes.astype(int) - runtime.caches[rank][name]).max() <= 1
            assert np.count_nonzero(codes) > 0


@pytest.mark.skipif(bool(compiler_is_missing()), reason=compiler_is_missing() or "there is a C compiler")
def test_native_code_gives_the_logits_codes_and_tiles_of_the_schedule_engine(artifact: Artifact) -> None:
    schedule, native = ScheduleEngine(artifact), NativeEngine(artifact)
    then = [7, 9, 200, 31]
    for tiles, code in zip(logits_of(schedule, PROMPT, then), logits_of(native, PROMPT, then), strict=True):
        assert_close(code, tiles)
    for rank in range(2):
        for name, codes in schedule.caches[rank].items():
            assert np.abs(codes.astype(int) - native.caches[rank][name]).max() <= 1
    assert native.tiles_executed == schedule.tiles_executed > 0


@pytest.mark.parametrize("engine", ["schedule", NATIVE, "onnxruntime"])
def test_a_prompt_longer_than_the_prefill_runs_in_chunks(engine: str, plain: Artifact) -> None:
    prompt = [(5 * i) % 250 for i in range(37)]  # chunks of 16, 16 and 5 tokens
    chunked = logits_of(make_engine(engine, plain), prompt, [])[0]
    stepwise = logits_of(make_engine(engine, plain), prompt[:1], prompt[1:])[-1]
    assert_close(chunked, stepwise)


def test_the_last_slots_of_a_context_are_filled_token_by_token(plain: Artifact) -> None:
    class Narrow(OnnxRuntimeEngine):
        """As if compiled for a context that is no multiple of the prefill length."""

        calls: list[tuple[str, int]] = []

        def run(self, phase: str, input_ids: np.ndarray, pos: np.ndarray, valid: np.ndarray) -> np.ndarray:
            self.calls.append((phase, int(pos[0])))
            return super().run(phase, input_ids, pos, valid)

    engine = Narrow(plain)
    prompt = [1] * 34
    sizes = {name: {**one, "context": 34} for name, one in plain.manifest["entry_points"].items()}
    engine.artifact = Artifact(plain.path, {**plain.manifest, "entry_points": sizes})
    engine.context = 34
    prefill(engine, prompt)
    assert engine.calls == [("prefill", 0), ("prefill", 16), ("decode", 32), ("decode", 33)]


def test_pad_tokens_change_nothing(plain: Artifact) -> None:
    engine = OnnxRuntimeEngine(plain)
    first = prefill(engine, PROMPT, pad_id=0).copy()
    then = decode(engine, 8, len(PROMPT))
    engine.reset()
    assert_close(prefill(engine, PROMPT, pad_id=99), first)
    assert_close(decode(engine, 8, len(PROMPT)), then)


def test_a_prompt_beyond_the_context_is_refused(plain: Artifact) -> None:
    with pytest.raises(UserError, match="49 tokens, the context holds 48"):
        prefill(OnnxRuntimeEngine(plain), [1] * 49)
    with pytest.raises(UserError, match="no tokens"):
        prefill(OnnxRuntimeEngine(plain), [])


def test_generation_stops_at_a_stop_token(plain: Artifact) -> None:
    engine = OnnxRuntimeEngine(plain)
    free, _, _ = greedy(engine, PROMPT, max_new_tokens=4)
    stop = free[2]
    made, stopped, _ = greedy(engine, PROMPT, max_new_tokens=4, stop_ids=[stop])
    assert (made, stopped) == (free[: free.index(stop)], "end")


def test_generation_stops_when_the_context_is_full(plain: Artifact) -> None:
    made, stopped, _ = greedy(OnnxRuntimeEngine(plain), [1] * 45, max_new_tokens=100)
    assert stopped == "context"
    assert len(made) == 4  # after the 45th to the 48th token


def test_generation_stops_at_the_length_asked_for(plain: Artifact) -> None:
    made, stopped, _ = greedy(OnnxRuntimeEngine(plain), PROMPT, max_new_tokens=3)
    assert (len(made), stopped) == (3, "length")


def test_a_second_answer_does_not_see_the_first(plain: Artifact) -> None:
    engine = ScheduleEngine(plain)
    first, _, _ = greedy(engine, PROMPT, max_new_tokens=3)
    greedy(engine, [99] * 20, max_new_tokens=3)
    assert greedy(engine, PROMPT, max_new_tokens=3)[0] == first


def test_tiles_are_counted_on_the_schedule_engine_only(plain: Artifact) -> None:
    schedule, runtime = ScheduleEngine(plain), OnnxRuntimeEngine(plain)
    assert generate(plain, schedule, "hi", max_new_tokens=2).tiles_executed == schedule.tiles_executed > 0
    assert generate(plain, runtime, "hi", max_new_tokens=2).tiles_executed == 0


def test_a_changed_operand_of_one_tile_changes_the_logits(plain: Artifact) -> None:
    text = plain.schedule("prefill")
    corrupted, count = re.subn(
        r"<- add\((\w+)(\[[^]]*\]), \w+\[", r"<- add(\1\2, \1[", text, count=1
    )  # a + a, not a + b
    assert count == 1
    whole = logits_of(ScheduleEngine(plain), PROMPT, [])[0]
    damaged = logits_of(ScheduleEngine(plain, {"prefill": corrupted}), PROMPT, [])[0]
    assert np.abs(whole - damaged).max() > 1e-3 * np.abs(whole).max()


def test_the_command_answers_with_the_documented_keys(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    engines = ["schedule", "onnxruntime"] + ([] if compiler_is_missing() else ["native"])
    for engine in engines:
        arguments = [str(artifact.path), "--prompt", "hello", "--max-new-tokens", "3", "--engine", engine, "--json"]
        assert main(["generate", *arguments]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        answers.append(json.loads(captured.out))
    assert {"text", "token_ids", "engine", "tiles_executed"} <= set(answers[0])
    assert all(answer["token_ids"] == answers[0]["token_ids"] for answer in answers)
    assert [a["engine"] for a in answers] == engines
    assert answers[0]["tiles_executed"] > 0 == answers[1]["tiles_executed"]


def test_simulate_predicts_at_least_the_bound_and_writes_a_trace(
    artifact: Artifact, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = f"{tmp_path}/trace.json"
    assert main(["simulate", str(artifact.path), "--phase", "decode", "--trace", trace, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cycles"] >= found["bound_cycles"] > 0
    assert sum(k["cycles"] for k in found["kernels"]) == found["cycles"]
    with open(trace) as file:
        assert json.load(file)["traceEvents"]


def test_simulate_of_a_shorter_context_is_no_slower(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    cycles = []
    for context in ("0", "47"):
        assert main(["simulate", str(artifact.path), "--phase", "decode", "--context", context, "--json"]) == 0
        cycles.append(json.loads(capsys.readouterr().out)["cycles"])
    assert cycles[0] <= cycles[1]
    assert main(["simulate", str(artifact.path), "--phase", "decode", "--context", "48"]) == 2


@pytest.mark.parametrize(("phase", "cached", "most"), [("prefill", 0, 32), ("decode", 47, 47)])
def test_simulate_times_the_context_that_it_reports(artifact: Artifact, phase: str, cached: int, most: int) -> None:
    """Its own default given as a number is the same prediction; another context takes another time."""
    found = simulate(artifact.path, phase)
    assert found.context == cached
    assert found == simulate(artifact.path, phase, context=cached)
    assert found.cycles != simulate(artifact.path, phase, context=most - cached).cycles
    with pytest.raises(UserError, match=f"{phase} starts after 0 to {most} of 48 tokens"):
        simulate(artifact.path, phase, context=most + 1)


def test_a_trace_into_a_missing_directory_is_refused_before_any_work(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the directory .* does not exist"):
        simulate(artifact.path, "decode", trace=tmp_path / "nowhere" / "trace.json")


@pytest.mark.parametrize("engine", ["schedule", "native", "onnxruntime"])
@pytest.mark.parametrize(
    ("shape", "pos", "valid", "message"),
    [
        ((1, 3), 0, 1, "takes input_ids"),
        ((1, 1), -1, 1, "pos is -1"),
        ((1, 1), 0, 0, "valid is"),
        ((1, 1), 0, 2, "valid is"),
    ],
)
def test_an_engine_refuses_what_its_phase_cannot_take(
    engine: str, shape: tuple[int, int], pos: int, valid: int, message: str, artifact: Artifact
) -> None:
    with pytest.raises(UserError, match=message):
        make_engine(engine, artifact).run("decode", np.zeros(shape, np.int64), np.array([pos]), np.array([valid]))


@pytest.mark.parametrize(("prompt", "message"), [("  ", "the prompt is empty"), ("a\udcff", "not valid UTF-8")])
def test_a_prompt_that_is_no_text_is_refused(prompt: str, message: str, plain: Artifact) -> None:
    with pytest.raises(UserError, match=message):
        generate(plain, make_engine("onnxruntime", plain), prompt)

"""Several prefill lengths and contexts: one export, one weight file a rank, a schedule for each, the same answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from vacc_opt.backends.vacc import Program, load_target, verify
from vacc_opt.cli.main import main
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Graph
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.seeded import Seeded
from vacc_opt.runtime.artifact import TARGET, Artifact, open_artifact
from vacc_opt.runtime.compile import compile_model
from vacc_opt.runtime.engines import ENGINES, Engine, make_engine
from vacc_opt.runtime.entry_points import chunks, entry_points
from vacc_opt.runtime.generate import decode, generate, greedy
from vacc_opt.runtime.simulate import simulate
from vacc_opt.runtime.stored import PhaseModel, stored_constants
from vacc_opt.tests.listener import Silent

PHASES = ("prefill-16-48", "prefill-16-96", "prefill-64-96", "decode-48", "decode-96")
FP32, FLIPS = 1e-5, 0.03  # of the largest logit; sums of fp16 in another order take some codes one step further
PROMPT = [(5 * i) % 250 for i in range(37)]


@pytest.fixture(scope="module")
def several(config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Two ranks, int8 weights and KV, for prefills of 16 and 64 tokens and contexts of 48 and 96.

    Tokens of a call are attended as their codes, or how a prompt is cut into calls would change the model.
    """
    lengths, codes = "frontend.shape.input_ids=[[64, 16], [48, 96]]", "frontend.quantize.kv_args.new_tokens=quantised"
    file = config(tmp_path_factory.mktemp("several"))
    return open_artifact(Path(compile_model(file, [lengths, codes], Silent()).path))


def test_every_length_has_a_phase_for_each_context_that_holds_it(several: Artifact) -> None:
    assert several.phases == PHASES
    names = {path.name for path in several.path.iterdir()}
    assert {f"{phase}.schedule" for phase in PHASES} <= names
    assert {f"{phase}.rank{rank}.onnx" for phase in PHASES for rank in (0, 1)} <= names


def test_each_schedule_is_of_its_sizes_and_verifies(several: Artifact) -> None:
    target = load_target(several.path / TARGET)
    for name, entry in several.entry_points.items():
        program = Program.from_text(several.schedule(name))
        verify(program, target)
        assert program.tensor["input_ids"].shape[-1] == entry.tokens
        assert {tensor.shape[2] for tensor in program.of_role("cache")} == {entry.context}


def test_the_weights_of_a_rank_are_stored_once_for_all_phases(several: Artifact) -> None:
    places = []
    for phase in PHASES:
        model = onnx.load(several.path / f"{phase}.rank1.onnx", load_external_data=False)
        stored = {t.name: [e.value for e in t.external_data] for t in model.graph.initializer if t.external_data}
        weights = {name: place for name, place in stored.items() if place[0] == "rank1.safetensors"}
        # what differs are the numbers 0 .. length - 1 of the positions of a call
        assert {(place[0], "Range" in name) for name, place in stored.items() if name not in weights} <= {
            (f"{phase}.rank1.safetensors", True)
        }
        places.append(weights)
    assert all(one == places[0] for one in places)
    digests = [hash(array.tobytes()) for array in several.weights(PHASES[0], 1).values() if array.nbytes > 1024]
    assert len(set(digests)) == len(digests) > 12


def test_a_constant_that_several_phases_have_beside_others_of_its_name_is_stored_once() -> None:
    phases = []
    for number, rows in enumerate((64, 128, 128, 64)):
        graph = Graph("phase")
        rw = Rewriter(graph)
        table = rw.const(Seeded(f"of {rows}", "float", (rows, 8)), "table")
        rw.set_output("y", rw.op.Neg(table))
        phases.append(PhaseModel(f"phase{number}", graph, "", ()))
    stored = stored_constants(phases, 0)
    assert list(stored.aliases.values()) == [{}, {"table": "phase1.table"}, {"table": "phase1.table"}, {}]
    assert list(stored.weights) == ["table", "phase1.table"]
    assert not any(stored.tables.values())


def answer(engine: Engine, lengths: list[int], context: int) -> tuple[list[int], np.ndarray]:
    """Five tokens after the prompt, and all their logits, when it goes in by calls of these lengths."""
    engine.take_context(context)
    at = 0
    for length in lengths:
        taken = PROMPT[at : at + length]
        ids = np.array([taken + [0] * (length - len(taken))], np.int64)
        name = f"prefill-{length}-{context}"
        logits = engine.run(name, ids, np.array([at], np.int64), np.array([len(taken)], np.int64))[0, -1]
        at += len(taken)
    rows = [logits]
    for pos in range(len(PROMPT), len(PROMPT) + 4):
        rows.append(decode(engine, int(rows[-1].argmax()), pos))
    return [int(row.argmax()) for row in rows], np.stack(rows).astype(np.float64)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_choice_of_lengths_gives_the_same_tokens(engine: str, several: Artifact) -> None:
    one = make_engine(engine, several)
    tokens, logits = answer(one, [16, 16, 16], 48)
    same, other = answer(one, [16, 16, 16], 96)
    assert same == tokens
    np.testing.assert_allclose(other, logits, atol=FP32 * np.abs(logits).max(), rtol=0)
    same, other = answer(one, [64], 96)
    assert same == tokens
    np.testing.assert_allclose(other, logits, atol=FLIPS * np.abs(logits).max(), rtol=0)


def test_an_answer_takes_the_smallest_context_that_holds_it(several: Artifact) -> None:
    engine = make_engine("onnxruntime", several)
    prompt = len(several.tokenizer().encode_prompt("hi"))
    assert generate(several, engine, "hi", max_new_tokens=48 - prompt).context == 48
    assert generate(several, engine, "hi", max_new_tokens=49 - prompt).context == 96
    short, long = (generate(several, engine, "hi", max_new_tokens=4, context=c) for c in (48, 96))
    assert (short.context, long.context, short.token_ids) == (48, 96, long.token_ids)


def test_an_answer_ends_where_its_context_does(several: Artifact) -> None:
    engine = make_engine("onnxruntime", several)
    engine.take_context(48)
    made, stopped, _ = greedy(engine, [1] * 45, max_new_tokens=100)
    assert (len(made), stopped) == (4, "context")


def test_a_prompt_goes_in_by_the_calls_that_take_least_time() -> None:
    entries = entry_points((16, 64), (256,))

    def lengths(count: int, short: float, long: float) -> list[int]:
        seconds = {"prefill-16": short, "prefill-64": long, "decode-256": 1.0}
        return [chunk.entry.tokens for chunk in chunks(entries, count, seconds)]

    assert lengths(70, short=2, long=6) == [64, 16]
    assert lengths(40, short=2, long=7) == [16, 16, 16]
    assert lengths(40, short=4, long=7) == [64]
    assert lengths(16, short=2, long=3) == [16]
    # 64 more tokens do not fit behind 240 of 256
    assert lengths(250, short=9, long=7) == [64, 64, 64, 64]
    assert lengths(256, short=1, long=9) == [16] * 16


def test_the_last_slots_of_a_context_are_decoded() -> None:
    entries = entry_points((32,), (80,))
    found = chunks(entries, 66, {"prefill-32": 1, "prefill": 1, "decode": 1})
    assert [(one.entry.kind, one.start, one.count) for one in found] == [
        ("prefill", 0, 32), ("prefill", 32, 32), ("decode", 64, 1), ("decode", 65, 1),
    ]  # fmt: skip


def test_a_phase_of_several_is_chosen_by_its_name(several: Artifact) -> None:
    assert simulate(several.path, "decode-96").context == 95
    with pytest.raises(UserError) as caught:
        simulate(several.path, "decode")
    assert "has several phases 'decode'" in caught.value.message
    assert caught.value.hint == "name one: decode-48, decode-96"
    with pytest.raises(UserError) as caught:
        simulate(several.path, "decode-97")
    assert caught.value.hint == "did you mean `decode-96`?"


def test_generate_takes_the_context_that_is_asked_for(several: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(several.path), "--prompt", "hi", "--max-new-tokens", "2", "--json", "--context"]
    assert main([*command, "96"]) == 0
    assert json.loads(capsys.readouterr().out)["context"] == 96
    assert main([*command, "64"]) == 2
    assert "has no context 64" in capsys.readouterr().err

"""Reproducers: written on any failure, replayed anywhere, honest about what they no longer show."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from vacc_opt.ir import CheckError, Graph, Literal, UserError, VaccError
from vacc_opt.ir.storage import read_safetensors_header, write_safetensors
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.passes.infra import registry
from vacc_opt.passes.infra.check.numerics import NumericMismatch
from vacc_opt.passes.infra.debug.reproducer import Numerics, Reproducer, WriteReproducer, check_replay, rest_of
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.pipeline import parse_pipeline
from vacc_opt.tests.passes import planted
from vacc_opt.tests.passes.decoder import KV, WIDTH, decoder


@pytest.fixture(autouse=True)
def planted_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.all_passes()
    for item in planted.ALL:
        monkeypatch.setitem(registry._PASSES, item.name, item)


def failing(graph: Graph, pipeline: str, path: Path, numerics: Numerics | None = None, **options: bool) -> Exception:
    writer = WriteReproducer(path, numerics=numerics, **options)
    checks = [numerics.instrument()] if numerics is not None else []
    with pytest.raises(Exception) as error:
        run_pipeline(graph, pipeline, instruments=[*checks, writer], verify_each=options.get("verify_each", True))
    assert writer.written == path
    return error.value


CASES = [
    ("an error of a pass", "subtract-from-zero,raises-at{check=true,at=2}", None),
    ("a defect of a pass", "raises-at", None),
    ("an invalid graph", "breaks-types", None),
    ("wrong values", "wrong-at{at=3}", Numerics()),
]


@pytest.mark.parametrize(("pipeline", "numerics"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_what_failed_fails_again_the_same_way(tmp_path: Path, pipeline: str, numerics: Numerics | None) -> None:
    graph = planted.chain()
    if pipeline.startswith("subtract"):
        graph = from_text(
            to_text(graph).replace("ReduceSum (n19", "ReduceSum (n20").replace("y =", "n20 = Neg (n19)\n   y =")
        )
        pipeline = pipeline.replace("subtract-from-zero,", "simplify,")
    error = failing(graph, pipeline, tmp_path / "r.vacc", numerics)
    again = Reproducer.read(tmp_path / "r.vacc")
    found = again.replay()
    assert type(found) is type(error)
    with pytest.raises(CheckError, match="it fails the same way: "):
        check_replay(again, found)


def test_the_error_names_the_file() -> None:
    writer = WriteReproducer()
    with pytest.raises(VaccError) as error:
        run_pipeline(planted.chain(), "raises-at{check=true}", instruments=[writer])
    assert error.value.hint == f"reproducer: vacc-opt opt --run-reproducer {writer.written}"
    assert writer.written is not None
    shutil.rmtree(writer.written.parent)


def test_a_wrong_option_of_a_person_gets_a_reproducer_only_when_one_is_asked_for(tmp_path: Path) -> None:
    writer = WriteReproducer()
    with pytest.raises(UserError):
        run_pipeline(decoder(), "kv8", instruments=[writer])
    assert writer.written is None
    failing(decoder(), "kv8", tmp_path / "r.vacc")


def test_a_mended_pass_is_reported_as_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(planted.chain(), "wrong-at", tmp_path / "r.vacc", Numerics())
    monkeypatch.setattr(planted.WrongAt, "make", planted.SubtractFromZero.make)
    again = Reproducer.read(tmp_path / "r.vacc")
    assert check_replay(again, again.replay()) == "the pipeline runs without an error; then it failed"


def test_another_failure_is_reported_as_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(planted.chain(), "wrong-at", tmp_path / "r.vacc", Numerics())
    monkeypatch.setattr(planted.WrongAt, "make", lambda *_: 1 / 0)
    again = Reproducer.read(tmp_path / "r.vacc")
    with pytest.raises(
        CheckError, match="it fails another way: division by zero\n  then: wrong-at: an exact pass, but y differs by"
    ):
        check_replay(again, again.replay())


def test_a_reproducer_is_a_model_in_text_form(tmp_path: Path) -> None:
    graph = planted.chain()
    before = to_text(graph)
    failing(graph, "wrong-at", tmp_path / "r.vacc", Numerics())
    assert to_text(from_text((tmp_path / "r.vacc").read_text())) == before


def test_the_same_failure_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        failing(planted.chain(), "wrong-at", tmp_path / name, Numerics())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_options_of_the_check_and_of_verification_come_back(tmp_path: Path) -> None:
    numerics = Numerics(tolerance=1e-3, seed=5, sizes={"batch": 3}, weights="seeded")
    writer = WriteReproducer(tmp_path / "r.vacc", numerics=numerics, verify_each=False, always=True)
    run_pipeline(planted.chain(), "subtract-from-zero", instruments=[writer])
    again = Reproducer.read(tmp_path / "r.vacc")
    assert (again.numerics, again.verify_each, again.pipeline) == (numerics, False, "subtract-from-zero")
    assert check_replay(again, again.replay()) == "the pipeline runs without an error, as it did then"


def quantized(folder: Path) -> tuple[Graph, str]:
    """A decoder whose weights lie in a file, and a pipeline that reads another file."""
    folder.mkdir()
    graph = decoder()
    consts = {v.name: v.const for v in graph.constants() if v.const is not None and v.const.nbytes > 100}
    write_safetensors(folder / "model.safetensors", consts)
    for name, source in read_safetensors_header(folder / "model.safetensors").items():
        graph.values[name].const = source
    names = [f"layers.0.{w}.{what}" for w in ("key", "value") for what in ("scale", "zero")]
    write_safetensors(folder / "kv.safetensors", {n: Literal(np.full((KV, WIDTH), 0.05, np.float32)) for n in names})
    return graph, f"simplify,kv-cache{{context=32}},kv8{{scales={folder / 'kv.safetensors'}}},wrong-codes{{weight=wu}}"


def test_it_replays_without_the_weights_and_the_files_that_it_was_made_with(tmp_path: Path) -> None:
    graph, pipeline = quantized(tmp_path / "there")
    failing(graph, pipeline, tmp_path / "there" / "r.vacc", Numerics())
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "there" / "r.vacc").rename(tmp_path / "elsewhere" / "moved.vacc")
    shutil.rmtree(tmp_path / "there")
    again = Reproducer.read(moved)
    assert again.notes[-1] == f"seeded weights stand for {tmp_path}/there/model.safetensors, which is not here"
    assert isinstance(again.replay(), NumericMismatch)


def test_files_that_options_name_are_carried_along(tmp_path: Path) -> None:
    graph, pipeline = quantized(tmp_path / "over there")
    writer = WriteReproducer(tmp_path / "r.vacc", always=True)
    run_pipeline(graph, pipeline.replace(",wrong-codes{weight=wu}", ""), instruments=[writer])
    (tmp_path / "over there" / "kv.safetensors").unlink()
    again = Reproducer.read(tmp_path / "r.vacc")
    assert again.replay() is None
    assert "Vastai::QuantizeKV" in again.graph.op_counts()


@pytest.mark.parametrize(
    ("pipeline", "name", "rest"),
    [
        ("simplify,w8a16,legalize", "w8a16", "w8a16,legalize"),
        ("fixpoint(simplify,w8a16),legalize", "w8a16", "w8a16,fixpoint(simplify,w8a16),legalize"),
        ("simplify,prefill{seq=4}(w8a16,legalize),decode(legalize)", "w8a16", "w8a16,legalize"),
    ],
)
def test_the_pipeline_goes_on_from_the_failing_pass(pipeline: str, name: str, rest: str) -> None:
    from vacc_opt.passes.infra.base import Pass
    from vacc_opt.passes.infra.pipeline import dump_pipeline, flat

    items = parse_pipeline(pipeline)
    item = next(one for one in flat(items) if one.name == name)
    assert isinstance(item, Pass)
    assert dump_pipeline(rest_of(items, item)) == rest


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.vacc").write_text(to_text(planted.chain()))
    with pytest.raises(UserError, match=r"m\.vacc: no reproducer\n  one is written when a pipeline fails"):
        Reproducer.read(tmp_path / "m.vacc")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Reproducer.read(tmp_path / "other")


def test_a_failure_in_a_phase_is_that_of_its_graph(tmp_path: Path) -> None:
    pipeline = "slice-last-token,kv-cache{context=32},prefill{seq=4}(wrong-codes{weight=wu})"
    failing(decoder(), pipeline, tmp_path / "r.vacc", Numerics())
    again = Reproducer.read(tmp_path / "r.vacc")
    assert again.pipeline == "wrong-codes"
    assert str(again.graph.values["input_ids"].type) == "int64[1,4]"
    assert again.notes == ("the graph is that of the scope 'prefill'",)
    assert isinstance(again.replay(), NumericMismatch)

"""Models as files: each form loads, each output form is complete or absent, every stage runs on stock onnxruntime."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from vacc_opt.ir.errors import UserError
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.runtime.artifact import Artifact
from vacc_opt.runtime.models import check_output, load_model, write_model

STAGES = (
    "simplify,fuse-rms-norm,fuse-rotary{positions=48},fuse-gqa,fuse-swiglu",
    "slice-last-token,kv-cache{context=48}",
    "w8a16,kv8{scales=SCALES}",
    "split-tp{tp=2},legalize",
)


def pipeline(stages: int, artifact: Artifact) -> str:
    return ",".join(STAGES[:stages]).replace("SCALES", str(artifact.path / "kv_scales.safetensors"))


def feeds(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    """Four tokens into empty caches, for a growing or a fixed cache."""
    found = {}
    types = {"tensor(float)": np.float32, "tensor(int8)": np.int8}
    for one in session.get_inputs():
        shape = [d if isinstance(d, int) else {"batch": 1, "seq": 4, "past": 0}.get(d, 4) for d in one.shape]
        if one.name == "input_ids":
            found[one.name] = np.array([[5, 6, 7, 8]])
        elif one.name == "position_ids":
            found[one.name] = np.array([[0, 1, 2, 3]])
        elif one.name in ("pos", "valid"):
            found[one.name] = np.array([0 if one.name == "pos" else 4])
        elif one.name == "attention_mask":
            found[one.name] = np.ones((1, 4), np.int64)
        else:
            found[one.name] = np.zeros(shape, types[one.type])
    return found


def last_logits(path: Path) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(["logits"], feeds(session))[0]
    return logits[0, -1]


@pytest.fixture(scope="module")
def reference(exported: Path) -> np.ndarray:
    return last_logits(exported)


@pytest.mark.parametrize("stages", [1, 2])
def test_every_unquantized_stage_runs_on_stock_onnxruntime(
    stages: int, exported: Path, artifact: Artifact, reference: np.ndarray, tmp_path: Path
) -> None:
    graph = load_model(str(exported))
    run_pipeline(graph, pipeline(stages, artifact))
    write_model(graph, tmp_path / "out.onnx")
    # reassociated fp32 sums, relative to the largest logit
    assert np.abs(last_logits(tmp_path / "out.onnx") - reference).max() <= 1e-5 * np.abs(reference).max()


def test_all_ranks_in_one_file_equal_the_model_before_the_split(
    exported: Path, artifact: Artifact, tmp_path: Path
) -> None:
    for stages, name in ((3, "whole"), (4, "split")):
        graph = load_model(str(exported))
        run_pipeline(graph, pipeline(stages, artifact) + (",expand-ranks" if name == "split" else ""))
        write_model(graph, tmp_path / f"{name}.onnx")
    whole, split = last_logits(tmp_path / "whole.onnx"), last_logits(tmp_path / "split.onnx")
    assert np.abs(split - whole).max() <= 1e-5 * np.abs(whole).max()  # the sums of two ranks are added last


def test_a_split_graph_becomes_a_directory_with_a_file_a_rank(
    exported: Path, artifact: Artifact, tmp_path: Path
) -> None:
    graph = load_model(str(exported))
    run_pipeline(graph, pipeline(4, artifact))
    with pytest.raises(UserError, match="split over 2 ranks") as caught:
        write_model(graph, tmp_path / "out.onnx")
    assert "expand-ranks" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "rank2.onnx").write_bytes(b"of an earlier split")
    written = write_model(graph, tmp_path / "ranks")
    names = sorted(one.path.name for one in written)
    assert names == ["rank0.onnx", "rank0.safetensors", "rank1.onnx", "rank1.safetensors"]
    assert names == sorted(p.name for p in (tmp_path / "ranks").iterdir())


def test_a_failure_leaves_no_file_and_no_directory(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vacc_opt.runtime.models.save_onnx", fail)
    for out in ("out.onnx", "directory"):
        with pytest.raises(OSError, match="No space left"):
            write_model(load_model(str(exported)), tmp_path / out)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="not a model"):
        load_model(str(tmp_path / "notes.txt"))
    with pytest.raises(UserError, match="no form of a model"):
        write_model(load_model_text(tmp_path), tmp_path / "notes.txt")


def load_model_text(directory: Path) -> object:
    path = directory / "one.vacc"
    path.write_text('<ir_version: 10, opset_import: ["" : 24]>\ng (float[2] x) => (float[2] y) {\n  y = Relu (x)\n}\n')
    return load_model(str(path))


def test_weights_that_are_not_ours_are_never_overwritten(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"the checkpoint of the user")
    with pytest.raises(UserError, match=r"its weights would overwrite model\.safetensors"):
        write_model(load_model(str(exported)), tmp_path / "model.onnx")
    assert (tmp_path / "model.safetensors").read_bytes() == b"the checkpoint of the user"


def test_a_misspelt_suffix_makes_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no form of a model"):
        check_output(tmp_path / "out.onx")


def test_a_checkpoint_is_no_place_for_output(checkpoint: Path, tmp_path: Path, exported: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    with pytest.raises(UserError, match="model: is a checkpoint"):
        write_model(load_model(str(exported)), tmp_path / "model")
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before


def test_ranks_beside_the_model_that_they_are_made_of_leave_it_there(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported.parent, tmp_path / "work")
    graph = load_model(str(tmp_path / "work" / "model.onnx"))
    run_pipeline(graph, "simplify,fuse-rms-norm,fuse-rotary,fuse-gqa,fuse-swiglu,split-tp{tp=2}")
    write_model(graph, tmp_path / "work")
    names = {p.name for p in (tmp_path / "work").iterdir()}
    assert {"model.onnx", "model.safetensors", "rank0.onnx", "rank1.safetensors"} <= names


def test_what_a_killed_write_left_is_removed_by_the_next(exported: Path, tmp_path: Path) -> None:
    (tmp_path / ".vacc-opt-abcdefgh").mkdir()
    write_model(load_model(str(exported)), tmp_path / "again.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.onnx", "again.safetensors"]

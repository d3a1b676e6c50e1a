"""The artifact: weights once, digests checked, damage named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.storage import read_safetensors_header
from vacc_opt.runtime.artifact import Artifact, open_artifact
from vacc_opt.runtime.engines import make_engine
from vacc_opt.runtime.files import replaced_directory
from vacc_opt.runtime.generate import prefill


def test_it_holds_the_files_of_the_design(artifact: Artifact) -> None:
    names = {p.name for p in artifact.path.iterdir()}
    graphs = {f"{phase}.rank{rank}.onnx" for phase in ("prefill", "decode") for rank in (0, 1)}
    assert graphs <= names
    assert {"manifest.json", "rank0.safetensors", "rank1.safetensors", "prefill.schedule", "decode.schedule"} <= names
    assert {"report.html", "remarks.yaml", "tokenizer.json", "chat_template.jinja", "kv_scales.safetensors"} <= names


def test_both_phases_refer_into_one_weight_file(artifact: Artifact) -> None:
    places = []
    for phase in ("prefill", "decode"):
        model = onnx.load(artifact.path / f"{phase}.rank1.onnx", load_external_data=False)
        external = [t for t in model.graph.initializer if t.external_data]
        assert {e.value for t in external for e in t.external_data if e.key == "location"} == {"rank1.safetensors"}
        places.append({t.name: [e.value for e in t.external_data] for t in external if t.name.endswith("qweight")})
    assert places[0] == places[1] != {}


def test_the_schedule_and_the_graph_read_equal_weights(artifact: Artifact) -> None:
    graph = artifact.graph("decode")
    for rank in range(artifact.ranks):
        weights = artifact.weights("decode", rank)
        for value in graph.constants():
            if value.name in weights:
                assert value.const is not None
                np.testing.assert_array_equal(value.const.rank(rank).read(), weights[value.name])


def test_the_ranks_hold_different_slices(artifact: Artifact) -> None:
    first, second = (artifact.weights("decode", rank) for rank in range(2))
    different = [name for name in first if not np.array_equal(first[name], second[name])]
    assert any("q_proj" in name for name in different)
    assert any("embed_tokens" in name for name in different)


def test_a_directory_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an artifact"):
        open_artifact(tmp_path)
    with pytest.raises(UserError, match="no such artifact directory"):
        open_artifact(tmp_path / "missing")


def damaged(artifact: Artifact, directory: Path, name: str, at: int) -> Path:
    """A copy of an artifact with one bit of a file flipped."""
    copy = directory / "copy"
    shutil.copytree(artifact.path, copy)
    content = bytearray((copy / name).read_bytes())
    content[at] ^= 1
    (copy / name).write_bytes(bytes(content))
    return copy


@pytest.mark.parametrize("name", ["kv_scales.safetensors", "decode.schedule", "prefill.rank0.onnx"])
def test_a_damaged_file_is_named(name: str, artifact: Artifact, tmp_path: Path) -> None:
    copy = damaged(artifact, tmp_path, name, (artifact.path / name).stat().st_size // 2)
    with pytest.raises(UserError, match=f"the file {name} is damaged"):
        open_artifact(copy)


def test_a_damaged_header_of_weights_is_named(artifact: Artifact, tmp_path: Path) -> None:
    for at in (3, 100):  # its length, a digest
        copy = damaged(artifact, tmp_path / str(at), "rank1.safetensors", at)
        with pytest.raises(UserError, match=r"the file rank1\.safetensors is damaged"):
            open_artifact(copy)


@pytest.mark.parametrize("engine", ["schedule", "onnxruntime"])
def test_a_flipped_bit_of_a_weight_is_named_by_whatever_runs_it(
    engine: str, artifact: Artifact, tmp_path: Path
) -> None:
    source = read_safetensors_header(artifact.path / "rank1.safetensors")["model.embed_tokens.weight"]
    copy = damaged(artifact, tmp_path, "rank1.safetensors", source.offset + 5)
    opened = open_artifact(copy)  # reads no weights
    assert len(opened.schedule("decode")) > 0
    with pytest.raises(UserError, match=r"rank1\.safetensors is damaged: .* \(model\.embed_tokens\.weight\)"):
        prefill(make_engine(engine, opened), [1, 2, 3])


def test_a_missing_file_is_named(artifact: Artifact, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact.path, copy)
    (copy / "decode.rank1.onnx").unlink()
    with pytest.raises(UserError, match=r"the file decode\.rank1\.onnx is missing"):
        open_artifact(copy)


def test_a_directory_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with (
        pytest.raises(UserError, match="exists and is not an artifact"),
        replaced_directory(tmp_path / "thesis", lambda path: False),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_a_replaced_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with replaced_directory(target, lambda path: True) as scratch:
        (scratch / "one").write_text("1")
        assert not target.exists()
    with replaced_directory(target, lambda path: True) as scratch:
        (scratch / "two").write_text("2")
        assert (target / "one").exists()
    assert [p.name for p in target.iterdir()] == ["two"]
    assert [p.name for p in target.parent.iterdir()] == ["b"]


def test_a_failed_replacement_leaves_no_parents(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replaced_directory(tmp_path / "a" / "b" / "c", lambda path: True):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []

"""What was done is not done again: equal bytes with and without the cache, and nothing damaged or changed is used."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from vacc_opt.ir.text import to_text
from vacc_opt.runtime.artifact import open_artifact
from vacc_opt.runtime.cache import KEPT, Cache, kept_graph, kept_sha256
from vacc_opt.runtime.compile import compile_model
from vacc_opt.runtime.stamps import checkpoint_stamp, stamp
from vacc_opt.tests.listener import Silent


class Heard(Silent):
    """Keeps the sentences of the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[str, str] = {}

    def done(self, name: str, sentence: str, seconds: float | None = None) -> None:
        self.said[name] = sentence


def compiled(file: Path, *overrides: str) -> tuple[Path, dict[str, str]]:
    """Where the artifact is, and what was said of each step."""
    listener = Heard()
    report = compile_model(file, overrides, listener)
    assert report.path is not None
    return Path(report.path), listener.said


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def first(config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that was compiled once, with its workspace beside it."""
    file = config(tmp_path_factory.mktemp("first"))
    compiled(file)
    return file


@pytest.fixture
def again(first: Path, tmp_path: Path, config: Callable[..., Path]) -> Path:
    """The same configuration over a copy of that workspace: what lies in it now lies at another place."""
    shutil.copytree(first.parent / "out", tmp_path / "out")
    return config(tmp_path)


def test_a_second_run_with_nothing_changed_does_nothing(first: Path) -> None:
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (first.parent / "out" / "tiny").iterdir()}
    path, said = compiled(first)
    assert set(said) >= {"export", "recognize", "calibrate", "quantize", "split", "schedule", "write"}
    assert set(said.values()) == {"cached"}
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in path.iterdir()} == before


def test_with_and_without_the_cache_the_bytes_are_equal(again: Path) -> None:
    """The copied artifact is none that this place made: all is done again, with what the cache has of the steps."""
    before = contents(again.parent / "out" / "tiny")
    path, said = compiled(again)
    assert said["calibrate"].startswith("cached, KV ranges")
    assert [line.split()[1] for line in said["schedule"].splitlines()] == ["cached,", "cached,"]
    assert contents(path) == before


def test_another_prefill_length_links_the_weights_and_keeps_the_decode(first: Path) -> None:
    old = first.parent / "out" / "tiny"
    new, said = compiled(first, "name=longer", "frontend.shape.input_ids=[[32], [48]]")
    for name in ("rank0.safetensors", "rank1.safetensors"):
        assert (new / name).samefile(old / name)
    assert (new / "prefill.rank0.safetensors").is_file()  # position ids: there are too many to stand in the graph
    assert said["write"].endswith(", 2 of them cached")
    prefill, decode = said["schedule"].splitlines()
    assert "cached" not in prefill
    assert "cached" in decode
    shutil.rmtree(new)
    open_artifact(old).weights("decode", 1)  # nothing of the other one is gone


def test_weights_that_were_changed_since_are_written_again(again: Path) -> None:
    first_path, _ = compiled(again)
    expected = contents(first_path)
    file = first_path / "rank0.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    path, said = compiled(again, "name=other")
    assert said["write"].endswith(", 1 of them cached")
    assert (path / "rank0.safetensors").read_bytes() == expected["rank0.safetensors"]


def test_another_checkpoint_at_the_same_place_is_seen(
    exported: Path, config: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(exported.parent, tmp_path / "model")
    file = config(tmp_path, checkpoint=tmp_path / "model" / "model.onnx")
    path, _ = compiled(file)
    before = contents(path)
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\x00\x00\x00\x40"  # 2, of a norm
    weights.write_bytes(data)
    path, said = compiled(file)
    assert "cached" not in said["write"]
    assert contents(path)["rank1.safetensors"] != before["rank1.safetensors"]


def test_a_missing_or_damaged_file_of_the_artifact_is_made_again(again: Path) -> None:
    path, _ = compiled(again)
    before = contents(path)
    (path / "decode.schedule").unlink()
    (path / "remarks.yaml").write_text("")
    assert contents(compiled(again)[0]) == before


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_a_damaged_entry_is_as_none(damage: bytes | None, tmp_path: Path) -> None:
    cache = Cache.of(tmp_path)
    cache.put("kind", "key", b"what was kept")
    assert cache.get("kind", "key") == b"what was kept"
    file = tmp_path / ".cache" / "kind" / "key"
    file.write_bytes(file.read_bytes()[:-1] + b"!" if damage is None else damage)
    assert cache.get("kind", "key") is None


def test_a_damaged_entry_is_made_again(tmp_path: Path, exported: Path) -> None:
    from vacc_opt.frontends import load_onnx

    cache, made = Cache.of(tmp_path), 0

    def make() -> Any:
        nonlocal made
        made += 1
        return load_onnx(exported)

    graph, kept = kept_graph(cache, {"path": "p"}, make)
    assert (made, kept) == (1, False)
    same, kept = kept_graph(cache, {"path": "p"}, make)
    assert (made, kept, to_text(same)) == (1, True, to_text(graph))
    (entry,) = (tmp_path / ".cache" / "export").iterdir()
    entry.write_bytes(entry.read_bytes()[:-9])
    assert kept_graph(cache, {"path": "p"}, make)[1] is False
    assert kept_graph(cache, {"path": "other"}, make)[1] is False
    assert made == 3


def test_the_cache_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = Cache.of(tmp_path)
    for number in range(KEPT):
        cache.put("kind", str(number), b"x")
        os.utime(tmp_path / ".cache" / "kind" / str(number), ns=(number, number))
    cache.get("kind", "0")
    cache.put("kind", "new", b"x")
    assert cache.get("kind", "0") is not None
    assert cache.get("kind", "1") is None
    assert len(list((tmp_path / ".cache" / "kind").iterdir())) == KEPT


def test_a_workspace_that_cannot_be_written_has_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cache = Cache.of(tmp_path / "file")
    cache.put("kind", "key", b"x")
    assert cache.get("kind", "key") is None


def test_a_cache_that_does_not_keep_writes_nothing(tmp_path: Path) -> None:
    Cache.of(tmp_path, keeps=False).put("kind", "key", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_stamp_sees_the_content_of_small_files_and_the_times_of_large_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "config.json"
    small.write_text("{}")
    before = stamp(tmp_path)
    os.utime(small, ns=(1, 1))
    assert stamp(tmp_path) == before
    small.write_text("[]")
    assert stamp(tmp_path) != before
    monkeypatch.setattr("vacc_opt.runtime.stamps._SMALL", 10)
    monkeypatch.setattr("vacc_opt.runtime.stamps._END", 4)
    large = tmp_path / "weights"
    large.write_bytes(bytes(100))
    os.utime(large, ns=(5, 5))
    before = stamp(large)
    large.write_bytes(bytes(3) + b"x" + bytes(96))  # as long, at the same time, another header
    os.utime(large, ns=(5, 5))
    assert stamp(large) != before
    large.write_bytes(bytes(100))
    assert stamp(large) != before  # written later
    assert stamp(tmp_path / "nothing") == ""
    (tmp_path / "below").mkdir()
    before = stamp(tmp_path), stamp(tmp_path, deep=True)
    (tmp_path / "below" / "text.json").write_text("{}")
    assert stamp(tmp_path) == before[0]
    assert stamp(tmp_path, deep=True) != before[1]


def test_the_stamp_of_an_onnx_file_is_over_its_weights_too(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported.parent, tmp_path / "model")
    path = tmp_path / "model" / "model.onnx"
    before = checkpoint_stamp(path)
    (tmp_path / "model" / "thesis.tex").write_text("not of the model")
    assert checkpoint_stamp(path) == before
    weights = path.with_suffix(".safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert checkpoint_stamp(path) != before


def test_a_digest_is_known_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vacc_opt.runtime.stamps._SMALL", 10)
    file, cache = tmp_path / "weights", Cache.of(tmp_path)
    file.write_bytes(bytes(200_000))
    digest = kept_sha256(cache, file)
    monkeypatch.setattr("vacc_opt.runtime.cache.sha256", lambda path: "read again")
    assert kept_sha256(cache, file) == digest
    file.write_bytes(bytes(200_001))
    assert kept_sha256(cache, file) == "read again"


@pytest.mark.full
def test_another_tp_does_not_export_again(lively: Path, config: Callable[..., Path], tmp_path: Path) -> None:
    file = config(tmp_path, checkpoint=lively, type="huggingface")
    assert not compiled(file)[1]["export"].startswith("cached")
    kept, said = compiled(file, "frontend.model_kwargs.tp=1")
    assert said["export"].startswith("cached, ")
    fresh, said = compiled(file, "frontend.model_kwargs.tp=1", f"workspace.path={tmp_path / 'elsewhere'}")
    assert not said["export"].startswith("cached")
    assert contents(fresh) == contents(kept)


def test_the_stamp_of_an_onnx_file_is_over_weights_in_a_directory_below(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, 1, [1, 64]) for name in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight]))
    (tmp_path / "below").mkdir()
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="below/w.bin", size_threshold=16)
    before = checkpoint_stamp(tmp_path / "m.onnx")
    (tmp_path / "below" / "w.bin").write_bytes(bytes(64 * 64 * 4))
    assert checkpoint_stamp(tmp_path / "m.onnx") != before

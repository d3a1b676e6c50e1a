"""``pytorch_model*.bin``: tensors are slices of the file, nothing of its pickle runs, each damage has one clear line."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vacc_opt.frontends import export_checkpoint, open_checkpoint
from vacc_opt.frontends.torch_zip import read_torch_zip
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.tensor import Source, Transposed


def message_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_torch_zip(path)
    return str(caught.value)


def shard(root: Path, names: list[str] | None = None) -> list[str]:
    """Replace model.safetensors by two .bin shards and their index, tensors dealt in a shuffled order."""
    from safetensors.torch import load_file

    tensors = load_file(root / "model.safetensors")
    order = sorted(tensors)
    random.Random(0).shuffle(order)
    files = names or [f"pytorch_model-0000{i + 1}-of-00002.bin" for i in range(2)]
    weight_map = {}
    for i, file in enumerate(files):
        part = OrderedDict((name, tensors[name]) for name in order[i :: len(files)])
        torch.save(part, root / file)
        weight_map |= dict.fromkeys(part, file)
    (root / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (root / "model.safetensors").unlink()
    return files


@pytest.fixture
def sharded(tied_llama: Any, tmp_path: Path) -> Path:
    root = Path(shutil.copytree(tied_llama.path, tmp_path / "model"))
    shard(root)
    return root


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    ],
)
def test_every_element_type_reads_as_torch_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.arange(12) % 3).reshape(3, 4).to(dtype)
    torch.save({"w": tensor}, tmp_path / "x.bin")
    read = read_torch_zip(tmp_path / "x.bin")["w"]
    assert read.dtype.value == {"float32": "float", "float64": "double"}.get(str(dtype)[6:], str(dtype)[6:])
    np.testing.assert_array_equal(read.read().astype(np.float64), tensor.double().numpy())
    np.testing.assert_array_equal(read.read((slice(1, 3), slice(2, 4))).astype(np.float64), tensor[1:, 2:].double())


def test_views_of_a_storage_are_slices_and_transposes_of_it(tmp_path: Path) -> None:
    packed = torch.randn(8, 6)
    state = {
        "packed": packed,
        "tied": packed,
        "rows": packed[2:5],
        "transposed": packed.T,
        "moved": torch.randn(2, 3, 4).permute(2, 0, 1),
        "column": torch.randn(4, 1).T,
        "scalar": torch.tensor(3.0),
        "none": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    torch.save(state, tmp_path / "x.bin")
    read = read_torch_zip(tmp_path / "x.bin")
    assert list(read) == list(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(read[name].read(), tensor.detach().numpy(), name)
    assert read["tied"] == read["packed"]
    assert isinstance(read["rows"], Source)
    assert isinstance(read["transposed"], Transposed)


def test_opening_reads_no_weight(tmp_path: Path) -> None:
    torch.save({"w": torch.full((1000, 1000), 7.0)}, tmp_path / "x.bin")
    source = read_torch_zip(tmp_path / "x.bin")["w"]
    assert isinstance(source, Source)
    with (tmp_path / "x.bin").open("r+b") as file:  # what is read later is what lies in the file then
        file.seek(source.offset)
        file.write(np.float32(5).tobytes())
    assert source.read((slice(0, 1), slice(0, 2))).tolist() == [[5, 7]]


def test_shards_in_any_order_are_one_checkpoint(tied_llama: Any, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tied_llama.path, tmp_path / "model"))
    shard(root, ["z.bin", "a.bin", "pytorch_model-00002-of-00003.bin"])
    whole, parts = open_checkpoint(tied_llama.path), open_checkpoint(root)
    assert set(parts.tensors) == set(whole.tensors)
    for name, expr in parts.tensors.items():
        assert isinstance(expr, Source)
        np.testing.assert_array_equal(expr.read(), whole.tensors[name].read())


def test_the_index_decides_where_two_shards_hold_one_name(sharded: Path) -> None:
    files = sorted(p.name for p in sharded.glob("*.bin"))
    weight_map = json.loads((sharded / "pytorch_model.bin.index.json").read_text())["weight_map"]
    name = next(n for n, file in weight_map.items() if file == files[0])
    other = torch.load(sharded / files[1], weights_only=True)
    torch.save({**other, name: torch.zeros(1)}, sharded / files[1])
    source = open_checkpoint(sharded).tensors[name]
    assert isinstance(source, Source)
    assert Path(source.file).name == files[0]


def test_a_single_file_exports_to_the_graph_of_safetensors(tied_llama: Any, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tied_llama.path, tmp_path / "model"))
    # as published: the tied head is a second name of the embedding
    torch.save(tied_llama.module.state_dict(), root / "pytorch_model.bin")
    (root / "model.safetensors").unlink()
    expected = {v.name: v.const for v in export_checkpoint(tied_llama.path, isolated=False).constants()}
    graph = export_checkpoint(root, isolated=False)
    assert {v.name for v in graph.constants()} == set(expected)
    for value in graph.constants():
        wanted = expected[value.name]
        assert value.const is not None
        assert wanted is not None
        np.testing.assert_array_equal(value.const.read(), wanted.read(), value.name)


# mistakes


class Runs:
    """What a malicious file holds: unpickled by the book, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2), "x": Runs(tmp_path / "made")}, tmp_path / "x.bin")
    text = message_of(tmp_path / "x.bin")
    assert "x.bin: its pickle asks for posix.mkdir, and a checkpoint may hold tensors only" in text
    assert "nothing of it was run" in text
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"w": torch.zeros(2), "epoch": 3}, "'epoch' is a int, not a tensor"),
        ({"state_dict": {"w": torch.zeros(2)}}, "'state_dict' is a dict, not a tensor"),
        ([torch.zeros(2)], "holds a list, not tensors by name"),
        ({"w": torch.zeros(1).expand(4)}, "w is a view with gaps or repeats (shape [4], strides [0])"),
        ({"w": torch.zeros(4, 4)[:, :2]}, "w is a view with gaps or repeats (shape [4, 2], strides [4, 1])"),
        ({"w": torch.nn.Linear(2, 2)}, "its pickle asks for torch.nn.modules.linear.Linear"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "its pickle asks for torch.ComplexFloatStorage"),
    ],
)
def test_what_is_not_tensors_by_name_is_refused(tmp_path: Path, state: Any, expected: str) -> None:
    torch.save(state, tmp_path / "x.bin")
    assert expected in message_of(tmp_path / "x.bin")


def test_a_file_of_before_torch_1_6_says_how_to_convert_it(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    text = message_of(tmp_path / "x.bin")
    assert "a pickle in the format before torch 1.6" in text
    code = text.partition('-c "')[2].partition('"`')[0].replace("'x.bin'", repr(str(tmp_path / "x.bin")))
    exec(code, {})  # the command that the message gives
    assert read_torch_zip(tmp_path / "x.bin")["w"].read().tolist() == [1, 1]


@pytest.mark.parametrize("keep", [0, 3, 100, 2000, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    torch.save({"w": torch.zeros(64, 64)}, tmp_path / "x.bin")
    data = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(data[:keep])
    text = message_of(tmp_path / "x.bin")
    assert "damaged" in text
    assert "download the file again" in text


def test_flipped_bytes_are_refused_or_change_values_alone(tmp_path: Path) -> None:
    state = {"w": torch.randn(4, 5), "t": torch.randn(4, 5).T, "h": torch.randn(3).half()}
    torch.save(state, tmp_path / "x.bin")
    data, rng, refused = (tmp_path / "x.bin").read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 2, 5])):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "y.bin").write_bytes(damaged)
        try:
            for expr in read_torch_zip(tmp_path / "y.bin").values():
                assert expr.read().shape == expr.shape
        except UserError:
            refused += 1
    assert refused > 30  # most bytes are those of descriptions


def rezip(path: Path, change: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the archive again with some members replaced."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            short = name.partition("/")[2]
            if change.get(short, data):
                archive.writestr(name, change.get(short, data))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(64, 64)}, tmp_path / "x.bin")
    rezip(tmp_path / "x.bin", {}, zipfile.ZIP_DEFLATED)
    assert "data.pkl is compressed, so it cannot be read in place" in message_of(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data/0": b"abcd"}, "data/0 has 4 bytes, its 64 elements need 256"),
        ({"data/0": b""}, "the archive has no data/0"),
        ({"data.pkl": b""}, "a zip archive without one NAME/data.pkl"),
        ({"data.pkl": b"\x80\x02}q"}, "its description of tensors is damaged"),
        ({"byteorder": b"big"}, "its weights are big-endian"),
    ],
)
def test_damaged_members_are_named(tmp_path: Path, change: dict[str, bytes], expected: str) -> None:
    torch.save({"w": torch.zeros(64)}, tmp_path / "x.bin")
    rezip(tmp_path / "x.bin", change)
    assert expected in message_of(tmp_path / "x.bin")


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(64)}, tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin") as archive:
        text = archive.read("x/data.pkl")
    # BININT1 64 (elements of the storage) stays; the shape, the last one, becomes 65
    at = text.rindex(pickle.BININT1 + bytes([64]))
    rezip(tmp_path / "x.bin", {"data.pkl": text[: at + 1] + bytes([65]) + text[at + 2 :]})
    assert "w of shape [65] ends at element 65, its storage has 64" in message_of(tmp_path / "x.bin")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"shard pytorch_model-00002-of-00002.bin is missing\n  did you mean"):
        open_checkpoint(sharded)


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    torch.save({}, sharded / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(UserError, match=r"pytorch_model-00001-of-00002.bin does not hold .*\n  the index and the shar"):
        open_checkpoint(sharded)


def test_a_tensor_of_a_wrong_shape_is_named(sharded: Path) -> None:
    file = sharded / "pytorch_model-00001-of-00002.bin"
    state = torch.load(file, weights_only=True)
    name = next(n for n in state if "proj" in n)
    torch.save({**state, name: torch.zeros(3, 5)}, file)
    with pytest.raises(UserError, match=rf"{name} has shape \[3, 5\], config.json makes it"):
        export_checkpoint(sharded, isolated=False)

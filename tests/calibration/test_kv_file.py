"""Upstream's kv_scales.pth: read and written as it is laid out, and nothing but arrays taken from it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vacc_opt.calibration.kv_file import check_output, read_scales, write_scales
from vacc_opt.calibration.kv_scales import KvScales, ScaleZero
from vacc_opt.ir.errors import UserError

HEADS, DEPTH = 2, 4


def scales(symmetric: bool) -> KvScales:
    rng = np.random.default_rng(0)

    def one() -> ScaleZero:
        scale, zero = rng.random((2, HEADS, DEPTH)).astype(np.float32) + 0.1
        return ScaleZero(scale, np.zeros_like(zero) if symmetric else zero)

    return KvScales({(layer, part): one() for layer in range(3) for part in ("key", "value")})


@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_are_written_as_upstream_lays_them_out_and_come_back(symmetric: bool, tmp_path: Path) -> None:
    made = scales(symmetric)
    made.save(tmp_path / "a.safetensors")
    write_scales(tmp_path / "a.safetensors", tmp_path / "kv_scales.pth")
    data = torch.load(tmp_path / "kv_scales.pth", weights_only=True)
    assert list(data) == [f"transformer.encoder.layers.{i}" for i in range(3)]
    first = [made.tensors[0, part] for part in ("key", "value")]
    expected = [a for one in first for a in ([one.scale] if symmetric else [one.scale, one.zero])]
    for found, right in zip(data["transformer.encoder.layers.0"], expected, strict=True):
        np.testing.assert_array_equal(found.numpy(), right)
    write_scales(tmp_path / "kv_scales.pth", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a.astype(np.float32),
        lambda a: a.astype(np.float64),
        lambda a: torch.from_numpy(a).half(),
        lambda a: torch.from_numpy(a.reshape(1, HEADS, 1, DEPTH)),
    ],
    ids=["float32 array", "float64 array", "half tensor", "with dimensions of 1"],
)
def test_arrays_come_as_numpy_or_tensors_of_any_float_type(make: Any, tmp_path: Path) -> None:
    array = np.full((HEADS, DEPTH), 0.25)
    torch.save({"transformer.encoder.layers.0": [make(array)] * 2}, tmp_path / "kv.pth")
    found = read_scales(tmp_path / "kv.pth").tensors
    np.testing.assert_array_equal(found[0, "key"].scale, array)
    assert not found[0, "value"].zero.any()


class Evil:
    """Would make a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_an_object_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    torch.save({"transformer.encoder.layers.0": [Evil(tmp_path / "ran")] * 2}, tmp_path / "kv.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for name in ("kv.pth", "plain.pth"):
        with pytest.raises(UserError, match="not a file of arrays alone"):
            read_scales(tmp_path / name)
    assert not (tmp_path / "ran").exists()


LAYER, GOOD = "transformer.encoder.layers.", torch.ones(HEADS, DEPTH)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([GOOD], "holds a list, not a dict"),
        ({"layers.0": [GOOD, GOOD]}, "layers.0 is not a layer's scales"),
        ({LAYER + "0": [GOOD] * 3}, "is not a layer's scales"),
        ({LAYER + "1": [GOOD] * 2}, "not numbered from 0"),
        ({LAYER + "0": [GOOD, -GOOD]}, "a scale of the value is not a positive number"),
        ({LAYER + "0": [GOOD, GOOD * float("nan")]}, "finite numbers"),
        ({LAYER + "0": [torch.ones(3), GOOD]}, r"is \[3\]"),
        ({LAYER + "0": ["a", "b"]}, "holds a str, not an array"),
        ({}, "not numbered from 0"),
    ],
)
def test_a_file_of_another_form_is_one_message(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "kv.pth")
    with pytest.raises(UserError, match=message):
        read_scales(tmp_path / "kv.pth")


def test_missing_files_and_impossible_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the KV scales: No such file"):
        read_scales(tmp_path / "no.pth")
    with pytest.raises(UserError, match="no form of KV scales"):
        check_output(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"the directory .* does not exist"):
        check_output(tmp_path / "no" / "a.pth")


def test_an_empty_file_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "kv.pth").touch()
    with pytest.raises(UserError, match="not a file of arrays alone: EOFError"):
        read_scales(tmp_path / "kv.pth")

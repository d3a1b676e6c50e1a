"""Many weight files in one pass: equal bytes for any number of threads, each source row read once, digests that hold."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from vacc_opt.ir import Literal, Source, TensorExpr, UserError
from vacc_opt.ir import file_reads as reads
from vacc_opt.ir import weight_files as module
from vacc_opt.ir.file_reads import shared_reads
from vacc_opt.ir.half import to_float32
from vacc_opt.ir.row_codes import quantized_rows, row_scales
from vacc_opt.ir.storage import read_safetensors_header
from vacc_opt.ir.tensor import Casted, Codes, Concatenated, Padded, Scales, Sliced, Taken, Transposed
from vacc_opt.ir.weight_check import extents, header_digest
from vacc_opt.ir.weight_files import WeightFile, write_weight_files
from vacc_opt.ir.weights import without_round_trips

ROWS, COLUMNS, RANKS = 96, 64, 4


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A weight [96, 64] of halves in a file."""
    weight = np.random.default_rng(2).standard_normal((ROWS, COLUMNS)).astype(np.float16)
    path = tmp_path / "source.bin"
    path.write_bytes(b"abc" + weight.tobytes())
    return Source(str(path), 3, "float16", weight.shape, "w")


def split(source: Source, rank: int) -> dict[str, TensorExpr]:
    """What one of four ranks stores: by rows, by columns, as codes, as it is; and what no file holds."""
    wide = Casted(source, "float")
    low, high = rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS
    left, right = rank * COLUMNS // RANKS, (rank + 1) * COLUMNS // RANKS
    return {
        "rows": Casted(Sliced(wide, (low, 0), (high, COLUMNS)), "float16"),
        "columns": Sliced(Casted(wide, "float16"), (0, left), (ROWS, right)),
        "qweight": Sliced(Codes(wide), (0, left), (ROWS, right)),
        "scale": Scales(wide),
        "row_codes": Sliced(Codes(wide), (low, 0), (high, COLUMNS)),
        "row_scale": Sliced(Scales(wide), (low,), (high,)),
        "heads": Taken(source, (5, -1, 4, 90)),
        "padded": Padded(source, (ROWS, COLUMNS + 3)),
        "turned": Transposed(source, (1, 0)),
        "joined": Concatenated((source, wide if rank < 0 else source), 1),
        "bias": Literal(np.arange(20, dtype=np.float32)),
        "one": Literal(np.array(2.5, np.float32)),
        "none": Literal(np.zeros((0, 4), np.float32)),
    }


def written(directory: Path, source: Source, workers: int = 1) -> list[WeightFile]:
    directory.mkdir()
    files = [WeightFile(directory / f"rank{rank}.safetensors", split(source, rank)) for rank in range(RANKS)]
    write_weight_files(files, workers=workers)
    return files


def test_every_file_holds_what_its_expressions_say(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEP_BYTES", 7 * COLUMNS * 2)  # many steps, the last of them short
    for file in written(tmp_path / "out", source):
        with safe_open(file.path, "numpy") as opened:
            assert sorted(opened.keys()) == sorted(file.tensors)
            for name, expr in file.tensors.items():
                np.testing.assert_array_equal(opened.get_tensor(name), expr.read())
        sources = read_safetensors_header(file.path)
        assert file.offsets() == {name: one.offset for name, one in sources.items()}


@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_threads_and_the_size_of_steps_change_no_byte(
    workers: int, tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [file.path.read_bytes() for file in written(tmp_path / "one", source)]
    monkeypatch.setattr(module, "STEP_BYTES", 1000)
    assert [file.path.read_bytes() for file in written(tmp_path / "many", source, workers)] == expected


def test_each_row_of_a_source_is_read_once_for_all_ranks(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[int] = Counter()
    read = reads._read

    def counted(file: str, start: int, stop: int, dtype: np.dtype[Any]) -> Any:
        asked.update(range(start, stop))
        return read(file, start, stop, dtype)

    monkeypatch.setattr(reads, "_read", counted)
    wide = Casted(source, "float")
    files = []
    for rank in range(RANKS):
        kept = {name: split(source, rank)[name] for name in ("columns", "qweight", "scale")}
        files.append(WeightFile(tmp_path / f"{rank}.safetensors", {**kept, "copy": Codes(wide)}))
    write_weight_files(files)
    assert set(asked.values()) == {1}
    assert len(asked) == source.nbytes


def test_memory_is_that_of_a_step(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    read = reads._read

    def noted(file: str, start: int, stop: int, dtype: np.dtype[Any]) -> Any:
        nonlocal largest
        largest = max(largest, stop - start)
        return read(file, start, stop, dtype)

    monkeypatch.setattr(reads, "_read", noted)
    monkeypatch.setattr(module, "STEP_BYTES", 8 * 2 * RANKS * COLUMNS)
    files = [WeightFile(tmp_path / f"{r}.safetensors", {"w": split(source, r)["columns"]}) for r in range(RANKS)]
    write_weight_files(files)
    assert largest == 8 * 2 * COLUMNS  # eight rows, of 96


def test_progress_ends_at_the_bytes_of_all_files(tmp_path: Path, source: Source) -> None:
    heard: list[tuple[int, int]] = []
    files = [WeightFile(tmp_path / "a", split(source, 0)), WeightFile(tmp_path / "b", split(source, 1))]
    write_weight_files(files, workers=2, progress=lambda done, of: heard.append((done, of)))
    assert heard == sorted(heard)
    assert heard[-1] == (sum(f.nbytes for f in files),) * 2


def test_digests_are_of_the_bytes_in_the_file(tmp_path: Path, source: Source) -> None:
    file = written(tmp_path / "out", source, 2)[1]
    with safe_open(file.path, "numpy") as opened:
        digests = opened.metadata()
        for name in opened.keys():  # noqa: SIM118 - no mapping
            data = opened.get_tensor(name).tobytes()
            assert digests[f"sha256 {name}"] == hashlib.sha256(data).hexdigest()
    places = {one.name: (one.start, one.sha256) for one in extents(file.path)}
    assert places == {name: (at, digests[f"sha256 {name}"]) for name, at in file.offsets().items()}


def test_the_digest_of_the_header_changes_with_any_tensor(tmp_path: Path, source: Source) -> None:
    files = [WeightFile(tmp_path / name, {"w": source, "b": Literal(np.zeros(2) + n)}) for n, name in enumerate("abc")]
    write_weight_files(files)
    assert len({header_digest(file.path) for file in files}) == 3


def test_a_file_without_digests_is_refused(tmp_path: Path) -> None:
    save_file({"w": np.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="holds no digests"):
        extents(tmp_path / "w.safetensors")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_weight_that_cannot_be_read_ends_all_threads(workers: int, tmp_path: Path, source: Source) -> None:
    os.truncate(source.file, 1000)
    files = [WeightFile(tmp_path / f"{r}.safetensors", {"fc.weight": split(source, r)["rows"]}) for r in range(RANKS)]
    with pytest.raises(UserError, match=r"weight fc\.weight: .*source\.bin: truncated: a weight ends at byte"):
        write_weight_files(files, workers=workers)


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    huge = Source("nowhere", 0, "float", (1 << 40, 1 << 10))
    with pytest.raises(UserError, match=r"no space for the weights: they need 4,503,599,627,370,496 bytes"):
        write_weight_files([WeightFile(tmp_path / "w.safetensors", {"w": huge})])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_the_threads(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP_BYTES", 1000)

    def interrupted(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_weight_files([WeightFile(tmp_path / "w", split(source, 0))], workers=2, progress=interrupted)


def test_reads_inside_a_block_are_shared_and_forgotten_after_it(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    read = reads._read

    def counted(*given: Any) -> Any:
        nonlocal count
        count += 1
        return read(*given)

    monkeypatch.setattr(reads, "_read", counted)
    whole = source.read()
    with shared_reads():
        np.testing.assert_array_equal(source.read((slice(4, 20),)), whole[4:20])
        np.testing.assert_array_equal(source.read((slice(5, 9), slice(3, 7))), whole[5:9, 3:7])
        assert count == 2
    source.read((slice(4, 20),))
    assert count == 3


@pytest.mark.parametrize(
    "index", [(slice(0, 96), slice(3, 9)), (slice(7, 8), slice(3, 9)), (slice(5, 5), slice(0, 64))]
)
def test_a_box_is_read_by_chunks_of_rows(
    index: tuple[slice, ...], source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = source.read()
    monkeypatch.setattr(reads, "_CHUNK_BYTES", 1000)
    np.testing.assert_array_equal(source.read(index), whole[index])


def test_all_halves_become_the_floats_of_numpy() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    expected = halves.astype(np.float32).view(np.uint32)
    np.testing.assert_array_equal(to_float32(halves).view(np.uint32), expected)
    finite = np.isfinite(halves)
    np.testing.assert_array_equal(to_float32(halves[finite]).view(np.uint32), expected[finite])
    assert to_float32(halves[:0]).shape == (0,)


def test_codes_by_blocks_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """``clip(rint(w / scale), -127, 127)`` in fp32, on normal, tiny, subnormal and zero rows."""
    rng = np.random.default_rng(0)
    sizes = np.array([1, 1e-3, 1e-36, 2e-38, 1e-40, 3e-44, 1e-45, 0, 1e38], np.float32)
    weight = (rng.uniform(-1, 1, (9, 501)).astype(np.float32) * sizes[:, None]).astype(np.float32)
    monkeypatch.setattr("vacc_opt.ir.row_codes._BLOCK_BYTES", 2 * 501 * 4)
    codes, scales = quantized_rows(lambda low, high: weight[low:high], 0, 9, 501)
    largest = np.abs(weight).max(axis=1)
    expected = (largest / np.float32(127)).astype(np.float32)
    expected[expected == 0] = 1
    np.testing.assert_array_equal(scales, expected)
    np.testing.assert_array_equal(codes, np.clip(np.rint(weight / expected[:, None]), -127, 127).astype(np.int8))
    np.testing.assert_array_equal(row_scales(weight), expected)


def test_casts_that_cancel_are_left_out_wherever_rows_are_picked(source: Source) -> None:
    wide = Casted(source, "float")
    picked = Concatenated((Sliced(wide, (0, 0), (2, COLUMNS)), Taken(wide, (7, -1))), 0)
    expr = Casted(Padded(Transposed(picked, (1, 0)), (COLUMNS, 6)), "float16")
    found = without_round_trips(expr)
    assert "Casted" not in str(found)
    np.testing.assert_array_equal(found.read(), expr.read())
    assert without_round_trips(Casted(wide, "bfloat16")) == Casted(wide, "bfloat16")  # that one rounds
    assert without_round_trips(Codes(expr)) == Codes(found)

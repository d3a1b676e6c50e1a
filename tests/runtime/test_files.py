"""Directories that appear whole: what a killed process left is found and removed, a living one is left alone."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vacc_opt.ir.errors import UserError
from vacc_opt.runtime.files import (
    check_place,
    locked_directory,
    remove_abandoned,
    replaced_directory,
    scratch_directory,
)

FILL = """
import sys, time
from pathlib import Path
from vacc_opt.runtime.files import replaced_directory
with replaced_directory(Path(sys.argv[1]), lambda path: True) as scratch:
    (scratch / "half").write_text("x")
    print("filling", flush=True)
    time.sleep(60)
"""


def filling(target: Path) -> subprocess.Popen[str]:
    """Another process that fills ``target`` and is not done."""
    process = subprocess.Popen([sys.executable, "-c", FILL, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "filling\n"
    return process


def fill(target: Path) -> None:
    with replaced_directory(target, lambda path: True) as scratch:
        (scratch / "whole").write_text("y")


def test_the_next_run_removes_what_a_killed_one_left_and_not_what_a_living_one_fills(tmp_path: Path) -> None:
    target = tmp_path / "model"
    killed, living = filling(target), filling(target)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 2
    fill(target)
    left = [p for p in tmp_path.iterdir() if p != target]
    assert len(left) == 1
    assert (left[0] / "half").exists()
    living.send_signal(signal.SIGTERM)
    living.wait()
    fill(target)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert [p.name for p in target.iterdir()] == ["whole"]


def test_other_directories_that_begin_alike_stay(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in (".model.d", ".model.backup_of_june", "model.abcdefgh", ".models.abcdefgh")]
    for path in kept:
        path.mkdir()
    fill(tmp_path / "model")
    assert all(path.exists() for path in kept)


def test_what_was_moved_away_when_a_process_was_killed_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "model"
    aside = tmp_path / ".model.abcdefgh" / "model"
    aside.mkdir(parents=True)
    (aside / "old").write_text("z")
    remove_abandoned(tmp_path, ".model.", target)
    assert (target / "old").read_text() == "z"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_scratch_directory_is_gone_at_the_end(tmp_path: Path) -> None:
    with scratch_directory(tmp_path, "s-") as scratch:
        assert remove_abandoned(tmp_path, "s-") == []  # it is locked
        assert scratch.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_message_and_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "model"
    fill(target)
    with (
        pytest.raises(UserError, match="model: cannot be written: No space left on device"),
        replaced_directory(target, lambda path: True),
    ):
        raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "whole"]


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is not a directory"):
        check_place(tmp_path / "file" / "model", lambda path: True)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # to root everything is writable
    with pytest.raises(UserError, match="cannot be written to"):
        check_place(tmp_path / "a" / "b", lambda path: True)


def test_a_locked_directory_is_for_one_process_at_a_time(tmp_path: Path) -> None:
    with locked_directory(tmp_path / "a" / "b"):
        handle = os.open(tmp_path / "a" / "b", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)

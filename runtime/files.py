"""Directories that appear complete or not at all: filled beside their final place, synced, then renamed.

A scratch directory is locked by the process that fills it. One that nobody locks was left by a process that was killed,
and the next one that fills a directory for the same place removes it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vacc_opt.ir.errors import UserError

CACHE = ".cache"  # in a workspace: what is kept of earlier runs
_BLOCK = 1 << 20
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RANDOM = re.compile(r"[a-z0-9_]{8}")  # what tempfile appends


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replaced_directory(path: Path, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """A fresh directory to fill, which takes the place of ``path`` when the block ends without an exception.

    After an exception nothing is left, neither files nor parents that were made, and what stood at ``path`` stays.

    Raises:
        UserError: ``path`` exists, is not empty, and ``may_replace`` denies that it is one of ours.
    """
    path = path.absolute()
    check_place(path, may_replace)
    made = _make_parents(path.parent)
    prefix = f".{path.name}."
    try:
        remove_abandoned(path.parent, prefix, path)
        with scratch_directory(path.parent, prefix) as scratch:
            yield scratch
            _sync(scratch)
            _swap(scratch, path)
    except BaseException as error:
        for directory in reversed(made):
            if not any(directory.iterdir()):
                directory.rmdir()
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            message = f"{path}: cannot be written: {os.strerror(error.errno or 0)}"
            raise UserError(message, "what stood there before is left; free some space and run it again") from error
        raise


def check_place(path: Path, may_replace: Callable[[Path], bool]) -> None:
    """Refuse a place that a directory could not appear at, before any work; raises UserError."""
    if path.exists() and not (path.is_dir() and (may_replace(path) or not any(path.iterdir()))):
        raise UserError(f"{path}: exists and is not an artifact", "it is left alone; remove it or choose another name")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise UserError(f"{path}: {parent} is not a directory", "choose another `workspace.path`")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {parent} cannot be written to", "choose another `workspace.path`")


@contextmanager
def scratch_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A new locked directory in ``parent``; at the end it is gone, unless it was renamed."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if scratch.exists():
            break
        os.close(handle)  # another process took it for abandoned before it was locked
    try:
        yield scratch
    finally:
        os.close(handle)
        if scratch.exists():
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Within the block no other process is in such a block for ``path``, which is made if it is not there."""
    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove_abandoned(parent: Path, prefix: str, path: Path | None = None) -> list[Path]:
    """Remove the scratch directories of that prefix whose process was killed; gives those that were removed.

    Where a process was killed between two renames, what it had moved away goes back to ``path``.
    """
    removed: list[Path] = []
    for found in sorted(parent.glob(f"{glob.escape(prefix)}*")):
        if not _RANDOM.fullmatch(found.name.removeprefix(prefix)) or not found.is_dir():
            continue
        try:
            handle = os.open(found, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # it is gone, or of another user
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path is not None and not path.exists() and (found / path.name).is_dir():
                (found / path.name).rename(path)
            shutil.rmtree(found, ignore_errors=True)
            removed.append(found)
        except OSError:
            continue  # its owner lives
        finally:
            os.close(handle)
    return removed


def _make_parents(directory: Path) -> list[Path]:
    missing: list[Path] = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for one in reversed(missing):
        one.mkdir()
    return missing[::-1]


def _sync(directory: Path) -> None:
    for path in [*sorted(directory.iterdir()), directory]:
        path.chmod(0o755 if path.is_dir() else 0o644)  # mkdtemp made the directory private
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(scratch: Path, path: Path) -> None:
    if not path.exists():
        scratch.rename(path)
        return
    with scratch_directory(path.parent, f".{path.name}.") as old:
        path.rename(old / path.name)
        try:
            scratch.rename(path)
        except BaseException:
            (old / path.name).rename(path)
            raise

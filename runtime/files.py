"""Directories that appear complete or not at all: filled beside their final place, synced, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vacc_opt.ir.errors import UserError

_BLOCK = 1 << 20


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
    if path.exists() and not (path.is_dir() and (may_replace(path) or not any(path.iterdir()))):
        raise UserError(f"{path}: exists and is not an artifact", "it is left alone; remove it or choose another name")
    made = _make_parents(path.parent)
    scratch: Path | None = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield scratch
        _sync(scratch)
        _swap(scratch, path)
    except BaseException:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for directory in reversed(made):
            if not any(directory.iterdir()):
                directory.rmdir()
        raise


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
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    path.rename(old / path.name)
    try:
        scratch.rename(path)
    except BaseException:
        (old / path.name).rename(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)

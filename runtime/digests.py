"""Digests of the files of an artifact: computed on all cores, and what is wrong with a file that has another one."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_BLOCK = 4 << 20


def damages(
    directory: Path, files: Mapping[str, Mapping[str, Any]], heard: Callable[[int, int], None] = lambda done, of: None
) -> dict[str, str]:
    """What is wrong, by file name, of the files that are not what the manifest says; empty when all are.

    Args:
        directory: of the artifact.
        files: ``bytes`` and ``sha256`` by name.
        heard: hears (bytes read, bytes in all), from several threads but one at a time.
    """
    total, done, lock = sum(int(entry["bytes"]) for entry in files.values()), 0, threading.Lock()

    def read(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            heard(done, total)

    def one(name: str) -> str | None:
        return _damage(directory / name, files[name], read)

    # the longest first, so that no core is left alone with one at the end
    order = sorted(files, key=lambda name: (-int(files[name]["bytes"]), name))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib lets go of the interpreter
        found = dict(zip(order, pool.map(one, order), strict=True))
    return {name: why for name in files if (why := found[name]) is not None}


def _damage(file: Path, entry: Mapping[str, Any], read: Callable[[int], None]) -> str | None:
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"has {size} bytes, {entry['bytes']} were written"
        if digest(file, read) != entry["sha256"]:
            return "is damaged: it has not the digest of what was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def digest(file: Path, read: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file in hex; ``read`` hears the bytes of each block."""
    found, block = hashlib.sha256(), bytearray(_BLOCK)
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(block):
            found.update(memoryview(block)[:count])
            read(count)
    return found.hexdigest()

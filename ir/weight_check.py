"""Weight files against the digests that they hold: the header for the whole, or tensor by tensor on several threads."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.weight_files import DIGEST, METADATA, Progress

_BLOCK = 1 << 20  # bytes read at once


def header_digest(path: Path) -> str:
    """SHA-256 of the header, which vouches for the file; raises UserError when there is none."""
    return hashlib.sha256(_header(path)).hexdigest()


def _header(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > path.stat().st_size - 8:
                raise UserError(f"{path}: not a safetensors file, or truncated")
            return prefix + file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot read the weight file: {error.strerror}") from error


def damaged_tensors(path: Path, *, workers: int = 1, progress: Progress | None = None) -> list[str]:
    """Names of the tensors whose bytes are not those that were written, by the digests in the header.

    Args:
        path: of a file that :func:`write_weight_files` wrote.
        workers: threads.
        progress: hears (bytes checked, bytes in all), in the calling thread.

    Raises:
        UserError: the file cannot be read, or holds no digests.
    """
    header = _header(path)
    try:
        entries = json.loads(header[8:])
        digests = entries.pop(METADATA, {})
        places = {name: (entry["data_offsets"], digests[DIGEST + name]) for name, entry in entries.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: its header is damaged, or holds no digests") from error
    total = sum(high - low for (low, high), _ in places.values())

    def is_damaged(name: str) -> bool:
        (low, high), expected = places[name]
        return _digest(path, len(header) + low, len(header) + high) != str(expected)

    found: list[str] = []
    done = 0
    with ThreadPoolExecutor(max(1, workers), "check") as pool:
        for name, damaged in zip(places, pool.map(is_damaged, places), strict=True):
            done += places[name][0][1] - places[name][0][0]
            if damaged:
                found.append(name)
            if progress is not None:
                progress(done, total)
    return found


def _digest(path: Path, start: int, stop: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < stop and (block := file.read(min(_BLOCK, stop - start))):
            digest.update(block)
            start += len(block)
    return digest.hexdigest()

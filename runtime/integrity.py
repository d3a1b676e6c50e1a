"""Whether the files of an artifact are what ``compile`` wrote, by the digests in its manifest, on all cores.

A weight file has its digests in its own header, one a tensor, taken while it was written; the manifest has the digest
of that header. So what is large is checked tensor by tensor, and only where its data is about to be used.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.weight_check import extents, header_bytes, header_digest
from vacc_opt.runtime.files import sha256
from vacc_opt.runtime.workers import cores

_WEIGHTS = re.compile(r"(?:.*\.)?rank\d+\.safetensors")
HEADER = "header_sha256"
_BLOCK = 4 << 20
_DAMAGED = "is damaged: it has not the digest of what was written"
_AGAIN = "compile it again"


@dataclass(frozen=True)
class _Piece:
    """Bytes of a file that have one digest; ``what`` they are, where they are not all of it."""

    file: str
    what: str
    start: int
    stop: int
    sha256: str


def file_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: its size, and the digest of its bytes or, for weights, of the header."""
    weights = _WEIGHTS.fullmatch(path.name)
    digest = {HEADER: header_digest(path)} if weights else {"sha256": sha256(path)}
    return {"bytes": path.stat().st_size, **digest}


def check_file(directory: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Raise UserError, which names the file, unless it is there as the manifest says; data of weights is not read."""
    path = directory / name
    if Path(name).name != name or not path.is_file():
        raise UserError(f"{directory}: the file {name} is missing", _AGAIN)
    if path.stat().st_size != entry["bytes"] or not _is_as_written(path, entry):
        raise UserError(f"{directory}: the file {name} is damaged: it is not what `compile` wrote", _AGAIN)


def _is_as_written(path: Path, entry: Mapping[str, Any]) -> bool:
    if HEADER not in entry:
        return bool(sha256(path) == entry["sha256"])
    try:
        return bool(header_digest(path) == entry[HEADER])
    except UserError:
        return False


def check_weights(directory: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Read all of a weight file; raise UserError, which names file and tensor, unless it is what was written."""
    for why in damages(directory, {name: entry}).values():
        raise UserError(f"{directory}: the file {name} {why}", _AGAIN)


def damages(
    directory: Path, files: Mapping[str, Mapping[str, Any]], heard: Callable[[int, int], None] = lambda done, of: None
) -> dict[str, str]:
    """What is wrong, by file name, of the files that are not what the manifest says; empty when all are.

    Args:
        directory: of the artifact.
        files: the entries of the manifest, by name.
        heard: hears (bytes read, bytes in all), from several threads but one at a time.
    """
    found: dict[str, str] = {}
    pieces: list[_Piece] = []
    for name, entry in files.items():
        try:
            pieces += _pieces(directory, name, entry)
        except UserError as error:
            found[name] = error.message
    total, done, lock = sum(piece.stop - piece.start for piece in pieces), 0, threading.Lock()

    def read(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            heard(done, total)

    # the longest first, so that no core is left alone with one at the end
    order = sorted(pieces, key=lambda piece: piece.start - piece.stop)
    with ThreadPoolExecutor(cores(), "check") as pool:
        differ = list(pool.map(lambda one: _differs(directory, one, read), order))
    bad = [piece for piece, differs in zip(order, differ, strict=True) if differs]
    for piece in sorted(bad, key=lambda one: (one.file, one.start), reverse=True):
        found[piece.file] = f"{_DAMAGED} ({piece.what})" if piece.what else _DAMAGED  # the first one of a file stays
    return {name: found[name] for name in files if name in found}


def _pieces(directory: Path, name: str, entry: Mapping[str, Any]) -> Iterator[_Piece]:
    """The parts of a file that are digested; raises UserError that says what is wrong where that is seen already."""
    path = directory / name
    if Path(name).name != name or not path.is_file():
        raise UserError("is missing")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise UserError(f"has {size} bytes, {entry['bytes']} were written")
    if HEADER not in entry:
        yield _Piece(name, "", 0, size, entry["sha256"])
    elif not _is_as_written(path, entry):
        raise UserError(f"{_DAMAGED} (its header)")
    else:
        yield _Piece(name, "its header", 0, header_bytes(path), entry[HEADER])
        yield from (_Piece(name, one.name, one.start, one.stop, one.sha256) for one in extents(path))


def _differs(directory: Path, piece: _Piece, read: Callable[[int], None]) -> bool:
    digest, block, at = hashlib.sha256(), bytearray(_BLOCK), piece.start
    try:
        with (directory / piece.file).open("rb", buffering=0) as file:
            file.seek(at)
            while at < piece.stop and (count := file.readinto(memoryview(block)[: piece.stop - at])):
                digest.update(memoryview(block)[:count])
                at += count
                read(count)
    except OSError:
        return True
    return digest.hexdigest() != piece.sha256

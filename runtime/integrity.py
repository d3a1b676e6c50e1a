"""Whether the files of an artifact are what ``compile`` wrote, by the digests in its manifest.

A weight file has its digests in its own header, one a tensor, taken while it was written; the manifest has the digest
of that header. So what is large is checked tensor by tensor, on all cores, and only where its data is about to be used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.weight_check import damaged_tensors, header_digest
from vacc_opt.runtime.files import sha256
from vacc_opt.runtime.workers import cores

_WEIGHTS = re.compile(r"rank\d+\.safetensors")
_HEADER = "header_sha256"
_AGAIN = "compile it again"


def file_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: its size, and the digest of its bytes or, for weights, of the header."""
    weights = _WEIGHTS.fullmatch(path.name)
    digest = {_HEADER: header_digest(path)} if weights else {"sha256": sha256(path)}
    return {"bytes": path.stat().st_size, **digest}


def check_file(directory: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Raise UserError, which names the file, unless it is there as the manifest says; data of weights is not read."""
    path = directory / name
    if Path(name).name != name or not path.is_file():
        raise UserError(f"{directory}: the file {name} is missing", _AGAIN)
    if path.stat().st_size != entry["bytes"] or not _has_digest(path, entry):
        raise UserError(f"{directory}: the file {name} is damaged: it is not what `compile` wrote", _AGAIN)


def _has_digest(path: Path, entry: Mapping[str, Any]) -> bool:
    if _HEADER not in entry:
        return bool(sha256(path) == entry["sha256"])
    try:
        return bool(header_digest(path) == entry[_HEADER])
    except UserError:
        return False


def check_weights(file: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Read all of a weight file; raise UserError, which names file and tensor, unless it is what its header says."""
    damaged = damaged_tensors(file, workers=cores(), progress=progress)
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        message = f"{file.parent}: the file {file.name} is damaged: {damaged[0]}{more} is not what `compile` wrote"
        raise UserError(message, _AGAIN)


def problems(
    directory: Path, files: Mapping[str, Mapping[str, Any]], progress: Callable[[int, int], None] | None = None
) -> Iterator[str]:
    """A sentence for each file that is missing or damaged, every byte read; nothing where all is as it was written.

    Args:
        directory: of the artifact.
        files: the entry ``files`` of its manifest.
        progress: hears (bytes checked, bytes in all).
    """
    total, before = sum(entry["bytes"] for entry in files.values()), 0
    for name, entry in files.items():
        try:
            check_file(directory, name, entry)
            if _HEADER in entry:
                check_weights(directory / name, partial(_at, progress, before, total) if progress else None)
        except UserError as error:
            yield error.message.removeprefix(f"{directory}: ")
        before += entry["bytes"]
        if progress is not None:
            progress(before, total)


def _at(progress: Callable[[int, int], None], before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)

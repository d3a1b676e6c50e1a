"""The digests that a weight file holds of itself: of the header for the whole, and of the bytes of each tensor."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.weight_files import DIGEST, METADATA


@dataclass(frozen=True)
class Extent:
    """The bytes of a tensor in a file, ``start`` to ``stop``, and the SHA-256 that they had when they were written."""

    name: str
    start: int
    stop: int
    sha256: str


def header_digest(path: Path) -> str:
    """SHA-256 of the header, which vouches for the file; raises UserError when there is none."""
    return hashlib.sha256(_header(path)).hexdigest()


def header_bytes(path: Path) -> int:
    """Bytes of the header with its length; raises UserError when there is none."""
    return len(_header(path))


def extents(path: Path) -> list[Extent]:
    """The tensors of a file that :func:`~vacc_opt.ir.weight_files.write_weight_files` wrote, in file order.

    Raises:
        UserError: the file cannot be read, or holds no digests.
    """
    header = _header(path)
    try:
        entries = json.loads(header[8:])
        digests = entries.pop(METADATA, {})
        places = [(name, *entry["data_offsets"], digests[DIGEST + name]) for name, entry in entries.items()]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: its header is damaged, or holds no digests") from error
    return [Extent(name, len(header) + low, len(header) + high, digest) for name, low, high, digest in places]


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

"""Text files that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
from pathlib import Path

from vacc_opt.ir.errors import UserError


def check_place(path: Path) -> None:
    """Refuse, before any work, a file that could not be written; raises UserError."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{path}: the directory {parent} does not exist")
    if path.is_dir():
        raise UserError(f"{path}: is a directory", "name a file")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{path}: the directory {parent} cannot be written to")


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path``; after a failure the old file, if any, is still there and nothing else is."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

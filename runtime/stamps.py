"""What decides a result, told quickly: of small files the content, of large ones what changes when they are written.

A large file (weights) is known by its name, size, time of change, inode and its first and last bytes, which hold the
header of safetensors and GGUF and the directory of a .bin. Who changes weights in place and sets the time back is not
noticed: as by build tools.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vacc_opt.frontends.onnx_file import external_files
from vacc_opt.runtime.files import sha256

_SMALL = 32 << 20  # bytes of a file that is read whole
_END = 64 << 10  # bytes at each end of a larger one
_ROOMS = ("ir", "passes", "frontends", "backends", "calibration", "runtime")
# what computes: another version may give other bytes
_PACKAGES = (
    "vacc-opt",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxsim",
    "onnx-graphsurgeon",
    "torch",
    "transformers",
    "gguf",
)


def stamp(path: Path, *, deep: bool = False) -> str:
    """A digest that changes with the file, or with any file in the directory (``deep``: or below); "" for nothing."""
    if path.is_dir():
        lines = [stamp(file) for file in sorted(path.rglob("*") if deep else path.iterdir()) if file.is_file()]
    elif path.is_file():
        lines = list(_lines(path))
    else:
        return ""
    return hashlib.sha256("\n".join([path.name, *lines]).encode()).hexdigest()


def _lines(file: Path) -> Iterator[str]:
    facts = file.stat()
    if facts.st_size <= _SMALL:
        yield sha256(file)
        return
    yield f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ino}"
    with file.open("rb") as opened:
        yield hashlib.sha256(opened.read(_END)).hexdigest()
        opened.seek(-_END, 2)
        yield hashlib.sha256(opened.read()).hexdigest()


@cache
def program_stamp() -> str:
    """A digest of this program: its source files, and the versions of the packages that compute."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256(platform.python_version().encode())
    for room in _ROOMS:
        for file in sorted((root / room).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    for package in _PACKAGES:
        digest.update(f"{package} {_version(package)}\n".encode())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def checkpoint_stamp(path: Path) -> str:
    """The stamp of a checkpoint: a directory, a .gguf file, or an .onnx file with its weights and what lies beside."""
    if path.suffix != ".onnx" or path.is_dir():
        return stamp(path)
    beside = {p for p in path.parent.iterdir() if p.suffix in (".json", ".jinja")} | external_files(path)
    return hashlib.sha256("\n".join(map(stamp, [path, *sorted(beside)])).encode()).hexdigest()

"""Compiles C text into a shared library, once for a text, a compiler and a CPU: what is made is kept in a cache.

The key is a digest of the text, the command line, and the macros that the compiler predefines for this CPU: they name
its version and every extension of the instruction set that it may use.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vacc_opt.backends.vacc.native.emit import Source
from vacc_opt.ir.errors import CheckError, UserError

COMPILERS = ("gcc", "clang", "cc")
# no -ffast-math: NaN, infinities and the order of sums are part of what is computed; errno and traps are not
FLAGS = (
    "-std=gnu11", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-fPIC",
    "-fvisibility=hidden", "-w",
)  # fmt: skip
# the time of a run is spent in the library; the kernels call it, and gain nothing from a longer compilation
OPTIMIZE_LIBRARY, OPTIMIZE_KERNELS = "-O3", "-O1"


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C compiler: its command, and the macros that it predefines on this machine."""

    command: str
    macros: str


def find_compiler() -> Compiler:
    """The compiler that `CC` names, else the first of gcc, clang and cc; UserError when there is none."""
    wanted = os.environ.get("CC")
    for name in (wanted,) if wanted else COMPILERS:
        command = shutil.which(name)
        if command:
            return _probed(command)
    missing = f"{wanted!r}, the C compiler that CC names, is not on the PATH" if wanted else "there is no C compiler"
    raise UserError(
        f"engine native: {missing}", "install gcc 12 or later (Debian: apt install gcc), or use --engine schedule"
    )


@lru_cache(maxsize=8)
def _probed(command: str) -> Compiler:
    done = _run([command, "-march=native", "-dM", "-E", "-x", "c", os.devnull])
    if done.returncode:
        raise UserError(f"engine native: {command} fails on an empty file: {_first_error(done.stderr)}")
    return Compiler(command, done.stdout)


def cache_folder() -> Path:
    """Where libraries are kept: `vacc-opt/native` in `XDG_CACHE_HOME`, by default `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "vacc-opt" / "native"


def build(source: Source, *, poison: bool = False) -> Path:
    """The shared library of a program, compiled unless the cache has it; `poison` fills SRAM with NaN beforehand.

    Raises:
        UserError: no compiler, one that is too old, or a cache that cannot be written.
        CheckError: the compiler refuses the text.
    """
    compiler = find_compiler()
    library = _cached(compiler, source.library, "o", (*FLAGS, OPTIMIZE_LIBRARY, "-c"))
    flags = (*FLAGS, OPTIMIZE_KERNELS, "-shared", *(("-DVACC_POISON",) if poison else ()))
    return _cached(compiler, source.text, "so", flags, library)


def _cached(compiler: Compiler, text: str, suffix: str, flags: Sequence[str], *parts: Path) -> Path:
    """The file that the compiler makes of a text and compiled parts; written beside its place, then renamed."""
    named = (compiler.macros, compiler.command, *flags, *(part.name for part in parts), text)
    key = hashlib.sha256("\0".join(named).encode()).hexdigest()[:32]
    wanted = cache_folder() / f"{key}.{suffix}"
    if wanted.exists():
        return wanted
    try:
        wanted.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{key}.", dir=wanted.parent) as scratch:
            source, made = Path(scratch) / "program.c", Path(scratch) / wanted.name
            source.write_text(text, encoding="utf-8")
            _compile([compiler.command, *flags, str(source), *map(str, parts), "-o", str(made), "-lm"])
            made.replace(wanted)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"engine native: cannot keep a compiled program in {wanted.parent}: {reason}",
            "let XDG_CACHE_HOME name a directory that can be written",
        ) from None
    return wanted


def _compile(command: Sequence[str]) -> None:
    done = _run(command)
    if done.returncode:
        reason = _first_error(done.stderr)
        if "_Float16" in reason:
            raise UserError(f"engine native: {command[0]}: {reason}", "use gcc 12 or later, or --engine schedule")
        raise CheckError(f"engine native: {command[0]} refuses the program: {reason}")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _first_error(messages: str) -> str:
    lines = messages.strip().splitlines() or ["it says nothing"]
    found = next((line for line in lines if "error" in line), lines[0])
    return found.rpartition("error: ")[2].strip() or found

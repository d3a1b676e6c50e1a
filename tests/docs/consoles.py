"""Runs a document: saves its files, types its commands into a shell, and compares what is shown with what is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# ``... as `model.vacc`:`` and a block: a file; a block of console: commands, each with its output or without
_PART = re.compile(
    r"\bas `(?P<file>[^`\s]+)`:\n\n```\w*\n(?P<text>.*?\n)```|```console\n(?P<console>.*?\n)```", re.DOTALL
)
# what differs from run to run or machine to machine
_MASKS = (
    (re.compile(r"\b\d+\.\d+ ?s\b"), "# s"),
    (re.compile(r"\b\d+\.\d{3} +\d+\.\d\b"), "#.### #.#"),  # seconds and per cent of --timing
    (re.compile(r"^\.+ +\[100%\]$", re.MULTILINE), "."),
    (re.compile(r"[^\S\n]+"), " "),
)


@dataclass(frozen=True)
class Command:
    """One command of a console block, and the lines shown below it."""

    line: str
    shown: str


def parts(page: str) -> Iterator[tuple[str, str] | Command]:
    """The files (name, text) and the commands of a document, in order."""
    for match in _PART.finditer(page):
        if match["file"]:
            yield match["file"], match["text"]
            continue
        for entry in re.split(r"^\$ ", match["console"], flags=re.MULTILINE)[1:]:
            line, _, shown = entry.partition("\n")
            while line.endswith("\\"):
                more, _, shown = shown.partition("\n")
                line = f"{line[:-1].rstrip()} {more.strip()}"
            yield Command(line, shown)


def masked(text: str) -> str:
    """The text without what differs from run to run."""
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def agrees(shown: str, printed: str) -> bool:
    """True when the lines are the same, where a line ``...`` stands for any lines, and ``...`` at an end for any end."""
    pattern = ""
    for line in masked(shown).splitlines():
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += re.escape(line.removesuffix("...")) + (r".*\n" if line.endswith("...") else r"\n")
    return re.fullmatch(pattern, masked(printed) + "\n") is not None


def workplace(directory: Path) -> dict[str, str]:
    """An environment of its own over the packages of this one, so that a document can install; its variables."""
    venv.create(directory, with_pip=False, symlinks=True)
    packages = next(p for p in sys.path if p.endswith("site-packages"))
    (site,) = directory.glob("lib/python*/site-packages")
    # as a path alone the finder of an editable install, which a .pth file there names, would not be found
    (site / "below.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
    for name, module in (("vacc-opt", "vacc_opt.cli.main"), ("torchrun", "torch.distributed.run")):
        command = directory / "bin" / name
        command.write_text(f'#!/bin/sh\nexec python -m {module} "$@"\n')
        command.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "COV"))}
    return {
        **kept,
        "PATH": os.pathsep.join([str(directory / "bin"), os.environ["PATH"]]),
        "PYTHONUNBUFFERED": "1",  # so that both streams come in the order in which they were written
        "PYTHONDONTWRITEBYTECODE": "1",
        "NO_COLOR": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's way to say that there is none
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        "PYTEST_ADDOPTS": "-p no:cacheprovider",
    }


def run(page: str, directory: Path) -> int:
    """Run a document in a directory; the number of commands.

    A command that shows ``error:`` must fail, any other must not.
    """
    environment = workplace(directory / ".venv")
    count = 0
    for part in parts(page):
        if not isinstance(part, Command):
            path = directory / part[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(part[1], encoding="utf-8")
            continue
        count += 1
        done = subprocess.run(
            part.line,
            shell=True,
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        fails = re.search(r"^error:", part.shown, re.MULTILINE) is not None
        said = f"$ {part.line}\n{done.stdout}\n(exit code {done.returncode})"
        assert (done.returncode != 0) is fails, said
        assert not part.shown.strip() or agrees(part.shown, done.stdout), f"{said}\nthe document shows\n{part.shown}"
    return count

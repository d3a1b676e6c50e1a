"""``vacc-opt passes new``: a pass that works as it stands, its test, and its place in the documentation."""

from __future__ import annotations

import keyword
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import vacc_opt
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.passes.infra.author.catalog import entries, entry_of
from vacc_opt.passes.infra.author.reference import page
from vacc_opt.passes.infra.author.skeleton import DOC, LIT_TEST, PASS, PASS_TEST, PLUGIN_TEST, PYPROJECT, TESTING
from vacc_opt.passes.infra.base import Kind
from vacc_opt.passes.infra.patterns.pattern_pass import PatternPass
from vacc_opt.passes.infra.registry import GROUPS
from vacc_opt.passes.infra.show.files import write_whole

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_RESERVED = ("new", "show")  # words of `vacc-opt passes`


@dataclass(frozen=True)
class Made:
    """The files that were written, each with what it is, and what to do next."""

    files: tuple[tuple[Path, str], ...]
    next_steps: tuple[str, ...]


def new_pass(name: str, group: str = "fuse", kind: str = "exact", root: Path | None = None) -> Made:
    """Write a pass into a checkout: the pass, its test, its test of the command line, and its entry in docs/passes.md.

    Args:
        name: as in pipeline text, ``fuse-relu``.
        group: the directory.
        kind: what the pass promises.
        root: the checkout; by default the one that this module belongs to.

    Raises:
        UserError: a name that is none or taken, an unknown group or kind, or no checkout; nothing is written.
    """
    _check_name(name)
    _check_choice("group", group, GROUPS)
    words = _words(name, kind)
    root = root or Path(vacc_opt.__file__).parent
    tests, docs = root / "tests/passes", root / "docs/passes.md"
    if not tests.is_dir() or not docs.is_file():
        hint = f"for a distribution of your own: `vacc-opt passes new {name} --plugin DIR`"
        raise UserError("vacc-opt is installed without its sources, where the passes of a checkout lie", hint)
    imports = [f"from vacc_opt.passes.{group}.{words['file']} import {words['class_name']}", TESTING]
    files = {
        root / f"passes/{group}/{words['file']}.py": PASS.substitute(words),
        tests / f"test_{words['file']}.py": PASS_TEST.substitute(words, imports="\n".join(sorted(imports))),
        root / f"tests/lit/passes/{name}.vacc": LIT_TEST.substitute(words),
    }
    _write_new(files, lambda: write_whole(docs, _page_with(name, kind)))
    path, test, lit, page = map(_near, (*files, docs))
    return Made(
        ((path, "the pass"), (test, "its test"), (lit, "its command line"), (page, "its entry, generated")),
        (
            f"python -m pytest -q {test}",
            f"vacc-opt passes {name}",
            f"change pattern, check and rewrite in {path}, then `make docs`",
        ),
    )


def new_plugin(name: str, kind: str, directory: Path) -> Made:
    """Write a distribution with one pass, which vacc-opt finds by its entry point once it is installed.

    Raises:
        UserError: a name that is none or taken, an unknown kind, a directory that is not empty, or whose name is no
            name for a distribution; nothing is written.
    """
    _check_name(name)
    distribution = directory.absolute().name
    package = distribution.replace("-", "_")
    _check_spelling(distribution, f"{directory}: the distribution is called as its directory, and {distribution!r}")
    if package in sys.stdlib_module_names or package == vacc_opt.__name__ or keyword.iskeyword(package):
        raise UserError(f"{directory}: a package {package!r} would hide another", f"for example {distribution}-passes")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: exists and is not an empty directory", "name a new directory")
    words = _words(name, kind)
    module = f"{package}.{words['file']}"
    files = {
        directory / "pyproject.toml": PYPROJECT.substitute(words, distribution=distribution, package=package),
        directory / package / "__init__.py": f'"""Passes of {distribution} for vacc-opt."""\n',
        directory / package / "py.typed": "",
        directory / package / f"{words['file']}.py": PASS.substitute(words),
        directory / f"tests/test_{words['file']}.py": PLUGIN_TEST.substitute(words, module=module),
    }
    _write_new(files)
    said = ("the distribution, with its entry point", "its package", "says that it is typed", "the pass", "its test")
    return Made(
        tuple(zip(files, said, strict=True)),
        (
            f"python -m pip install --no-deps -e {directory}",
            f"python -m pytest -q {directory}/tests",
            f"vacc-opt passes {name}",
            f"change pattern, check and rewrite in {directory / package / words['file']}.py",
        ),
    )


def _check_name(name: str) -> None:
    _check_spelling(name, f"{name!r}")
    if name in _RESERVED:
        raise UserError(f"{name!r} is a word of `vacc-opt passes`", f"for example fuse-{name}")
    if keyword.iskeyword(name):
        raise UserError(f"{name!r} is a word of Python and names no module", f"for example fuse-{name}")
    known = entries()
    if name in known:
        hint = f"`vacc-opt passes {name}` shows it; choose another name"
        raise UserError(f"there is a {known[name].what} {name!r} already", hint)


def _check_spelling(name: str, subject: str) -> None:
    if _NAME.fullmatch(name):
        return
    near = nearest_name(name)
    hint = f"did you mean `{near}`?" if near else "as in `fuse-relu`"
    raise UserError(f"{subject} is not in lower case with single hyphens", hint)


def nearest_name(text: str) -> str:
    """The valid spelling nearest to a text, empty when nothing of it can stay.

    >>> nearest_name("FuseRMSNorm"), nearest_name("fuse_gqa "), nearest_name("8bit"), nearest_name("--")
    ('fuse-rms-norm', 'fuse-gqa', 'bit', '')
    """
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", text)
    return re.sub(r"[^a-z0-9]+", "-", parted.lower()).lstrip("-0123456789").rstrip("-")


def _check_choice(what: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise UserError(f"unknown {what} {given!r}", did_you_mean(given, choices))


def _words(name: str, kind: str) -> dict[str, str]:
    """What the templates are filled with."""
    _check_choice("kind", kind, tuple(k.value for k in Kind))
    file = name.replace("-", "_")
    class_name = "".join(part.capitalize() for part in name.split("-"))
    doc = "\n".join(f"    {line}".rstrip() for line in DOC.splitlines()).lstrip()
    return {"name": name, "file": file, "class_name": class_name, "kind": kind.upper(), "doc": doc}


def _page_with(name: str, kind: str) -> str:
    """The page of all passes and of the one that has just been written, which this process did not import."""
    said = {"__doc__": DOC, "__module__": __name__, "name": name, "kind": Kind(kind)}
    made = type("_New", (PatternPass,), said)
    known = entries(plugins=False)
    passes = {n: e for n, e in known.items() if e.what == "pass"} | {name: entry_of(made)}
    return page([*(passes[n] for n in sorted(passes)), *(e for e in known.values() if e.what != "pass")])


def _write_new(files: Mapping[Path, str], finish: Callable[[], None] = lambda: None) -> None:
    """Write new files, then ``finish``; no file, nor a directory made for one, stays when any of it fails."""
    made: list[Path] = []
    try:
        for path, text in files.items():
            for parent in reversed([p for p in path.parents if not p.exists()]):
                parent.mkdir()
                made.append(parent)
            try:
                handle = path.open("x", encoding="utf-8")
            except FileExistsError:
                raise UserError(f"{path}: exists already", "nothing was written; choose another name") from None
            made.append(path)
            with handle:
                handle.write(text)
        finish()
    except BaseException:
        for path in reversed(made):
            path.rmdir() if path.is_dir() else path.unlink()
        raise


def _near(path: Path) -> Path:
    """A path as a person in the working directory would write it."""
    relative = Path(os.path.relpath(path))
    return path if ".." in relative.parts else relative

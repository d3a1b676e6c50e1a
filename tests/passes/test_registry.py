"""The registry: a pass is its command-line name, its file and its class at once, and documents itself."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

from vacc_opt.passes.infra.base import Kind, Pass
from vacc_opt.passes.infra.patterns.pattern_pass import PatternPass
from vacc_opt.passes.infra.registry import GROUPS, all_passes, register

PASSES = all_passes()


@pytest.mark.parametrize("name", PASSES)
def test_file_class_and_name_agree(name: str) -> None:
    cls = PASSES[name]
    path = Path(inspect.getfile(cls))
    assert path.stem == name.replace("-", "_")
    assert path.parent.name in GROUPS
    assert cls.__name__.lower() == name.replace("-", "")


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_a_frozen_dataclass_whose_options_are_documented(name: str) -> None:
    cls = PASSES[name]
    item = cls()
    assert isinstance(item.kind, Kind)
    assert item.spec() == name
    assert cls.help_line().endswith(".")
    assert [o.name for o in cls.options()] == [f.name for f in dataclasses.fields(cls)]
    assert all(o.help for o in cls.options())
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(item, "name", "other")  # noqa: B010


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_has_a_test_file(name: str) -> None:
    assert Path(__file__).with_name(f"test_{name.replace('-', '_')}.py").exists()


def test_the_default_pipeline_is_registered() -> None:
    assert {
        "simplify", "fuse-rms-norm", "fuse-rotary", "fuse-gqa", "fuse-swiglu", "slice-last-token", "kv-cache", "w8a16",
        "kv8", "split-tp", "expand-ranks", "legalize",
    } <= set(PASSES)  # fmt: skip


def test_two_passes_of_one_name_are_refused() -> None:
    other = type("Other", (PASSES["simplify"],), {})
    with pytest.raises(ValueError, match=r"two passes are called 'simplify': vacc_opt\.passes\.simplify.* and .*Other"):
        register(other)


def test_names_come_sorted() -> None:
    assert list(PASSES) == sorted(PASSES)
    assert all(issubclass(c, Pass) for c in PASSES.values())


def code_lines(path: Path) -> int:
    """Lines with code: no blank ones, comments or docstrings."""
    source = path.read_text(encoding="utf-8")
    docs: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(1 for number, line in lines if number not in docs and line.strip() and not line.strip().startswith("#"))


def test_a_pass_made_of_a_pattern_is_about_sixty_lines_of_code() -> None:
    files = {name: Path(inspect.getfile(cls)) for name, cls in PASSES.items() if issubclass(cls, PatternPass)}
    counts = {name: code_lines(path) for name, path in files.items()}
    assert counts["fuse-rms-norm"] <= 60
    assert counts["fuse-swiglu"] <= 60
    assert {name: count for name, count in counts.items() if count > 80} == {}

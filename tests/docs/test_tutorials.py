"""The tutorials are true: their files, commands and tables work as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vacc_opt.ir import DType
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.patterns.matcher import Matcher, find
from vacc_opt.passes.infra.patterns.pattern import ANY, AttributeVar, Rest, Var, absent, maybe, op, through
from vacc_opt.tests.docs.consoles import Command, agrees, masked, parts, run

DOCS = Path(__file__).parents[2] / "docs"
NAMES = {
    **{name: Var(name) for name in ("x", "y")},
    "n": Var("n", "scalar"),
    "c": Var("c", "const"),
    "parts": Rest("parts"),
    "axis": AttributeVar("axis"),
    "split": op.Split(Var("x"), ..., axis=1),
    "ANY": ANY,
    "absent": absent,
    "maybe": maybe,
    "op": op,
    "through": through,
    "DType": DType,
}


def rows() -> list[tuple[str, str, str, str]]:
    """The rows of the table of the language: pattern, a graph, another graph, why that does not match."""
    page = (DOCS / "write_a_pass.md").read_text(encoding="utf-8").partition("## The language")[2]
    found = re.findall(r"^\| `(.+)` \| `(.+)` \| `(.+)` \| (.+) \|$", page, flags=re.MULTILINE)
    return [(pattern.replace("\\|", "|"), yes, no, why) for pattern, yes, no, why in found]


@pytest.mark.parametrize(("pattern", "yes", "no", "why"), rows(), ids=[row[0] for row in rows()])
def test_a_row_of_the_language_is_true(pattern: str, yes: str, no: str, why: str) -> None:
    made = eval(pattern, dict(NAMES))  # noqa: S307
    graph = "g (float[2,8] a, float[2,8] b) => (r) {{ {} }}".format
    assert len(list(find(made, from_text(graph(yes))))) == 1
    matcher = Matcher(made, from_text(graph(no)))
    assert [root.op for root in matcher.candidates() if matcher.match(root) is not None] == []
    assert str(matcher.miss) == why


def test_the_table_of_the_language_is_complete() -> None:
    said = " ".join(pattern for pattern, _, _, _ in rows())
    for word in (
        "|",
        "maybe",
        "through",
        "absent",
        "...",
        "shaped",
        "typed",
        "single_use",
        "where",
        "out(",
        "axis=axis",
    ):
        assert word in said
    assert len(rows()) == len(re.findall(r"^\| `", (DOCS / "write_a_pass.md").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("name", ["write_a_pass", "debug_a_pass", "isolate_a_failing_region"])
def test_a_tutorial_does_what_it_shows(name: str, tmp_path: Path) -> None:
    assert run((DOCS / f"{name}.md").read_text(encoding="utf-8"), tmp_path) >= 5


def test_the_page_about_schedules_does_what_it_shows(tmp_path: Path) -> None:
    assert run((DOCS / "schedule_a_kernel.md").read_text(encoding="utf-8"), tmp_path) == 17


@pytest.mark.full  # exports SmolLM2
def test_the_page_about_sweeps_does_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    assert run((DOCS / "sweep_a_target.md").read_text(encoding="utf-8"), tmp_path) == 6
    assert '<svg class="sweep"' in (tmp_path / "sweep.html").read_text(encoding="utf-8")


@pytest.mark.full  # exports and compiles SmolLM2
def test_the_page_about_ranks_does_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    assert run((DOCS / "run_the_ranks.md").read_text(encoding="utf-8"), tmp_path) >= 8


@pytest.mark.full  # compiles SmolLM2 twice
def test_the_page_on_compiling_does_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    assert run((DOCS / "compile.md").read_text(encoding="utf-8"), tmp_path) == 10


@pytest.mark.full
def test_the_page_on_quantization_does_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    assert run((DOCS / "quantization.md").read_text(encoding="utf-8"), tmp_path) >= 1


def test_the_runner_can_fail(tmp_path: Path) -> None:
    page = "Save as `a.txt`:\n\n```text\none\n```\n\n```console\n$ cat a.txt\n{}\n```\n"
    assert run(page.format("one"), tmp_path) == 1
    with pytest.raises(AssertionError, match="the document shows\ntwo"):
        run(page.format("two"), tmp_path)
    with pytest.raises(AssertionError, match="exit code 1"):
        run("```console\n$ false\n```\n", tmp_path)
    with pytest.raises(AssertionError, match="exit code 0"):
        run("```console\n$ echo error: no\nerror: no\n```\n", tmp_path)


def test_output_is_compared_but_for_times_and_what_is_left_out() -> None:
    assert agrees("  load   3 nodes   0.1 s\n...\nend\n", "  load 3 nodes 12.9 s\nmore\nand more\nend\n")
    assert not agrees("load 3 nodes 0.1 s\n", "load 4 nodes 0.1 s\n")
    assert not agrees("one\n", "one\ntwo\n")
    assert agrees("at 3: ...\n", "at 3: 0.5 and more\n")
    assert not agrees("at 3: ...\n", "at 4: 0.5\n")
    assert masked("total  0.193  100.0\n") == "total #.### #.#"


def test_commands_are_read_with_their_output() -> None:
    page = "```console\n$ one \\\n    two\nout\nmore\n$ three\n```\n"
    assert list(parts(page)) == [Command("one two", "out\nmore\n"), Command("three", "")]

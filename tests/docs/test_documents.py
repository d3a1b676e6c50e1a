"""The documents are true: generated pages are current, and the tutorial's code runs as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vacc_opt.cli.main import main

ROOT = Path(__file__).parents[2]


def test_the_page_of_passes_is_what_make_docs_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", "--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs/passes.md").read_text(encoding="utf-8")


def test_the_page_of_lint_is_what_make_docs_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs/lint.md").read_text(encoding="utf-8")


def test_lint_has_nothing_against_the_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        assert main(["lint", str(path)]) == 0
        assert capsys.readouterr().out == f"{path}: 0 errors, 0 warnings\n"


def test_the_pass_of_the_readme_works_as_printed(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Write a pass")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    script = tmp_path / "readme.py"
    script.write_text(
        "from collections.abc import Iterator\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from vacc_opt.passes.api import *\nfrom vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites\n"
        f"{block}\n"
        "text = 'g ({0}[B,8] x) => ({0}[B,8] y) {{ s = Sigmoid (x) y = Mul (s, x) }}'.format\n"
        "assert_rewrites(FuseSwish(), text('float'), 'g (float[B,8] x) => (float[B,8] y) { y = Swish (x) }')\n"
        "assert_no_match(FuseSwish(), text('float16'), 'x is float16[B,8]')\n"
        "print('ran', FuseSwish.name)\n"
    )
    # in a process of its own: the page registers a pass
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.stdout == "ran fuse-swish\n", done.stderr


def test_the_torch_example_of_the_page_on_quantization_works(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/quantization.md").read_text(), flags=re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out == "['0']\n"


def test_the_readme_shows_what_the_tutorial_runs() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Write a pass")[2].partition("\n## ")[0]
    (shown,) = re.findall(r"^fuse-swiglu: 1 of 2.*?(?=^```)", readme, flags=re.DOTALL | re.MULTILINE)
    assert shown in (ROOT / "docs/debug_a_pass.md").read_text(encoding="utf-8")


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"

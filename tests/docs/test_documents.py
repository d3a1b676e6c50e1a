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


def test_the_pass_of_the_tutorial_works_as_printed(tmp_path: Path) -> None:
    text = (ROOT / "docs/write_a_pass.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    calls = re.findall(r"^def (test_\w+)", blocks[1], flags=re.MULTILINE)
    assert len(calls) == 2
    script = tmp_path / "tutorial.py"
    script.write_text("\n".join(blocks) + "".join(f"\n{name}()" for name in calls) + "\nprint('ran', FuseSwish.name)\n")
    # in a process of its own: the tutorial registers a pass
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.stdout == "ran fuse-swish\n", done.stderr


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"

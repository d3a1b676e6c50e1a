"""Every pass shows what it does: the before and after graphs in its docstring, run as they are printed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from vacc_opt.ir import Literal
from vacc_opt.ir.storage import write_safetensors
from vacc_opt.passes.infra.author.examples import Example, doc_of
from vacc_opt.passes.infra.options import Named
from vacc_opt.passes.infra.registry import all_passes
from vacc_opt.passes.infra.testing import assert_examples


@pytest.fixture
def kv_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that the example of kv8 names."""
    numbers = {"scale": np.array([[0.5, 0.25]], np.float32), "zero": np.zeros((1, 2), np.float32)}
    stored = {f"layers.0.key.{name}": Literal(array) for name, array in numbers.items()}
    write_safetensors(tmp_path / "kv.safetensors", stored)
    write_safetensors(tmp_path / "ranges.safetensors", {"product": Literal(np.array([1e5], np.float32))})
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("kv_scales")
@pytest.mark.parametrize(
    "name", [n for n, cls in all_passes().items() if cls.__module__.startswith("vacc_opt.passes.")]
)
def test_the_example_of_a_pass_holds(name: str) -> None:
    assert_examples(all_passes()[name])


def documented(doc: str) -> type[Named]:
    @dataclass(frozen=True)
    class Documented(Named):
        name: ClassVar[str] = "documented"

    Documented.__doc__ = doc
    return Documented


def test_examples_are_taken_out_of_the_text() -> None:
    doc = doc_of(
        documented(
            """Do a thing.

            Before:
                g (float a) => (float a) {

                }
            After documented{x=1}:
                h () => () {}
            Source: a paper.
            """
        )
    )
    assert doc.prose == "Do a thing.\n\nSource: a paper."
    assert doc.examples == (Example("documented{x=1}", "g (float a) => (float a) {\n\n}", "h () => () {}"),)


@pytest.mark.parametrize(
    "doc",
    ["Before:\n    g", "After:\n    g", "Before:\n    g\nBefore:\n    g\nAfter:\n    g", "Before:\nAfter:\n    g"],
    ids=["no after", "no before", "two befores", "no graph"],
)
def test_half_an_example_is_refused(doc: str) -> None:
    with pytest.raises(ValueError, match="documented: '"):
        doc_of(documented(doc))

"""Failures of a pipeline as tests of graphs: which pass fails on what graph, and does it still on a smaller one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vacc_opt.ir import Graph
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.text import to_text
from vacc_opt.passes.infra.base import Pass
from vacc_opt.passes.infra.check.locate import applied
from vacc_opt.passes.infra.check.numerics import NumericMismatch
from vacc_opt.passes.infra.debug.reproducer import Numerics
from vacc_opt.passes.infra.instrument import Instrument, Step
from vacc_opt.passes.infra.manager import run_pipeline

if TYPE_CHECKING:
    from vacc_opt.passes.infra.pipeline import Item


@dataclass(frozen=True)
class Failure:
    """A pass that fails, the graph in front of it, and the error; ``numerics`` if values are what is wrong."""

    step: Step
    graph: Graph
    error: Exception
    numerics: Numerics | None = None

    @property
    def item(self) -> Pass:
        """The pass."""
        return self.step.item

    def focus(self) -> list[str]:
        """Names of values near the cause: the root of the wrong application, or what the message mentions."""
        names = []
        if isinstance(self.error, NumericMismatch) and self.error.application is not None:
            names.append(self.error.application.root)
        words = re.findall(r"[^\s'\"(),:;=]+", str(self.error))
        return [name for name in dict.fromkeys(names + words) if name in self.graph.values]

    def interesting(self, text: str = "") -> Callable[[Graph], bool]:
        """A test for smaller graphs: the same pass fails on them, by values or with ``text`` in its message."""
        if self.numerics is not None:
            return FailsNumerics(self.item, self.numerics)
        return Raises(self.item, text)


class _Caught(Instrument):
    """Keeps where a run failed."""

    step: Step | None = None
    graph: Graph | None = None

    def failed(self, step: Step, graph: Graph, error: Exception) -> None:
        self.step, self.graph = step, graph


def find_failure(graph: Graph, items: Sequence[Item], numerics: Numerics | None = None, text: str = "") -> Failure:
    """Run a pipeline until it fails; ``graph`` is then the one in front of the failing pass.

    Raises:
        UserError: it does not fail, or without ``text`` in its message.
    """
    caught = _Caught()
    checks = [numerics.instrument()] if numerics is not None else []
    try:
        run_pipeline(graph, items, instruments=[*checks, caught])
    except Exception as error:
        if caught.step is None or caught.graph is None:
            raise
        if numerics is not None and not isinstance(error, NumericMismatch):
            raise
        if text not in str(error):
            raise UserError(f"the pipeline fails otherwise: {error}", f"its message does not hold {text!r}") from error
        return Failure(caught.step, caught.graph, error, numerics)
    what = "every pass keeps its promise about values" if numerics is not None else "the pipeline runs without an error"
    raise UserError(f"{what}: there is nothing to find")


@dataclass
class FailsNumerics:
    """Interesting while a pass changes what the graph computes; graphs that it leaves alone are not run at all."""

    item: Pass
    numerics: Numerics
    runs: int = field(default=0)

    def __call__(self, graph: Graph) -> bool:
        """True when the pass breaks its promise on ``graph``."""
        with applied(self.item, graph, None) as rw:
            if rw.error is not None or not rw.modified:
                return False
        self.runs += 1
        check = self.numerics.instrument()
        check.locates = False
        try:
            run_pipeline(graph, [self.item], instruments=[check], verify_each=False)
        except NumericMismatch:
            return True
        except Exception:
            return False
        return False


@dataclass(frozen=True)
class Raises:
    """Interesting while a pass, or the verification after it, fails with ``text`` in its message."""

    item: Pass
    text: str

    def __call__(self, graph: Graph) -> bool:
        """True when it does on ``graph``."""
        try:
            run_pipeline(graph, [self.item])
        except Exception as error:
            return self.text in f"{type(error).__name__}: {error}"
        return False


_TEST = '''"""{title}"""
{imports}

GRAPH = """
{graph}"""


def test_{name}() -> None:
{body}
'''


def pytest_of(failure: Failure, graph: Graph) -> str:
    """A test file that fails for as long as the pass does on ``graph``."""
    name, spec = failure.item.name.replace("-", "_").replace(".", "_"), failure.item.spec()
    imports = ["from vacc_opt.ir.text import from_text", "from vacc_opt.passes.infra.manager import run_pipeline"]
    call = f"run_pipeline(from_text(GRAPH), {json.dumps(spec)})"
    if failure.numerics is not None:
        imports.append("from vacc_opt.passes.infra.check.numerics import CheckNumerics")
        call = f"run_pipeline(from_text(GRAPH), {json.dumps(spec)}, instruments=[{_check(failure.numerics)}])"
        title, name = f"{spec} keeps the values of a graph that it once changed.", f"{name}_keeps_the_values"
    else:
        title, name = f"{spec} runs on a graph on which it once failed.", f"{name}_runs"
    return _TEST.format(title=title, imports=_block(imports), graph=to_text(graph), name=name, body=f"    {call}")


def script_test_of(command: str, graph: Graph, pipeline: str = "") -> str:
    """A test file that fails for as long as a script finds ``graph`` bad, after a pipeline."""
    imports = [
        "from pathlib import Path",
        "",
        "from vacc_opt.ir.text import from_text",
        "from vacc_opt.passes.infra.check.locate import Verdict",
        *(["from vacc_opt.passes.infra.manager import run_pipeline"] if pipeline else []),
        "from vacc_opt.passes.infra.debug.scripts import Script",
    ]
    run = [f"    run_pipeline(graph, {json.dumps(pipeline)})"] if pipeline else []
    check = f"    assert Script({json.dumps(command)}, tmp_path)(graph) is Verdict.GOOD"
    body = "\n".join(["    graph = from_text(GRAPH)", *run, check])
    text = _TEST.format(
        title="A script finds nothing wrong with a graph that it once did.",
        imports=_block(imports),
        graph=to_text(graph),
        name="the_script_finds_nothing_wrong",
        body=body,
    )
    return text.replace("wrong() -> None", "wrong(tmp_path: Path) -> None")


def _block(lines: Sequence[str]) -> str:
    return "\n" + "\n".join(lines)


def _check(numerics: Numerics) -> str:
    plain = Numerics()
    given = [repr(numerics.tolerance)] if numerics.tolerance is not None else []
    given += [f"{k}={v!r}" for k, v in vars(numerics).items() if k != "tolerance" and v != getattr(plain, k)]
    return f"CheckNumerics({', '.join(given)})"

"""Instruments hear how a pipeline runs: printing, timing, checking and reproducing hang on these few calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vacc_opt.ir import Graph
from vacc_opt.passes.infra.base import Pass, Remark, RuleStats

if TYPE_CHECKING:
    from vacc_opt.ir.rewriter import Application, Rewriter
    from vacc_opt.passes.infra.pipeline import Item


@dataclass(frozen=True)
class Step:
    """One run of one pass: its number in the run, from 0, and the graph it runs on ("" for the model itself)."""

    index: int
    item: Pass
    scope: str = ""

    def __str__(self) -> str:
        return f"{self.scope}: {self.item.spec()}" if self.scope else self.item.spec()


@dataclass(frozen=True)
class PassRecord:
    """What one pass did in a run."""

    name: str
    spec: str
    seconds: float
    changes: int
    summary: str
    remarks: tuple[Remark, ...]
    fused: int | None = None
    candidates: int | None = None
    scope: str = ""
    verify_seconds: float = 0.0
    rules: Mapping[str, RuleStats] = field(default_factory=dict)
    applications: tuple[Application, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a pipeline did, pass by pass."""

    records: tuple[PassRecord, ...]

    def remarks(self) -> list[Remark]:
        """All remarks in order."""
        return [r for record in self.records for r in record.remarks]

    def record(self, name: str) -> PassRecord | None:
        """The first record of a pass."""
        return next((r for r in self.records if r.name == name), None)


class Instrument:
    """Hears a run; every method does nothing unless overridden.

    ``wants_rule_times`` asks the manager to measure each rule, which costs two clock readings a root.
    """

    wants_rule_times = False

    def started(self, graph: Graph, items: Sequence[Item]) -> None:
        """The pipeline is about to run on ``graph``."""

    def before(self, step: Step, graph: Graph) -> None:
        """A pass is about to run; ``graph`` is the one of its scope."""

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        """A pass has run and the graph was verified; ``rw.applications`` and ``rw.rollback`` still work."""

    def failed(self, step: Step, graph: Graph, error: Exception) -> None:
        """A pass, its verification or its expectation failed; ``graph`` is again what it was before the pass."""

    def finished(self, report: Report) -> None:
        """The pipeline ended without an error."""

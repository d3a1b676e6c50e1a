"""Why a pattern did not match: for each root that was missed, how far it came, what it expected, what it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import where
from vacc_opt.passes.infra.instrument import Instrument, PassRecord, Step
from vacc_opt.passes.infra.patterns.match import Miss, NotMatched
from vacc_opt.passes.infra.patterns.pattern import Either, Op, Output, Pattern, Where
from vacc_opt.passes.infra.patterns.pattern_pass import Matching, PatternPass
from vacc_opt.passes.infra.patterns.values import formal, plain, scalar, shown
from vacc_opt.passes.infra.pipeline import Item, flat

SHOWN = 40  # places in one report
WIDTH = 96  # of a pattern in a report; a longer one has its operands left out


@dataclass(frozen=True)
class Explanation:
    """One place that was not rewritten, in words."""

    place: str
    depth: int
    size: int
    expected: str = ""
    found: str = ""
    reasons: tuple[str, ...] = ()
    hint: str = ""

    def lines(self) -> list[str]:
        """The place, then what was expected and found there, or why the match was declined."""
        if self.reasons:
            first = f"{self.place}  matched, then declined"
        elif self.depth:
            first = f"{self.place}  deepest partial match {self.depth} of {self.size} nodes"
        else:
            first = f"{self.place}  no root of the pattern reads it"
        facts = [("declined", reason) for reason in self.reasons]
        facts += [(k, v) for k, v in (("expected", self.expected), ("found", self.found), ("hint", self.hint)) if v]
        return [first, *(f"  {name:<9} {text}" for name, text in facts)]


def explain(item: PatternPass, graph: Graph) -> list[Explanation]:
    """The places that ``item`` does not rewrite, as ``graph`` stands: every root that came near or was declined, and
    every anchor (an operator that should have been part of a match) that no root came near. A pass that names no
    anchors has every root explained.
    """
    work = Matching(item, graph)
    size = work.matcher.size()
    missed = list(work.not_matched(every=not item.anchors))
    left = item.left(graph)
    near = set(left)
    if left:
        # a root that came near by way of something else than an anchor is no news
        missed = [m for m in missed if m.miss is None or near & m.around] or missed
    elif item.anchors:
        missed = [m for m in missed if m.miss is None]
    found = [_explained(item, m, size) for m in missed]
    for m in work.away(left, missed):
        assert m.miss is not None
        top, reader, wanted = (shown(a) if isinstance(a, Value) else a for a in m.miss.arguments)
        found.append(Explanation(_place(m.root), 0, size, f"{wanted} to read {top}", f"{reader}"))
    return found


def _place(node: Node) -> str:
    return f"{node.op} {where(node)}"


def _explained(item: PatternPass, missed: NotMatched, size: int) -> Explanation:
    hint = item.hint(missed)
    if missed.miss is None:
        return Explanation(_place(missed.root), size, size, reasons=tuple(map(str, missed.reasons)), hint=hint)
    miss = missed.miss
    return Explanation(
        place=_place(missed.place),
        depth=miss.depth,
        size=size,
        expected=_pattern_text(miss.pattern),
        found=_found(miss),
        hint=hint or _general_hint(miss),
    )


def _pattern_text(pattern: Pattern | None) -> str:
    if pattern is None:
        return ""
    if isinstance(pattern, Either):
        return _short(_brief(pattern))
    text = str(pattern)
    if len(text) > WIDTH and isinstance(pattern, Op):
        attributes = "".join(f", {k}={v}" for k, v in pattern.attributes)
        text = f"{pattern.op}({', '.join(_brief(o) for o in pattern.operands)}{attributes})"
    return _short(text)


def _short(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def _brief(pattern: Pattern) -> str:
    if isinstance(pattern, Where):
        return _brief(pattern.inner)
    if isinstance(pattern, Either):
        return " | ".join(dict.fromkeys(_brief(c) for c in pattern.choices))
    if isinstance(pattern, Op | Output):
        return f"{pattern.node.op if isinstance(pattern, Output) else pattern.op}(...)"
    return str(pattern)


def _found(miss: Miss) -> str:
    node = miss.value.producer if miss.value is not None else None
    if miss.value is None or not miss.template.startswith("found {}"):
        return str(miss)
    if node is None:
        return f"{shown(miss.value)}: {miss.value.type}"
    between = ""
    behind = [op for op in _ops(node.inputs) if miss.pattern is not None and op in miss.pattern.roots()]
    if miss.node is not None and behind:
        between = f" between {behind[0]} and {miss.node.op}"
    source = "" if not node.provenance.origins else f" ({node.provenance.where()})"
    return f"{_node_text(node)}: {miss.value.type}{between}{source}"


def _ops(values: Sequence[Value | None]) -> list[str]:
    return [v.producer.op for v in values if v is not None and v.producer is not None]


def _node_text(node: Node) -> str:
    """``Clip(min=-1024, max=1024) name``: attributes, and the operands that are constant numbers."""
    facts = [f"{k}={plain(v)}" for k, v in sorted(node.attributes.items())]
    numbers = [(formal(node, i), scalar(v)) for i, v in enumerate(node.inputs)]
    facts += [f"{name}={number:g}" for name, number in numbers if name and number is not None]
    return f"{node.op}({', '.join(facts)}) {node.output.name}"


def _general_hint(miss: Miss) -> str:
    node = miss.value.producer if miss.value is not None else None
    if node is not None and node.op in ("Identity", "Dropout", "CastLike", "Constant"):
        return "run `simplify` first"
    return ""


class WhyNot(Instrument):
    """Explains, after each run of one pass of a pipeline, what that pass left.

    Raises:
        UserError: the pipeline does not hold the pass, or it has no pattern.
    """

    def __init__(self, pass_name: str, items: Sequence[Item]) -> None:
        found = {item.name: item for item in flat(items)}
        if pass_name not in found:
            hint = did_you_mean(pass_name, found)
            raise UserError(f"--why-not {pass_name}: the pipeline holds no such pass", hint)
        if not isinstance(found[pass_name], PatternPass):
            named = [item.name for item in found.values() if isinstance(item, PatternPass)]
            hint = f"passes with a pattern here: {', '.join(named) or 'none'}"
            raise UserError(f"--why-not {pass_name}: it has no pattern that could have matched", hint)
        self.pass_name = pass_name
        self.reports: list[str] = []
        self.explanations: list[Explanation] = []

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        """Explain what is left of the graph after the pass."""
        if isinstance(step.item, PatternPass) and step.item.name == self.pass_name:
            explanations = explain(step.item, graph)
            self.explanations += explanations
            self.reports.append(report(record, explanations))

    def text(self) -> str:
        """All reports."""
        return "\n".join(self.reports)


def report(record: PassRecord, explanations: Sequence[Explanation]) -> str:
    """The report of one run of a pass."""
    scope = f"{record.scope}: " if record.scope else ""
    fused = record.fused or 0
    roots = record.candidates if record.candidates and record.candidates > fused else fused + len(explanations)
    lines = [f"{scope}{record.name}: {fused} of {roots} roots matched"]
    if not explanations:
        lines.append("  nothing else in the graph came near the pattern")
    for one in explanations[:SHOWN]:
        lines += [f"  {line}" for line in one.lines()]
    if len(explanations) > SHOWN:
        lines.append(f"  and {len(explanations) - SHOWN} more")
    return "\n".join(lines)

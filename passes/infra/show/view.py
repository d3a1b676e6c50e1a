"""A self-contained HTML view of a run: per pass what changed as text and picture, the remarks, times and rules."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vacc_opt._version import __version__
from vacc_opt.ir import Graph
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import RuleStats
from vacc_opt.passes.infra.instrument import Instrument, PassRecord, Report, Step
from vacc_opt.passes.infra.pipeline import dump_pipeline
from vacc_opt.passes.infra.show.diff import Change, Diff, compare, hunks
from vacc_opt.passes.infra.show.files import check_place, write_whole
from vacc_opt.passes.infra.show.listing import END, NEW, OLD, Listing, listing, plain, text
from vacc_opt.passes.infra.show.picture import Box, draw
from vacc_opt.passes.infra.show.regions import Edge, Key, Region, Regions, alike
from vacc_opt.passes.infra.show.remarks import Entry
from vacc_opt.passes.infra.show.timing import rule_counts, telling_rules

if TYPE_CHECKING:
    from vacc_opt.passes.infra.pipeline import Item

LINES = 600  # of a comparison on the page
NODES = 40  # in one picture
BESIDE = 4  # neighbors drawn on either side of a node
DRAWN = 160  # in the pictures of one pass
GROUPS = 8  # different remarks of a kind, each with a list of its own
PLACES = 40  # in such a list
_LINE_TAGS = {"+": "ins", "-": "del", "~": "b", " ": "i"}
_STYLES = {"+": "new", "-": "gone", "~": "changed", " ": "kept"}
_TEMPLATE = "view.html.jinja"


@dataclass(frozen=True)
class Picture:
    """A place as a drawing, standing for all places that look alike."""

    svg: Markup
    place: str
    count: int
    left_out: int  # nodes of the place that are not drawn
    neighbors_left_out: int


@dataclass(frozen=True)
class Said:
    """Remarks that say the same of several places; without a message each place tells its own."""

    kind: str
    message: str
    places: tuple[str, ...]
    more: int


@dataclass(frozen=True)
class Page:
    """What the view shows of one pass."""

    number: int
    step: Step
    record: PassRecord | None
    nodes: tuple[int, int]
    counts: Mapping[str, int]
    summary: str
    diff: Markup
    lines_left_out: int
    pictures: tuple[Picture, ...]
    places_left_out: int
    said: tuple[Said, ...]
    operators: tuple[tuple[str, int, int], ...]
    rules: Mapping[str, RuleStats]

    @property
    def seconds(self) -> float:
        """Time of the pass and its verification."""
        return self.record.seconds + self.record.verify_seconds if self.record is not None else 0.0

    def remarks(self, kind: str) -> int:
        """The number of remarks of a kind."""
        return sum(r.kind == kind for r in self.record.remarks) if self.record is not None else 0


@dataclass(eq=False)
class HtmlView(Instrument):
    """Collects a run and writes it as one HTML file when it ends, with an error or without.

    Raises:
        UserError: the file could not be written.
    """

    path: Path
    wants_rule_times = True
    written: bool = False
    pages: list[Page] = field(default_factory=list)
    _name: str = ""
    _pipeline: str = ""
    _error: Exception | None = None
    _before: Listing = field(default_factory=dict)
    _operators: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_place(self.path)

    def started(self, graph: Graph, items: Sequence[Item]) -> None:
        """Note what runs on what."""
        self._name, self._pipeline = graph.name, dump_pipeline(items)

    def before(self, step: Step, graph: Graph) -> None:
        """Take the listing that the pass is compared with."""
        self._before, self._operators = listing(graph), graph.op_counts()

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        """Make the page of the pass."""
        self.pages.append(_page(step, record, compare(self._before, listing(graph)), self._operators, graph))

    def failed(self, step: Step, graph: Graph, error: Exception) -> None:
        """Note the error on the page of its pass, and write what there is."""
        self._error = error
        if not self.pages or self.pages[-1].step.index != step.index:
            self.pages.append(_page(step, None, Diff([]), self._operators, graph))
        self._write()

    def finished(self, report: Report) -> None:
        """Write the file."""
        self._write()

    def text(self) -> str:
        """Where the file is, once it is written."""
        return f"  -> {self.path}" if self.written else ""

    def _write(self) -> None:
        write_whole(self.path, self.html())
        self.written = True

    def html(self) -> str:
        """The page without external assets."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {
            "count": "{:,}".format,
            "time": _time,
            "counts": rule_counts,
            "code": _code,
        }
        error = self._error
        return environment.get_template(_TEMPLATE).render(
            name=self._name,
            version=__version__,
            pipeline=self._pipeline,
            pages=self.pages,
            seconds=sum(page.seconds for page in self.pages),
            slowest=max((page.seconds for page in self.pages), default=0.0) or 1.0,
            error=getattr(error, "message", str(error)) if error is not None else "",
            hint=(getattr(error, "hint", None) or "") if error is not None else "",
        )


def _code(words: str) -> Markup:
    """Text with what stands between double backquotes set as code."""
    return Markup(re.sub(r"``(.+?)``", r"<code>\1</code>", escape(words, quote=False)))


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _page(step: Step, record: PassRecord | None, diff: Diff, before: Mapping[str, int], graph: Graph) -> Page:
    after = graph.op_counts()
    lines = list(_lines(diff))
    pictures, places_left_out = _pictures(diff)
    return Page(
        number=step.index + 1,
        step=step,
        record=record,
        nodes=(sum(before.values()), len(graph)),
        counts={sign: diff.count(sign) for sign in "+-~"},
        summary=diff.summary(),
        diff=Markup("".join(lines[:LINES])),
        lines_left_out=max(len(lines) - LINES, 0),
        pictures=tuple(pictures),
        places_left_out=places_left_out,
        said=tuple(_said(record)) if record is not None else (),
        operators=tuple(
            (op, before.get(op, 0), after.get(op, 0))
            for op in sorted({*before, *after})
            if before.get(op, 0) != after.get(op, 0)
        ),
        rules=telling_rules(record) if record is not None else {},
    )


def _lines(diff: Diff) -> Iterator[str]:
    """The lines of the comparison as elements, each with its sign in front and the place of the model behind."""
    for block in hunks(diff):
        if isinstance(block, int):
            yield f"<u>... {block:,} line{'s' if block > 1 else ''}</u>"
            continue
        for change in block:
            tag = _LINE_TAGS[change.sign]
            body = escape(text(change.row, change.before), quote=False)
            body = body.replace(OLD, "<del>").replace(NEW, "</del> <ins>").replace(END, "</ins>")
            place = f"<s>{escape(change.row.place, quote=False)}</s>" if change.row.place else ""
            yield f"<{tag}>{change.sign} {body}{place}</{tag}>"


def _said(record: PassRecord) -> Iterator[Said]:
    """Remarks with equal words together, missed ones first; of a kind that says many things, all together."""
    for kind in ("missed", "analysis", "passed"):
        remarks = [remark for remark in record.remarks if remark.kind == kind]
        groups: dict[str, list[str]] = {}
        for remark in remarks:
            groups.setdefault(remark.message, []).append(Entry(remark).place)
        if len(groups) > GROUPS:
            groups = {"": [f"{remark.message}: {Entry(remark).place}" for remark in remarks]}
        for message, places in groups.items():
            yield Said(kind, message, tuple(places[:PLACES]), max(len(places) - PLACES, 0))


def _pictures(diff: Diff) -> tuple[list[Picture], int]:
    """A picture for each kind of place until enough nodes are drawn, and the number of places without one."""
    regions = Regions(diff)
    pictures: list[Picture] = []
    drawn = left_out = 0
    for members in alike(regions.found):
        if drawn >= DRAWN:
            left_out += len(members)
            continue
        picture, nodes = _picture(regions, members)
        pictures.append(picture)
        drawn += nodes
    return pictures, left_out


def _picture(regions: Regions, members: Sequence[Region]) -> tuple[Picture, int]:
    first = members[0]
    core = first.core[:NODES]
    touching = regions.around(core)
    # the changed nodes come first; neighbors as far as there is room
    around = regions.around(core, BESIDE)[: NODES + BESIDE - len(core)]
    shown = {c.row.key: c for c in regions.ordered([*core, *around])}
    edges = regions.edges(shown)
    order = {key: i for i, key in enumerate(_topological(list(shown), edges))}
    boxes = [_box(shown[key]) for key in order]
    svg = draw(boxes, [(order[e.source], order[e.target], _STYLES[e.sign]) for e in edges])
    left_out = len(first.core) - len(core), len(touching) - len(around)
    return Picture(Markup(svg), first.place, len(members), *left_out), len(boxes)


def _topological(keys: Sequence[Key], edges: Sequence[Edge]) -> list[Key]:
    """Sources before targets, else in the order given; old and new edges together may make a cycle, which is cut."""
    position = {key: i for i, key in enumerate(keys)}
    waits = dict.fromkeys(keys, 0)
    after: dict[Key, list[Key]] = {key: [] for key in keys}
    for edge in edges:
        waits[edge.target] += 1
        after[edge.source].append(edge.target)
    ready = [position[key] for key in keys if not waits[key]]
    order: dict[Key, None] = {}
    while ready:
        key = keys[heapq.heappop(ready)]
        order[key] = None
        for target in after[key]:
            waits[target] -= 1
            if not waits[target]:
                heapq.heappush(ready, position[target])
    return [*order, *(key for key in keys if key not in order)]


def _box(change: Change) -> Box:
    row, old = change.row, change.before
    label = row.op if row.kind == "node" else f"{row.kind} {row.names[0]}"
    if old is not None and old.op != row.op:
        label = f"{old.op} → {row.op}"
    note = str(row.types[0])
    if old is not None and old.types and str(old.types[0]) != note:
        note = f"{old.types[0].dtype.value} → {note}" if old.types[0].dtype is not row.types[0].dtype else f"→ {note}"
    where = f"\n{row.place}" if row.place else ""
    return Box(label.removeprefix("Vastai::"), note, _STYLES[change.sign], plain(text(row, old)) + where)

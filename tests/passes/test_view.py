"""The HTML view of a run: what its pages hold, what they leave out, and how the pictures are laid out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from vacc_opt.ir import Graph
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.show.diff import compare
from vacc_opt.passes.infra.show.listing import listing_of
from vacc_opt.passes.infra.show.picture import Box, draw
from vacc_opt.passes.infra.show.regions import Regions, alike
from vacc_opt.passes.infra.show.view import DRAWN, LINES, HtmlView


@dataclass(frozen=True)
class Merge(Pass):
    """Write Sqrt and Reciprocal as one Pow."""

    name: ClassVar[str] = "merge"
    kind: ClassVar[Kind] = Kind.REASSOCIATING
    expect: int | None = option(None, "fail unless exactly this many")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        outcome = Outcome(fused=0)
        for node in graph.by_op("Reciprocal"):
            root = node.inputs[0]
            with rw.applying([node]):
                half = rw.shared_const(np.array(-0.5, np.float32), "half")
                rw.replace(node.output, rw.op.Pow(root.producer.inputs[0], half))
            outcome.fused += 1
            outcome.remarks.append(Remark("passed", self.name, "Reciprocal rewritten", node.output.name))
        outcome.remarks.append(Remark("missed", self.name, "<b>not</b> this one", "y"))
        outcome.summary = f"merged {outcome.fused}"
        return outcome


def layers(count: int) -> Graph:
    """Layers of Exp, Sqrt, Reciprocal, Mul."""
    lines = [
        f"e{i} = Exp(x{i}) s{i} = Sqrt(e{i}) r{i} = Reciprocal(s{i}) x{i + 1} = Mul(r{i}, x{i})" for i in range(count)
    ]
    return from_text(f"net (float[4] x0) => (float[4] x{count}) {{ {' '.join(lines)} }}")


def viewed(graph: Graph, pipeline: object, tmp_path: Path) -> str:
    path = tmp_path / "run.html"
    run_pipeline(graph, pipeline, instruments=[HtmlView(path)])
    return path.read_text(encoding="utf-8")


def regions_of(before: str, after: str) -> Regions:
    return Regions(compare(listing_of(from_text(before)), listing_of(from_text(after))))


def shown(regions: Regions) -> list[tuple[str, str]]:
    """Core and neighbors of each region, a node as its sign and first value."""
    return [
        tuple(" ".join(f"{c.sign}{c.row.names[0]}" for c in part) for part in (region.core, region.around))
        for region in regions.found
    ]


class Elements(HTMLParser):
    """The open elements, checked to close in order, and all attributes."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_well_formed_file_that_loads_nothing(tmp_path: Path) -> None:
    text = viewed(layers(3), [Merge()], tmp_path)
    elements = Elements()
    elements.feed(text)
    assert elements.open == []
    assert {value for name, value in elements.attributes if name in ("src", "href")} == {"#overview", "#p1"}
    assert not re.search(r"https?://|@import|url\(", text)


def test_each_pass_has_an_entry_with_its_counts_and_its_page(tmp_path: Path) -> None:
    text = viewed(layers(3), "simplify,fuse-swiglu", tmp_path)
    nav = text[text.index("<nav") : text.index("</nav>")]
    assert re.findall(r'href="#(\w+)"', nav) == ["overview", "p1", "p2"]
    assert nav.count("no change") == 2
    assert re.findall(r'<section id="(\w+)"', text) == ["overview", "p1", "p2"]


def test_a_page_shows_the_changed_lines_escaped(tmp_path: Path) -> None:
    text = viewed(
        from_text("g (float[2,2] x) => (float[2,2] y) { a = Identity(x) y = Transpose <perm = [1, 0]> (a) }"),
        "simplify",
        tmp_path,
    )
    assert "<del>- a: float[2,2] = Identity(x)</del>" in text
    assert "<b>~ y: float[2,2] = Transpose&lt;perm=[1, 0]&gt;(<del>a</del> <ins>x</ins>)</b>" in text


def test_remarks_are_grouped_by_what_they_say_and_escaped(tmp_path: Path) -> None:
    text = viewed(layers(3), [Merge()], tmp_path)
    assert "&lt;b&gt;not&lt;/b&gt; this one" in text
    assert "<b>not</b>" not in text
    assert "<li>r0</li><li>r1</li><li>r2</li>" in text
    assert "1 missed" in text


def test_places_that_look_alike_are_drawn_once(tmp_path: Path) -> None:
    text = viewed(layers(5), [Merge()], tmp_path)
    assert text.count("<svg") == 1
    assert "<b>5 places</b> alike, the first: s0" in text
    assert text.count('<g class="gone"') == 2
    assert text.count('<g class="new"') == 1


def test_hovering_tells_the_whole_line(tmp_path: Path) -> None:
    assert "<title>r0: float[4] = Reciprocal(s0)</title>" in viewed(layers(1), [Merge()], tmp_path)


def test_what_is_left_out_of_a_large_change_is_said(tmp_path: Path) -> None:
    ops = ("Exp", "Sin", "Cos", "Neg", "Abs", "Ceil", "Floor", "Sigmoid", "Tanh", "Relu")
    # dead branches, each of another shape, of which not all can be drawn
    chains = [
        f"d{i}_{j} = {ops[(i // 10**j) % 10]}({'x' if j == 0 else f'd{i}_{j - 1}'})"
        for i in range(400)
        for j in range(3)
    ]
    graph = from_text(f"g (float[2] x) => (float[2] y) {{ {' '.join(chains)} y = Neg(x) }}")
    text = viewed(graph, "eliminate-dead-code", tmp_path)
    assert text.count("<g class") <= DRAWN + 10
    assert re.search(r"\d+ more places not drawn", text)
    assert text.count("<del>- ") == LINES - 1  # and one line of context
    assert f"{1200 - LINES + 1 + 1:,} more lines" in text


def test_a_run_that_fails_is_written_with_its_error_on_the_page_of_the_pass(tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    with pytest.raises(CheckError):
        run_pipeline(layers(2), [Merge(), Merge(expect=3)], instruments=[HtmlView(path)])
    text = path.read_text()
    page = text[text.index('<section id="p2"') :]
    assert '<div class="error"><b>merge: 0 rewritten, 3 expected</b>' in page
    assert text.count('<span class="missed">failed</span>') == 1


def test_a_file_that_could_not_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        HtmlView(tmp_path / "no" / "run.html")
    with pytest.raises(UserError, match="is a directory"):
        HtmlView(tmp_path)


def test_what_took_the_place_of_what_is_one_region_with_its_neighbors() -> None:
    before = "g (float[2] x) => (float[2] y) { a = Exp(x) b = Sqrt(a) c = Reciprocal(b) y = Neg(c) }"
    after = "g (float[2] x) => (float[2] y) <float h = {-0.5}> { a = Exp(x) p = Pow(a, h) y = Neg(p) }"
    assert shown(regions_of(before, after)) == [("-b -c +p", " a ~y")]


def test_a_removed_node_that_two_places_read_is_a_region_of_its_own() -> None:
    before = (
        "g (float[2] x) => (float[2] y) { s = Exp(x) a = Mul(s, x) b = Add(s, x) c = Abs(a) d = Abs(b) y = Max(c, d) }"
    )
    after = "g (float[2] x) => (float[2] y) { p = Sin(x) q = Cos(x) c = Abs(p) d = Abs(q) y = Max(c, d) }"
    assert [core for core, _ in shown(regions_of(before, after))] == ["-s", "-a +p", "-b +q"]


def test_a_node_that_changed_by_itself_is_a_region() -> None:
    before = "g (float[2,3] x) => (float[3,2] y) { a = Neg(x) y = Transpose <perm = [1, 0]> (a) }"
    after = "g (float[2,3] x) => (float[2,3] y) { a = Neg(x) y = Transpose <perm = [0, 1]> (a) }"
    assert shown(regions_of(before, after)) == [("~y", " a ~y")]  # the second is the output of that name


def test_regions_with_the_same_operators_are_alike() -> None:
    text = "g (float[2] x) => (float[2] y) {{ a = {0}(x) b = Neg(a) c = {0}(b) d = Abs(c) y = {1}(d) }}"
    groups = alike(regions_of(text.format("Sin", "Tan"), text.format("Cos", "Tanh")).found)
    assert [[r.core[0].row.names[0] for r in group] for group in groups] == [["a", "c"], ["y"]]


def rectangles(svg: str) -> Iterator[tuple[float, float, float, float]]:
    for x, y, width, height in re.findall(r'translate\((-?\d+) (-?\d+)\)">.*?<rect width="(\d+)" height="(\d+)"', svg):
        yield float(x), float(y), float(x) + float(width), float(y) + float(height)


def test_boxes_do_not_overlap_and_stand_below_what_they_read() -> None:
    edges = [(0, 1), (0, 2), (1, 3), (2, 3), (0, 3), (3, 4), (3, 5), (0, 5), (4, 6), (5, 6), (1, 6)]
    svg = draw([Box(f"Operator{i}", "float[batch,seq,64]") for i in range(7)], [(a, b, "kept") for a, b in edges])
    found = list(rectangles(svg))
    assert len(found) == 7
    for index, (left, top, right, bottom) in enumerate(found):
        for other in found[:index]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    tops = {int(n): one[1] for n, one in zip(re.findall(r">Operator(\d)<", svg), found, strict=True)}
    assert all(tops[a] < tops[b] for a, b in edges)


def test_a_box_is_inside_the_picture() -> None:
    svg = draw([Box("A", "x" * 80), Box("B"), Box("C")], [(0, 1, ""), (0, 2, "")])
    width, height = (float(n) for n in re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    for left, top, right, bottom in rectangles(svg):
        assert left >= 0
        assert top >= 0
        assert right <= width
        assert bottom <= height


def test_a_picture_of_nothing_is_empty() -> None:
    assert "<g" not in draw([], [])


SCRIPT = """
from pathlib import Path
import sys
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.show.view import HtmlView
from vacc_opt.passes.infra.manager import run_pipeline
lines = [f"i{i} = Identity(x{i}) s{i} = Sigmoid(i{i}) m{i} = Mul(s{i}, i{i}) x{i + 1} = Add(m{i}, x{i})" for i in range(9)]
graph = from_text("net (float[4] x0) => (float[4] x9) { " + " ".join(lines) + " }")
run_pipeline(graph, "simplify,fuse-swiglu", instruments=[HtmlView(Path(sys.argv[1]))])
"""


def test_all_but_the_times_is_the_same_for_every_hash_seed(tmp_path: Path) -> None:
    pages = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.html"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", SCRIPT, str(path)], check=True, env=environment)
        pages.append(re.sub(r"[\d.]+ m?s\b|width: \d+px", "", path.read_text()))
    assert pages[0] == pages[1]

"""The HTML report is one well-formed page that needs nothing from outside and shows what was measured."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from vacc_opt.backends.vacc.memory import memory_plan
from vacc_opt.backends.vacc.report import PhaseReport
from vacc_opt.backends.vacc.report.html import LinearLoss, render_report
from vacc_opt.backends.vacc.schedule import Kernel, Program
from vacc_opt.backends.vacc.simulate_time import simulate_time
from vacc_opt.backends.vacc.single import single
from vacc_opt.backends.vacc.target import load_target

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, the text of cells, and whether every tag is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.balanced = True

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.balanced = self.balanced and bool(self.open) and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(" ".join(data.split()))


@pytest.fixture
def program(make_gemm: Callable[..., Kernel]) -> Program:
    return single(make_gemm(load_target("vacc-reference"), 70, 203, 129), load_target("vacc-reference"))


@pytest.fixture
def page(program: Program) -> Page:
    timing = simulate_time(program, load_target("vacc-reference"))
    page = Page()
    page.feed(render_report("gemm & <more>", [PhaseReport(timing, memory_plan(program))]))
    return page


def test_every_tag_is_closed(page: Page) -> None:
    assert page.balanced
    assert page.open == []


def test_nothing_is_fetched_from_outside(page: Page) -> None:
    assert not [tag for tag, attributes in page.tags if {"src", "href"} & attributes.keys()]
    assert "script" not in {tag for tag, _ in page.tags}


def test_the_loss_of_every_int8_weight_is_on_the_page(program: Program) -> None:
    timing = simulate_time(program, load_target("vacc-reference"))
    phases = [PhaseReport(timing, memory_plan(program))]
    losses = [
        LinearLoss("layers.0.up", (96, 64), 3e-5, 9e-5, False),
        LinearLoss("layers.0.down", (64, 96), 0.02, 0.04, True),
    ]
    page = Page()
    page.feed(render_report("model", phases, losses))
    assert page.balanced
    cells = [text for text in page.text if text]
    for row in (
        ["layers.0.up", "96 x 64", "3.00e-05", "9.00e-05", "int8"],
        ["layers.0.down", "64 x 96", "2.00e-02", "4.00e-02", "float"],
    ):
        start = cells.index(row[0])
        assert cells[start : start + 5] == row
    assert any(text.endswith("1 stay float.") for text in cells)
    assert "int8 weights" not in render_report("model", phases)


def test_titles_are_escaped(page: Page) -> None:
    assert page.text.count("gemm & <more>") == 2


def test_the_cycles_of_the_program_and_its_bound_are_on_the_page(page: Page, program: Program) -> None:
    timing = simulate_time(program, load_target("vacc-reference"))
    text = " ".join(page.text)
    assert f"{timing.cycles:,} cycles" in text
    assert f"{timing.bound.cycles:,} cycles" in text
    assert timing.kernels["linear"].name in page.text


def test_every_assumed_number_is_marked(page: Page) -> None:
    marked = [one for tag, one in page.tags if tag == "td" and "assumed" in (one.get("class") or "")]
    assert len(marked) == len(load_target("vacc-reference").assumed)


@pytest.mark.parametrize(("name", "lines"), [("vacc-reference", 2), ("vacc-reference-16banks", 17)])
def test_the_map_of_the_sram_shows_the_buffers_of_each_kernel_and_where_banks_end(
    name: str, lines: int, make_gemm: Callable[..., Kernel]
) -> None:
    target = load_target(name)
    program = single(make_gemm(target, 70, 203, 129), target)
    timing, page = simulate_time(program, target), Page()
    page.feed(render_report("model", [PhaseReport(timing, memory_plan(program), program.kernels)]))
    assert page.balanced
    assert [attributes.get("class") for _, attributes in page.tags].count("bank") == lines
    (kernel,) = program.kernels
    for one in kernel.buffers:
        told = f"{one.name}: {one.depth} x {one.slot_bytes:,} bytes at {one.offset:#x}, {one.producer} -> "
        assert any(text.startswith(told) for text in page.text)
    assert any("16 banks of 131,072 bytes" in text for text in page.text) is (lines == 17)


def test_there_is_a_roofline_with_a_point_for_the_kernel_and_a_memory_map(page: Page) -> None:
    classes = [attributes.get("class") for tag, attributes in page.tags if tag == "svg"]
    assert {"roofline", "ddr", "bar"} <= set(classes)
    assert [tag for tag, _ in page.tags].count("circle") == 1

"""The catalog: everything that pipeline text can name, described from its declaration alone."""

from __future__ import annotations

import pytest

from vacc_opt.ir import UserError
from vacc_opt.passes.infra.author.catalog import entries, entry
from vacc_opt.passes.infra.author.reference import described, page, table
from vacc_opt.passes.infra.base import Kind
from vacc_opt.passes.infra.pipeline import dump_pipeline, parse_pipeline
from vacc_opt.passes.infra.presets import PRESETS
from vacc_opt.passes.infra.scopes import SCOPES

OURS = entries(plugins=False)


def test_passes_presets_and_scopes_come_each_sorted() -> None:
    kinds = [e.what for e in OURS.values()]
    assert kinds == sorted(kinds, key=["pass", "preset", "scope"].index)
    for what in ("pass", "preset", "scope"):
        names = [e.name for e in OURS.values() if e.what == what]
        assert names == sorted(names)
    assert {e.name for e in OURS.values() if e.what != "pass"} == {*PRESETS, *SCOPES}


def test_every_kind_has_its_promise() -> None:
    assert len({kind.promise for kind in Kind}) == len(Kind)
    assert {e.promise for e in OURS.values() if e.what == "pass"} == {kind.promise for kind in Kind}


def test_an_order_is_known_from_both_of_its_ends() -> None:
    split = entry("split-tp")
    assert {"fuse-gqa", "kv-cache"} <= set(split.follows)  # by its own word
    assert "w8a16" in split.follows  # by the word of w8a16
    for one in OURS.values():
        assert all(one.name in OURS[other].precedes for other in one.follows if other in OURS)
        assert all(one.name in OURS[other].follows for other in one.precedes if other in OURS)


def test_the_order_that_is_shown_is_the_order_that_is_checked() -> None:
    for one in OURS.values():
        for other in one.follows:
            with pytest.raises(UserError, match="must come"):
                parse_pipeline(f"{one.name},{other}")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_shown_as_the_passes_that_it_stands_for(name: str) -> None:
    text = entry(name).stands_for
    assert not any(preset in text for preset in PRESETS)
    assert dump_pipeline(parse_pipeline(name)) == text


def test_a_description_has_promise_order_options_and_example() -> None:
    lines = described(entry("kv-cache")).splitlines()
    assert lines[0] == "kv-cache (interface)"
    assert "Promise: the same model behind other inputs or outputs" in lines
    assert any(line.startswith("Order:   after fuse-gqa; before kv8, ") for line in lines)
    assert any(
        line.split() == ["context:", "int", "=", "2048", "capacity", "of", "the", "buffers,", "in", "tokens"]
        for line in lines
    )
    assert lines[lines.index("Example:") + 1] == "  before"
    assert "  after kv-cache{context=16}" in lines


def test_defaults_are_shown_as_pipeline_text_writes_them() -> None:
    text = described(entry("w8a16"))
    assert "lm_head: bool = false" in text
    assert "include: str = empty" in text
    assert "expect: int | None = none" in described(entry("fuse-gqa"))


def test_the_list_has_a_line_each_and_the_page_a_section() -> None:
    assert [line.split()[0] for line in table(OURS.values()).splitlines()] == list(OURS)
    text = page(list(OURS.values()))
    for name in OURS:
        assert f"\n## {name}\n" in text
    # a link in the table leads to its section
    assert text.count("](#") == sum(e.what == "pass" for e in OURS.values())


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown pass 'prefil'\n  did you mean `prefill`"):
        entry("prefil")

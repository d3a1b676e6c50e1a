"""Target files: every number has a value and a provenance, and a wrong file is refused with a hint."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from vacc_opt.backends.vacc.target import load_target, overlay, parse_target, target_names
from vacc_opt.ir.errors import UserError


@pytest.fixture
def raw() -> Any:
    import vacc_opt.backends.vacc.target as module

    path = Path(module.__file__).parent / "targets" / "vacc-reference.yaml"
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


def test_the_shipped_targets_are_these() -> None:
    peers = [f"peer-64x64-{mib}mib-{rate}bpc" for mib in (1, 2) for rate in (200, 64)]
    assert target_names() == sorted(["vacc-card4", "vacc-reference", "vacc-reference-16banks", *peers])


@pytest.mark.parametrize("name", target_names())
def test_a_shipped_target_is_named_as_its_file_and_says_where_each_number_comes_from(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert {path for path, _, _ in target.numbers()} == set(target.numbers_from)


def test_the_reference_assumes_everything_but_its_clock() -> None:
    target = load_target("vacc-reference")
    stated = [path for path, _, source in target.numbers() if source != "assumed"]
    assert stated == ["clock_mhz"]
    assert "die.ddr.bytes_per_cycle" in target.assumed


def test_the_card_is_four_reference_dies() -> None:
    card, die = load_target("vacc-card4"), load_target("vacc-reference")
    assert (card.dies, card.core, card.links) == (4, die.core, die.links)


def test_sizes_are_bytes() -> None:
    assert load_target("peer-64x64-1mib-64bpc").core.sram.bytes == 1024 * 1024


def test_the_hash_follows_values_and_provenance(raw: Any) -> None:
    same, faster, measured = parse_target(raw), deepcopy(raw), deepcopy(raw)
    faster["die"]["ddr"]["latency"] += 1
    measured["die"]["cores"] = {"value": 8, "provenance": "measured: board 1"}
    hashes = {same.sha, parse_target(faster).sha, parse_target(measured).sha}
    assert len(hashes) == 3
    assert same.sha == load_target("vacc-reference").sha


@pytest.mark.parametrize(
    ("name", "sha"),
    [
        ("peer-64x64-1mib-200bpc", "a619410e527dccc8"),
        ("peer-64x64-1mib-64bpc", "8e46a2ae4ab998c4"),
        ("peer-64x64-2mib-200bpc", "91708df0363ec9df"),
        ("peer-64x64-2mib-64bpc", "22adbf7ca80a9e45"),
        ("vacc-card4", "08742626cd21158a"),
        ("vacc-reference", "a9d3dd447a2f28b1"),
    ],
)
def test_banks_that_are_not_known_leave_the_hash_of_a_target_as_it_was_before_there_were_any(
    name: str, sha: str
) -> None:
    target = load_target(name)
    assert target.core.sram.banks is None
    assert "core.sram.banks" not in target.numbers_from
    assert target.sha == sha


def test_the_reference_with_banks_differs_from_the_reference_in_nothing_else() -> None:
    plain, banked = load_target("vacc-reference"), load_target("vacc-reference-16banks")
    assert banked.core.sram.banks == 16
    assert banked.core.sram.bank_bytes == 128 << 10
    assert "core.sram.banks" in banked.assumed
    assert list(plain.numbers()) == [one for one in banked.numbers() if one[0] != "core.sram.banks"]


def test_banks_are_stated_even_where_none_are_known(raw: Any) -> None:
    del raw["core"]["sram"]["banks"]
    with pytest.raises(UserError, match=r"`core\.sram\.banks` is missing"):
        parse_target(raw)


@pytest.mark.parametrize("banks", [3, 1 << 16])
def test_banks_of_unequal_sizes_or_less_than_a_slot_are_refused(raw: Any, banks: int) -> None:
    raw["core"]["sram"]["banks"] = banks
    with pytest.raises(UserError, match=f"2097152 bytes of SRAM are not {banks} equal banks of whole 64 bytes"):
        parse_target(raw)


def test_an_overlay_sets_a_number_that_is_null() -> None:
    target = load_target("vacc-reference")
    for key in ("core.sram.banks", "banks"):
        changed = overlay(target, {key: 16})
        assert changed.core == load_target("vacc-reference-16banks").core
        assert changed.numbers_from["core.sram.banks"] == "assumed"
        assert changed.name == f"vacc-reference+{key}=16"
        assert changed.sha != target.sha
    assert overlay(target, {"acc.sram_bytes_per_cycle": 512}).core.matrix.acc.sram_bytes_per_cycle == 512


def test_an_array_pass_is_charged_whole() -> None:
    """3424 = 53.5 x 64 takes 54 passes over k: 54 x 64 x 1024 cycles."""
    matrix = load_target("peer-64x64-2mib-64bpc").core.matrix
    assert matrix.cycles(1024, 4096, 3424, "f16", 2) == 54 * 64 * 1024


def test_one_row_waits_for_the_weights_of_its_pass() -> None:
    matrix = load_target("vacc-reference").core.matrix
    assert matrix.pass_cycles(1, "f16", 2) == 64 * 64 * 2 // 256


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(UserError, match="unknown target `vacc-card`") as error:
        load_target("vacc-card")
    assert error.value.hint == "did you mean `vacc-card4`?"


def test_an_unknown_key_is_refused_with_the_nearest_field(raw: Any) -> None:
    raw["die"]["ddr"]["latancy"] = 3
    with pytest.raises(UserError, match=r"unknown key `die\.ddr\.latancy`") as error:
        parse_target(raw)
    assert error.value.hint == "did you mean `latency`?"


def test_a_missing_number_is_refused(raw: Any) -> None:
    del raw["core"]["sram"]["bytes"]
    with pytest.raises(UserError, match=r"`core\.sram\.bytes` is missing"):
        parse_target(raw)


def test_a_number_without_provenance_is_refused(raw: Any) -> None:
    del raw["provenance"]
    with pytest.raises(UserError, match="dies has no provenance"):
        parse_target(raw)


def test_a_made_up_provenance_is_refused(raw: Any) -> None:
    raw["core"]["dma"]["provenance"] = "guess"
    with pytest.raises(UserError, match=r"provenance of core\.dma is 'guess'"):
        parse_target(raw)


def test_a_negative_number_is_refused(raw: Any) -> None:
    raw["die"]["cores"] = 0
    with pytest.raises(UserError, match=r"die\.cores = 0"):
        parse_target(raw)


@pytest.mark.parametrize(
    ("rates", "message", "hint"),
    [
        ({"f32": 1, "f16": 1, "i8": 1, "int8": 1}, "unknown type `core.matrix.macs_per_cycle.int8`", "did you mean `i8`?"),
        ({"f32": 1, "f16": 1}, "`core.matrix.macs_per_cycle.i8` is missing", "types are f32, f16, i8"),
    ],
)  # fmt: skip
def test_the_array_has_a_rate_for_each_type_and_for_no_other(
    raw: Any, rates: dict[str, int], message: str, hint: str
) -> None:
    raw["core"]["matrix"]["macs_per_cycle"] = rates
    with pytest.raises(UserError) as caught:
        parse_target(raw)
    assert message in caught.value.message
    assert caught.value.hint == hint


@pytest.mark.parametrize("name", ["my machine", "", "a\tb"])
def test_a_name_that_is_not_one_word_is_refused_as_schedules_could_not_be_read_back(raw: Any, name: str) -> None:
    raw["name"] = name
    with pytest.raises(UserError, match="name = "):
        parse_target(raw)


def test_an_alignment_that_schedules_do_not_have_is_refused(raw: Any) -> None:
    raw["core"]["sram"]["align"] = 128
    with pytest.raises(UserError, match=r"core\.sram\.align = 128, but slots of schedules start at 64s"):
        parse_target(raw)


def test_a_dma_that_cannot_hide_the_latency_is_refused(raw: Any) -> None:
    """Little's law: 8 cores x 1 request x 64 bytes is less than 300 cycles x 58.88 bytes a cycle."""
    raw["core"]["dma"] |= {"max_outstanding": 1, "chunk": 64}
    with pytest.raises(UserError, match="512 bytes in flight cannot hide 300 cycles"):
        parse_target(raw)


def test_a_file_can_be_given_by_path(tmp_path: Path, raw: Any) -> None:
    path = tmp_path / "mine.yaml"
    raw["name"] = "mine"
    with path.open("w", encoding="utf-8") as stream:
        YAML().dump(raw, stream)
    assert load_target(path).name == "mine"


def test_an_overlay_changes_one_number_which_then_counts_as_assumed() -> None:
    target = load_target("vacc-reference")
    changed = overlay(target, {"ddr.bytes_per_cycle": 200, "clock_mhz": 1000})
    assert (changed.die.ddr.bytes_per_cycle, changed.clock_mhz) == (200, 1000)
    assert changed.name == "vacc-reference+ddr.bytes_per_cycle=200,clock_mhz=1000"
    assert changed.numbers_from["clock_mhz"] == "assumed"
    assert changed.sha != target.sha
    assert overlay(target, {}) is target
    assert load_target("vacc-reference") == target


@pytest.mark.parametrize("name", target_names())
def test_the_file_that_a_machine_writes_is_that_machine(name: str, tmp_path: Path) -> None:
    """Every number with its provenance, and no links as no links; of a changed one too."""
    for number, target in enumerate((load_target(name), overlay(load_target(name), {"ddr.bytes_per_cycle": 72.5}))):
        path = tmp_path / f"{number}.yaml"
        path.write_text(target.to_yaml(), encoding="utf-8")
        assert load_target(path) == target
        assert load_target(path).sha == target.sha


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"ddr.bandwidth": 1}, "has no number `ddr.bandwidth`", "ddr"),
        ({"bytes": 1}, "`bytes` is one of several numbers", "core.matrix.acc.bytes or core.sram.bytes"),
        ({"die.cores": 0}, "die.cores = 0", None),
        ({"ddr.latency": 10**9}, "cannot hide", "core.dma.chunk"),
        ({"sram.banks": 7}, "are not 7 equal banks", "core.sram.banks"),
        ({"sram.banks": 0}, "core.sram.banks = 0", None),
        ({"links": 1}, "has no number `links`", None),
    ],
)
def test_an_overlay_that_makes_no_machine_is_refused(changes: dict[str, int], message: str, hint: str | None) -> None:
    with pytest.raises(UserError) as caught:
        overlay(load_target("vacc-reference"), changes)
    assert message in str(caught.value)
    assert hint is None or hint in str(caught.value.hint)

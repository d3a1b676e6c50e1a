"""Every model family, exported unmodified, is recognized whole and computes what torch computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from vacc_opt.frontends.families import FAMILIES, Structure, structures
from vacc_opt.tests.families.checks import assert_all, assert_half
from vacc_opt.tests.families.harness import build

# one of each structure that differs in kind; the rest differ in sizes and are run by `make test-full`
DISTINCT = {
    "llama3-2", "mistral-2", "qwen2-1", "qwen3-1", "gemma-1", "phi-1", "phi-2", "falcon", "stablelm-1", "stablelm-2",
    "chatglm2", "chatglm4-1", "internlm2", "internlm3", "baichuan2-1", "baichuan2-2", "aquila-2", "mobillama-1",
}  # fmt: skip


def cases() -> list[object]:
    return [
        pytest.param(
            one, form, id=f"{name}, {form}", marks=[] if (name in DISTINCT and form == "sdpa") else pytest.mark.full
        )
        for name, one in structures()
        for form in ("eager", "sdpa")
    ]


def test_there_are_27_families_and_no_name_twice() -> None:
    assert len(FAMILIES) == len({family.name for family in FAMILIES}) == 27
    assert {name for name, _ in structures()} >= DISTINCT


@pytest.mark.parametrize(("structure", "form"), cases())
def test_a_family_is_recognized_whole_and_computes_what_torch_computes(
    structure: Structure, form: str, tmp_path: Path
) -> None:
    case = build(structure, form, tmp_path)
    assert_all(case)
    assert_half(case)

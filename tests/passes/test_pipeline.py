"""Pipeline text: options, nesting, presets, ordering, and errors with a caret."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vacc_opt.ir import UserError
from vacc_opt.passes.fuse.fuse_rms_norm import FuseRmsNorm
from vacc_opt.passes.infra.base import Pass
from vacc_opt.passes.infra.pipeline import Item, dump_pipeline, parse_pipeline
from vacc_opt.passes.infra.presets import PRESETS
from vacc_opt.passes.infra.scopes import Decode, Fixpoint, Functions, Prefill
from vacc_opt.passes.quantize.w8a16 import W8A16
from vacc_opt.passes.shard.split_tp import SplitTp
from vacc_opt.passes.simplify.simplify import Simplify


def test_names_and_options_become_passes() -> None:
    text = " simplify , fuse-rms-norm{expect=5, max-eps=1e-4},w8a16{lm_head=true,include=proj},split-tp{tp=3} "
    assert parse_pipeline(text) == [
        Simplify(),
        FuseRmsNorm(expect=5, max_eps=1e-4),
        W8A16(lm_head=True, include="proj"),
        SplitTp(tp=3),
    ]


def test_none_and_quoted_text_are_values() -> None:
    assert parse_pipeline("fuse-rms-norm{expect=none}") == [FuseRmsNorm()]
    assert parse_pipeline('w8a16{include="q_proj|{2,3}",exclude=""}') == [W8A16(include="q_proj|{2,3}")]


@given(st.booleans(), st.text("ab,{} =|.\\", max_size=8), st.integers(0, 99), st.floats(1e-9, 1))
def test_a_dump_reads_back_as_the_same_passes(flag: bool, text: str, number: int, eps: float) -> None:
    passes: list[Item] = [W8A16(lm_head=flag, include=text, logits="none"), FuseRmsNorm(expect=number, max_eps=eps)]
    assert parse_pipeline(dump_pipeline(passes)) == passes


def test_a_dump_leaves_defaults_out() -> None:
    assert (
        dump_pipeline(parse_pipeline("simplify,fuse-gqa{expect=2},split-tp{tp=1}"))
        == "simplify,fuse-gqa{expect=2},split-tp"
    )


WRONG = [
    ("simplfy", "column 1: unknown pass 'simplfy'", "^ did you mean `simplify`?"),
    ("simplify,fuse-gpa", "column 10: unknown pass 'fuse-gpa'", "^ did you mean `fuse-gqa`?"),
    ("simplify,,legalize", "column 10: a pass name is expected here", "^"),
    ("simplify,", "column 10: a pass name is expected here", "^"),
    ("", "column 1: a pass name is expected here", "^"),
    ("split-tp{tpp=2}", "column 10: 'split-tp' has no option 'tpp'", "^ did you mean `tp`?"),
    ("split-tp{tp=two}", "column 13: option 'tp' of 'split-tp' takes int, not 'two'", "^ number of ranks"),
    ("w8a16{lm_head=maybe}", "column 15: option 'lm_head' of 'w8a16' takes bool, not 'maybe'", "^ quantize the layer"),
    ("split-tp{tp}", "column 10: an option of 'split-tp' is expected here, as name=value", "^"),
    ("split-tp{}", "column 10: an option of 'split-tp' is expected here", "^"),
    ("split-tp{tp=2", "column 14: ',' or '}' is expected here", "^"),
    ("split-tp{tp=2} simplify", "column 16: ',' or the end is expected here", "^"),
    ("fixpoint", "column 9: '(' is expected here: 'fixpoint' holds passes, as fixpoint(simplify)", "^"),
    ("fixpoint(simplify", "column 18: ',' or ')' is expected here", "^"),
    ("fixpont(simplify)", "column 1: unknown pass 'fixpont'", "^ did you mean `fixpoint`?"),
    ("vacc-defualt", "column 1: unknown pass 'vacc-defualt'", "^ did you mean `vacc-default`?"),
    ("vacc-default{ctx=2}", "column 14: 'vacc-default' has no option 'ctx'", "^"),
    ("simplify{x=1}", "column 10: 'simplify' has no option 'x'", "^ 'simplify' takes none"),
    ("split-tp,w8a16", "column 10: 'w8a16' must come before 'split-tp'", "^ move it before split-tp"),
    ("kv-cache,fuse-gqa", "column 10: 'kv-cache' must come after 'fuse-gqa'", "^ move kv-cache behind"),
    ("prefill{seq=8}(simplify),legalize", "column 26: 'legalize' runs on a graph that 'prefill'", "^ put it before"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message", "hint"), WRONG, ids=[w[0] or "empty" for w in WRONG])
def test_an_error_has_a_caret_under_its_place(text: str, message: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        parse_pipeline(text)
    assert error.value.message.startswith(f"pipeline, {message}")
    assert error.value.hint is not None
    shown, caret = error.value.hint.split("\n")
    assert shown == text
    column = int(message.split()[1].rstrip(":"))
    assert caret.index("^") - 2 == column - 1
    assert caret.strip().startswith(hint)


def test_scopes_nest_passes_and_each_other() -> None:
    text = "fixpoint{max_rounds=3}(simplify,fixpoint(fuse-rms-norm)),function{match=Layer}(simplify),prefill{seq=64}(simplify)"
    assert parse_pipeline(text) == [
        Fixpoint(max_rounds=3, body=(Simplify(), Fixpoint(body=(FuseRmsNorm(),)))),
        Functions(match="Layer", body=(Simplify(),)),
        Prefill(seq=64, body=(Simplify(),)),
    ]
    assert dump_pipeline(parse_pipeline(text)) == text


def test_both_phases_may_follow_one_graph() -> None:
    items = parse_pipeline("simplify,prefill{seq=8}(simplify),decode(simplify),prefill(fuse-rms-norm)")
    assert [type(i) for i in items] == [Simplify, Prefill, Decode, Prefill]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_stands_for_passes(name: str) -> None:
    items = parse_pipeline(name)
    assert len(items) > 1
    assert all(isinstance(item, Pass) for item in items)
    assert parse_pipeline(dump_pipeline(items)) == items


def test_a_preset_hands_its_options_on() -> None:
    text = dump_pipeline(parse_pipeline("vacc-kv8{scales=kv.safetensors,context=256,tp=3}"))
    for part in ("fuse-rotary{positions=256}", "kv-cache{context=256}", "kv8{scales=kv.safetensors}", "split-tp{tp=3}"):
        assert part in text


def test_an_order_is_checked_inside_scopes_and_presets_too() -> None:
    with pytest.raises(UserError, match="column 26: 'split-packed-linear' must come before 'split-tp'") as error:
        parse_pipeline("fixpoint(split-tp{tp=2}),vacc-default")
    assert error.value.hint is not None


@given(st.text('ab,{}"\\\\ =', max_size=8))
def test_any_text_is_an_option(text: str) -> None:
    items = [Functions(match=text, body=(W8A16(include=text),))]
    assert parse_pipeline(dump_pipeline(items)) == items

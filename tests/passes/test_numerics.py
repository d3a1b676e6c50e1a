"""--check-numerics: planted bugs are caught and named down to the value, and right passes are left alone."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vacc_opt.ir import CheckError, Graph, Literal, Source, UserError
from vacc_opt.ir.storage import write_safetensors
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.passes.infra.base import Pass
from vacc_opt.passes.infra.check.numerics import CheckNumerics, NumericMismatch
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.pipeline import Item, parse_pipeline
from vacc_opt.passes.infra.scopes import Functions
from vacc_opt.passes.legalize.kv_cache import KvCache
from vacc_opt.tests.passes import planted
from vacc_opt.tests.passes.decoder import KV, WIDTH, decoder


def checked(graph: Graph, items: Sequence[Item] | str, **options: Any) -> CheckNumerics:
    check = CheckNumerics(**options)
    run_pipeline(graph, items, instruments=[check])
    return check


def caught(graph: Graph, item: Pass, **options: Any) -> NumericMismatch:
    before = to_text(graph)
    with pytest.raises(NumericMismatch) as error:
        checked(graph, [item], **options)
    assert to_text(graph) == before
    return error.value


def test_a_bug_at_one_application_is_named_down_to_the_value() -> None:
    error = caught(planted.chain(), planted.WrongAt(at=7))
    assert error.application is not None
    assert (error.application.index, error.application.root) == (7, "n6")
    assert error.difference is not None
    assert error.difference.name == "n6_Sub"
    # 1e-4 on numbers of about 1, whose spacing is 6e-8 to 2.4e-7
    assert error.difference.error == pytest.approx(1e-4, abs=3e-7)
    lines = str(error).splitlines()
    assert lines[0].startswith("wrong-at: an exact pass, but y differs by 0.003")
    assert lines[1] == "  first wrong at application 7 of 20: n6 [layers.6 model.py:16]"
    assert lines[2].startswith("  first value that differs: n6_Sub differs by 0.0001 on a scale of ")
    assert lines[2].endswith("[layers.6 model.py:16]")
    assert "    - n6: float[batch,32] = Neg(n5_Sub)" in str(error)
    assert "    + n6_Sub: float[batch,32] = Sub(1e-04, n5_Sub)" in str(error)


@pytest.mark.parametrize("at", [1, 2, 19, 20])
def test_the_first_and_the_last_application_are_found_too(at: int) -> None:
    error = caught(planted.chain(), planted.WrongAt(at=at))
    assert error.application is not None
    assert error.application.index == at


def test_a_right_pass_passes() -> None:
    check = checked(planted.chain(), [planted.SubtractFromZero()])
    assert [one.sentence.split(";")[0] for one in check.checked] == ["equal bit for bit in 1 output"]


def test_a_wrong_scale_is_wrong_from_the_first_application() -> None:
    error = caught(planted.chain(), planted.WrongScale())
    assert error.application is not None
    assert error.application.index == 1
    assert "a reassociating pass, but y differs by" in error.message


def test_a_tolerance_of_a_person_takes_the_place_of_ours() -> None:
    # 20 factors of 1.001
    check = checked(planted.chain(), [planted.WrongScale()], tolerance=0.03)
    assert "off by" in check.checked[0].sentence
    caught(planted.chain(), planted.WrongScale(), tolerance=0.01)


def chaotic(steps: int = 12) -> Graph:
    """The logistic map 4 x (1 - x), which doubles an error at every step."""
    lines = ["s = Sigmoid (x)", "third = Div (s, three)", "x0 = Add (third, third)"]
    for i in range(steps):
        lines += [f"r{i} = Sub (one, x{i})", f"p{i} = Mul (x{i}, r{i})", f"x{i + 1} = Mul (p{i}, four)"]
    head = "g (float[N,64] x) => (float[N,64] y) <float one = {1}, float three = {3}, float four = {4}>"
    return from_text("\n".join([head, "{", *lines, f"y = Sin (x{steps})", "}"]))


def test_a_model_that_amplifies_rounding_is_given_what_its_own_rounding_does() -> None:
    sentence = checked(chaotic(), [planted.ThirdByProduct()]).checked[0].sentence
    assert sentence.startswith("off by ")
    assert "allowed (8 x what rounding its weights does)" in sentence
    error = caught(chaotic(), planted.ThirdByProduct(wrong=True))
    assert error.difference is not None
    assert error.difference.name == "third_Mul"
    caught(chaotic(), planted.ThirdByProduct(), tolerance=1e-5)  # a person's own tolerance is what counts


def test_swapped_operands_are_caught() -> None:
    graph = from_text("g (float[N,4] x, float[N,4] z) => (float[N,4] y) { d = Sub (x, z) y = Abs (d) }")
    error = caught(
        from_text("g (float[N,4] x, float[N,4] z) => (float[N,4] y) { d = Sub (x, z) y = Exp (d) }"), planted.Swapped()
    )
    assert error.difference is not None
    assert error.difference.name == "d_Sub"
    # abs hides the sign: the outputs are what counts
    assert checked(graph, [planted.Swapped()]).checked[0].compared


def test_a_value_that_turns_nan_is_named() -> None:
    graph = from_text("g (float[N,4] x) => (float[N,4] y) { a = Abs (x) y = Exp (a) }")
    error = caught(graph, planted.NanMaker())
    assert error.difference is not None
    assert "first value that differs: a_Mul turns NaN; at [" in str(error)


def test_nan_that_no_output_shows_is_reported() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { a = Abs (x) b = ReduceMax (a) m = Less (b, b) y = Where (m, b, x) }"
    check = checked(from_text(text), [planted.NanMaker()])
    assert "NaN appears, first in a_Sqrt" in check.checked[0].sentence


def test_a_model_that_gives_nan_itself_is_no_mismatch() -> None:
    graph = from_text("g (float[N,4] x) => (float[N,4] y) { a = Log (x) y = Neg (a) }")
    check = checked(graph, [planted.SubtractFromZero()])
    assert "equal bit for bit" in check.checked[0].sentence
    assert "appears" not in check.checked[0].sentence


def test_a_bug_that_only_padding_shows_is_caught() -> None:
    error = caught(decoder(), planted.DropsPadding())
    assert error.difference is not None
    assert error.difference.name == "hidden_Or"
    assert "drops-padding: an exact pass, but logits differs by" in error.message


def test_a_lost_output_is_caught() -> None:
    graph = from_text("g (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Neg (x) z = Abs (x) }")
    with pytest.raises(NumericMismatch) as error:  # the verifier would have seen it first
        run_pipeline(graph, [planted.DropsAnOutput()], instruments=[CheckNumerics()], verify_each=False)
    assert error.value.message == "drops-an-output: an exact pass, but the output 'y' is gone"


def test_a_wrong_scale_of_a_quantized_weight_is_found_by_the_definition() -> None:
    error = caught(decoder(), planted.WrongCodes(weight="wu"))
    assert error.application is not None
    assert error.application.root == "u"
    assert error.message.startswith("wrong-codes: a lossy pass with a definition, but logits differs by")


PIPELINE = (
    "simplify,slice-last-token,kv-cache{context=32},w8a16,kv8{scales=SCALES,new_tokens=NEW},split-tp{tp=TP},legalize"
)


@pytest.mark.parametrize(("tp", "new_tokens"), [(1, "quantized"), (2, "float"), (5, "quantized")])
def test_every_pass_of_the_main_job_keeps_its_promise(tmp_path: Path, tp: int, new_tokens: str) -> None:
    stored = {f"layers.0.{w}.scale": Literal(np.full((KV, WIDTH), 0.03, np.float32)) for w in ("key", "value")}
    zeros = np.linspace(-0.2, 0.2, KV * WIDTH, dtype=np.float32).reshape(KV, WIDTH)
    stored |= {f"layers.0.{w}.zero": Literal(zeros) for w in ("key", "value")}
    write_safetensors(tmp_path / "kv.safetensors", stored)
    text = (
        PIPELINE.replace("SCALES", str(tmp_path / "kv.safetensors")).replace("TP", str(tp)).replace("NEW", new_tokens)
    )
    check = checked(decoder(), f"{text},expand-ranks")
    assert [one.step.item.name for one in check.checked if not one.compared] == []
    sentences = {one.step.item.name: one.sentence for one in check.checked}
    assert "dB" in sentences["kv8"]
    assert sentences["w8a16"].startswith("by its definition off by ")
    assert sentences["legalize"].startswith("equal bit for bit" if tp > 1 else "")


def test_the_default_pipeline_keeps_the_values_of_an_exported_llama(eager_llama: Any) -> None:
    check = checked(eager_llama.fresh(), "vacc-default{context=64,tp=3}")
    assert check.weights_used == "real"
    assert len(check.checked) >= 10
    assert [str(one.step) for one in check.checked if not one.compared] == []
    assert not any("appears" in one.sentence for one in check.checked)


def test_half_precision_has_no_definition_and_its_loss_is_told() -> None:
    sentence = checked(decoder(), "simplify,cast-float").checked[-1].sentence
    assert sentence.startswith("no definition to compare with; it loses 0.00")
    assert " dB; values in [" in sentence


def test_an_exact_pass_on_half_precision_is_given_what_onnxruntime_rounds() -> None:
    """Mul and Tanh have no fp16 kernel: without the Identity between them, their value stays fp32 there."""
    text = "g (float16[9,9] x) => (y) { m = Mul (x, c) i = Identity (m) y = Tanh (i) }"
    graph = from_text(f'{text}\n# const "c" = {Literal(np.array(0.3, np.float16))}\n')
    check = CheckNumerics()
    run_pipeline(graph, "simplify", instruments=[check])
    assert graph.op_counts() == {"Mul": 1, "Tanh": 1}
    assert check.checked[0].compared


def test_bfloat16_which_onnxruntime_cannot_run_is_told_and_not_skipped() -> None:
    found = checked(decoder(), "simplify,cast-float{to=bfloat16}").checked[-1]
    assert not found.compared
    assert found.sentence.startswith("not compared: onnxruntime ")


def test_an_interface_pass_without_an_adapter_is_told_and_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KvCache, "adapter", Pass.adapter)
    found = checked(decoder(), "simplify,kv-cache{context=32},w8a16").checked
    assert found[1].sentence == "not compared: the pass changes the interface and ships no adapter"
    assert found[2].compared  # the next pass is held against a call of the new interface


def test_a_pass_that_changes_nothing_costs_no_run() -> None:
    assert checked(planted.chain(), [planted.Swapped()]).checked[0].sentence == "nothing changed"


def missing(layers: int = 2, width: int = 64) -> Graph:
    """Linear layers over weights that lie at 1 TB into a file that does not exist."""
    lines = [f"h{i + 1} = MatMul (h{i}, w{i})" for i in range(layers)]
    text = "\n".join(["h0 = Neg (x)", *lines, f"y = Tanh (h{layers})"])
    consts = [
        f'# const "w{i}" = {Source("/nowhere/model.bin", (1 << 40) + i, "float", (width, width))}\n'
        for i in range(layers)
    ]
    return from_text(f"g (float[B,{width}] x) => (float[B,{width}] y) {{\n{text}\n}}\n{''.join(consts)}")


def test_weights_that_cannot_be_read_are_replaced_by_seeded_ones() -> None:
    check = checked(missing(), [planted.SubtractFromZero()], weights="auto")
    assert check.weights_used == "seeded"
    assert check.checked[0].compared
    caught(missing(), planted.WrongAt(at=1))


def test_codes_and_scales_of_seeded_weights_belong_together() -> None:
    assert checked(missing(), "w8a16{logits=none}").checked[0].sentence.startswith("by its definition off by ")


def test_real_weights_that_are_not_there_are_refused_when_asked_for() -> None:
    with pytest.raises(UserError, match=r"/nowhere/model\.bin: the weights are not there\n  check with seeded"):
        checked(missing(), "simplify", weights="real")


def test_the_weights_of_one_layer_are_held_at_a_time() -> None:
    """16 layers of 1 MiB: a check by layers of 1 MiB holds a few of them, not all."""
    graph = missing(16, 512)
    checked(missing(1, 512), [planted.SubtractFromZero()])  # what is made once and kept
    tracemalloc.start()
    checked(graph, [planted.SubtractFromZero()], layer_bytes=1 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # the layer, a copy that numpy makes of it on the way, and the arrays of a call
    assert peak < 5 << 20


def test_a_piece_of_layers_computes_what_the_whole_does() -> None:
    from vacc_opt.passes.infra.check.calls import seeded_call
    from vacc_opt.passes.infra.check.layerwise import Layerwise

    graph = decoder()
    call = seeded_call(graph)
    whole = Layerwise(layer_bytes=1 << 30).run(graph, call)[0]
    pieces = Layerwise(layer_bytes=1).run(graph, call)[0]
    for name, expected in whole.items():
        np.testing.assert_array_equal(pieces[name], expected)


def test_the_same_seed_finds_the_same_and_another_seed_other_numbers() -> None:
    first, again, other = (caught(planted.chain(), planted.WrongAt(), seed=seed).message for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_sizes_of_a_person_are_used() -> None:
    from vacc_opt.passes.infra.check.calls import seeded_call

    call = seeded_call(decoder(), {"batch": 4, "seq": 3})
    assert call.shared["input_ids"].shape == (4, 3)
    assert call.shared["attention_mask"].shape == (4, 8)


def test_inputs_mean_something() -> None:
    from vacc_opt.passes.infra.check.calls import seeded_call

    call = seeded_call(decoder()).shared
    assert call["attention_mask"].sum(axis=1).tolist() == [9, 12]  # 3 of 5 past tokens of the first row are padding
    assert call["position_ids"][:, 0].tolist() == [2, 5]
    assert call["input_ids"].max() < 40
    graph = decoder()
    run_pipeline(graph, [KvCache(context=32)])
    call = seeded_call(graph).shared
    assert (call["pos"].tolist(), call["valid"].tolist()) == ([2, 5], [5, 7])
    buffer = call["past_key_values.0.key"]
    assert (buffer[0, :, 2:] == 7).all()
    assert (buffer[1, :, :5] != 7).all()


@pytest.mark.parametrize(
    ("options", "message"), [({"weights": "all"}, "weights are 'all'"), ({"tolerance": 0.0}, "is 0")]
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CheckNumerics(**options)


def test_an_error_of_a_pass_is_not_taken_for_a_mismatch() -> None:
    with pytest.raises(CheckError, match="raises-at: cannot rewrite n4"):
        checked(planted.chain(), [planted.RaisesAt(check=True)])


def test_passes_inside_a_phase_are_checked_on_its_sizes() -> None:
    items = parse_pipeline(
        "simplify,slice-last-token,kv-cache{context=32},prefill{seq=4}(w8a16,legalize),decode(w8a16)"
    )
    check = checked(decoder(), items)
    assert [f"{one.step.scope} {one.step.item.name}".strip() for one in check.checked if one.compared] == [
        "simplify", "slice-last-token", "kv-cache", "prefill w8a16", "prefill legalize", "decode w8a16",
    ]  # fmt: skip


def test_bodies_of_functions_are_checked_as_graphs_of_their_own() -> None:
    import onnx

    from vacc_opt.ir import from_onnx

    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 23, "local": 1]> g (float[N,4] x) => (float[N,4] y) { a = local.f(x) y = Neg(a) }'
        '<domain: "local", opset_import: ["": 23]> f (p) => (q) { n = Neg(p) q = Tanh(n) }'
    )
    found = checked(
        from_onnx(model), [Functions(body=(planted.SubtractFromZero(),)), planted.SubtractFromZero()]
    ).checked
    assert [(one.step.scope, one.compared) for one in found] == [("local::f", True), ("", True)]
    with pytest.raises(NumericMismatch, match=r"local::f: wrong-at\{at=1\}: an exact pass, but q differs"):
        checked(from_onnx(model), [Functions(body=(planted.WrongAt(at=1),))])


def test_a_graph_that_onnxruntime_cannot_run_is_told_and_checked_from_where_it_can() -> None:
    graph = from_text("g (float[N,4] x) => (float[N,4] y) { a = Neg (x) y = Exp (a) }")
    node = graph.nodes()[0]
    node.attributes = {"alpha": 3.0}  # no attribute of Neg
    check = CheckNumerics()
    with pytest.raises(NumericMismatch, match="swapped: an exact pass, but y differs"):
        run_pipeline(graph, [planted.SubtractFromZero(), planted.Swapped()], instruments=[check])
    assert not check.checked[0].compared
    assert check.checked[0].sentence.startswith("not compared: onnxruntime does not load the graph: ")

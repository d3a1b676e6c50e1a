"""explain: every node and call of an artifact leads to source lines, passes and checkpoint tensors, from the artifact alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vacc_opt.cli.main import main
from vacc_opt.ir import DType
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.provenance import Origin
from vacc_opt.passes.infra.registry import all_passes
from vacc_opt.runtime.artifact import Artifact
from vacc_opt.runtime.explain import Explainer, Explanation, explain, explainers
from vacc_opt.runtime.explain_text import explanation_text

NODE = """\
  node      mul_428_RMSNormalization_AddRMSNormalization  Vastai::AddRMSNormalization  float16[1,16,64], float16[1,16,64]
  passes    fuse-rms-norm > cast-float > fuse-residual-norm
  from      model.layers.1.input_layernorm  modeling_llama.py:LINE  aten.mul
            model.layers.1.input_layernorm  modeling_llama.py:LINE  aten.mul, aten.rsqrt, aten.add
            model.layers.1.input_layernorm  modeling_llama.py:LINE  aten.mean, aten.pow
            model.layers.0  modeling_llama.py:LINE  aten.add
"""
WEIGHT = """\
  weight    model.layers.1.input_layernorm.weight  float16[64]
    is        float16(model.layers.1.input_layernorm.weight)
    passes    cast-float
    from      model.layers.1.input_layernorm.weight  model.safetensors:model.layers.1.input_layernorm.weight  float[64]
"""
LINEAR = f"""\
call 10: linear_w8+residual+all_reduce.9 of prefill, rank 1
{NODE}  with      linear_6_QuantizedLinearPerChannel_AllReduce  Vastai::AllReduce  w8a16 > cast-float > split-tp
              model.layers.0.mlp.down_proj  modeling_llama.py:LINE  aten.linear
  with      linear_6_QuantizedLinearPerChannel  Vastai::QuantizedLinearPerChannel  w8a16 > cast-float > split-tp
              model.layers.0.mlp.down_proj  modeling_llama.py:LINE  aten.linear
              model.layers.0.mlp.down_proj.qweight  int8[64,48] = codes(model.layers.0.mlp.down_proj.weight)[:, 48:96]
              model.layers.0.mlp.down_proj.scale  float[64] = scales(model.layers.0.mlp.down_proj.weight)
"""


def text(found: Explanation) -> str:
    """As printed, without the line numbers of the installed transformers."""
    return re.sub(r"\.py:\d+", ".py:LINE", explanation_text(found))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("kind", ["artifact", "plain"])
def test_all_nodes_and_all_calls_are_traced(kind: str, phase: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind).path
    (model,) = explainers(path, phase)
    assert model.program is not None
    found = [model.find(node.output.name) for node in model.graph.nodes()]
    found += [model.find(f"call {call.index}") for call in model.program.calls]
    found += [model.find(value.name) for value in model.graph.constants()]
    assert len(found) > len(model.program.calls) > 20
    for one in found:
        assert one is not None
        assert one.nodes or one.weights
        for fact in (*one.nodes, *one.weights):
            # a line of code, or a tensor of a file
            assert any(re.search(r"\.py:\d+$|\.safetensors:\S+$", origin.source) for origin in fact.origins), fact
            assert set(fact.passes) <= all_passes().keys()


def test_every_part_of_the_model_is_found_under_its_path(artifact: Artifact) -> None:
    (model,) = explainers(artifact.path, "decode")
    for layer in (0, 1):
        part = model.find(f"model.layers.{layer}")
        assert part is not None
        kernels = {call.kernel.partition(".")[0] for call in part.calls}
        assert kernels == {
            "rms_norm", "linear_w8", "linear_w8+rotary", "attention_i8", "linear_w8+residual+all_reduce",
            "linear_w8+swiglu", "kv_append_i8",
        }  # fmt: skip
        assert len([w for w in part.weights if w.name.endswith("qweight")]) == 7


def test_a_call_is_explained_down_to_the_slice_of_the_checkpoint(artifact: Artifact) -> None:
    assert text(explain(artifact.path, "call 10", rank=1)) == LINEAR
    assert text(explain(artifact.path, "#10", rank=1)) == LINEAR


def test_of_a_node_that_takes_two_calls_each_lists_the_weights_that_it_reads(artifact: Artifact) -> None:
    """The sum is made behind the linear (call 10), the norm of it by a call of its own, which reads the weight."""
    added, normed = (explain(artifact.path, f"call {index}").nodes[0] for index in (10, 11))
    assert added.name == normed.name
    assert not added.weights
    assert [weight.name for weight in normed.weights] == ["model.layers.1.input_layernorm.weight"]


def test_the_same_node_is_found_by_name_and_by_call_and_says_its_call(artifact: Artifact) -> None:
    name = "mul_428_RMSNormalization_AddRMSNormalization"
    by_name = explain(artifact.path, name, rank=1)
    assert text(by_name).splitlines()[:3] == [
        f"{name}: node of prefill, rank 1",
        "  call      10  linear_w8+residual+all_reduce.9",  # its sum
        "            11  rms_norm.2",
    ]
    head, rest = text(by_name).split(NODE)
    assert len(head.splitlines()) == 3
    assert rest == WEIGHT
    reduced = text(explain(artifact.path, "linear_6_QuantizedLinearPerChannel_AllReduce", rank=1)).splitlines()
    assert reduced[1] == "  inside    10  linear_w8+residual+all_reduce.9"


def test_what_a_kernel_does_inside_is_listed_with_its_weights(artifact: Artifact) -> None:
    found = explain(artifact.path, "call 6", phase="decode")
    assert [node.op for node in found.nodes] == ["Attention", *("TensorScatter", "Vastai::DequantizeKV") * 2]
    assert "past_key_values.0.key.scale  float[1,16]" in text(found)
    assert found.nodes[1].becomes == "done inside"
    name = found.nodes[1].name
    assert "  inside    6  attention_i8.6\n" in text(explain(artifact.path, name, phase="decode"))


def test_what_needs_no_call_says_why(artifact: Artifact) -> None:
    (model,) = explainers(artifact.path, "prefill")
    indices = [n.output.name for n in model.graph.nodes() if n.output.type.dtype is DType.INT64]
    assert indices
    for name in indices:
        assert explain(artifact.path, name).nodes[0].becomes == "run-time scalars of calls"
    assert "call      none: strides of an output" in text(explain(artifact.path, "logits"))


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.qweight", "model.embed_tokens.weight"]
)
def test_a_weight_is_found_by_its_name_here_and_in_the_checkpoint(name: str, artifact: Artifact) -> None:
    found = explain(artifact.path, name)
    assert found.kind == "weight"
    assert all(w.origins[0].source.startswith("model.safetensors:model.") for w in found.weights)
    assert all(w.readers and "split-tp" in w.passes for w in found.weights)


def test_an_input_says_who_reads_it(artifact: Artifact) -> None:
    assert "  read by   embedding_EmbeddingShard  Vastai::EmbeddingShard\n" in text(explain(artifact.path, "input_ids"))


def test_a_long_list_ends_in_a_count(artifact: Artifact) -> None:
    lines = text(explain(artifact.path, "model")).splitlines()
    assert len(lines) < 45  # a screen
    assert any(re.fullmatch(r" +and \d+ more; --json lists all", line) for line in lines)


@pytest.mark.parametrize(
    ("subject", "options", "message", "hint"),
    [
        ("linear_QuantizedLinearPerChanel", {}, "no 'linear_Quant", "did you mean `linear_QuantizedLinearPerChannel`?"),
        ("model.layers.0.self_atn", {"phase": "decode"}, " in decode", "did you mean `model.layers.0.self_attn`?"),
        (
            "frobnicate",
            {},
            "no 'frobnicate' in prefill, decode",
            "give a node, a value, a weight, a call such as `call 17`",
        ),
        ("call 99", {"phase": "decode"}, "no 'call 99' in decode", "calls are 0 to"),
        ("call 1", {"rank": 2}, "has no rank 2", "ranks are 0 to 1"),
        ("call 1", {"rank": -1}, "has no rank -1", "ranks are 0 to 1"),
        ("call 1", {"phase": "warmup"}, "has no phase 'warmup'", "choices: decode, prefill"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(
    subject: str, options: dict[str, str], message: str, hint: str, artifact: Artifact
) -> None:
    with pytest.raises(UserError) as caught:
        explain(artifact.path, subject, **options)  # type: ignore[arg-type]
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_call_that_prefill_lacks_is_looked_for_in_decode(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def shortened(path: Path, phase: str | None, rank: int | None) -> Iterator[Explainer]:
        prefill, decode = explainers(path, phase, rank)
        assert prefill.program is not None
        yield replace(prefill, program=replace(prefill.program, calls=prefill.program.calls[:2]))
        yield decode

    monkeypatch.setattr("vacc_opt.runtime.explain.explainers", shortened)
    assert explain(artifact.path, "call 1").model == "prefill, rank 0"
    assert explain(artifact.path, "call 2").model == "decode, rank 0"
    with pytest.raises(UserError, match="no 'call 999' in prefill, decode") as caught:
        explain(artifact.path, "call 999")
    assert re.fullmatch(r"calls are 0 to 1 in prefill, 0 to \d+ in decode", caught.value.hint or "")


def test_what_is_no_artifact_is_refused_in_one_line(
    artifact: Artifact, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "broken.onnx").write_bytes(b"\xff\xff\xff")
    damaged = tmp_path / "damaged"
    shutil.copytree(artifact.path, damaged)
    (damaged / "decode.schedule").write_text("schedule 1\n")
    for arguments, message in (
        ([tmp_path / "missing", "x"], "no such artifact directory"),
        ([tmp_path / "empty", "x"], "not an artifact: no manifest.json of ours"),
        ([tmp_path / "notes.txt", "x"], "notes.txt: not an artifact"),
        ([tmp_path / "broken.onnx", "x"], "broken.onnx: not an ONNX model"),
        ([exported.parent, "x"], "not an artifact"),
        ([damaged, "x"], "the file decode.schedule is damaged"),
        ([exported, "x", "--phase", "decode"], "--phase chooses among the graphs of an artifact"),
        ([exported, "x", "--rank", "0"], "--rank chooses among the graphs of an artifact"),
        ([exported, "call 1"], "model.onnx: has no calls"),
    ):
        assert main(["explain", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err.splitlines()[0]
        assert len(captured.err.splitlines()) == 2


def test_the_directory_of_an_onnx_file_is_answered_with_its_name(exported: Path) -> None:
    with pytest.raises(UserError, match="not an artifact") as caught:
        explain(exported.parent, "x")
    assert caught.value.hint == f"name one of its files, such as {exported}"


def test_files_that_opt_writes_are_explained_without_calls(exported: Path, tmp_path: Path) -> None:
    pipeline = "simplify,fuse-rms-norm,fuse-rotary{positions=64},fuse-gqa,w8a16"
    for suffix in (".onnx", ".vacc"):
        out = tmp_path / f"out{suffix}"
        assert main(["opt", str(exported), "-p", pipeline, "-o", str(out)]) == 0
        lines = text(explain(out, "linear_QuantizedLinearPerChannel")).splitlines()
        assert lines[0] == f"linear_QuantizedLinearPerChannel: node of out{suffix}"
        assert lines[2:4] == [
            "  passes    w8a16",
            "  from      model.layers.0.self_attn.q_proj  modeling_llama.py:LINE  aten.linear",
        ]
        assert "    is        codes(model.layers.0.self_attn.q_proj.weight)" in lines
        assert not explain(out, "model.layers.0").calls


def test_a_second_run_of_opt_goes_on_with_the_history(exported: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    pipeline = "simplify,fuse-rms-norm,fuse-rotary{positions=64},fuse-gqa,w8a16"
    assert main(["opt", str(exported), "-p", pipeline, "-o", str(first)]) == 0
    assert main(["opt", str(first), "-p", "cast-float", "-o", str(second)]) == 0
    node = explain(second, "linear_QuantizedLinearPerChannel").nodes[0]
    assert node.passes == ("w8a16", "cast-float")
    assert node.weights[0].formula == "codes(model.layers.0.self_attn.q_proj.weight)"
    assert node.weights[0].origins[0].source == "model.safetensors:model.layers.0.self_attn.q_proj.weight"


def test_of_a_split_text_the_rank_is_chosen(exported: Path, tmp_path: Path) -> None:
    pipeline = "simplify,fuse-rms-norm,fuse-rotary{positions=64},fuse-gqa,fuse-swiglu,split-tp{tp=2}"
    out = tmp_path / "split.vacc"
    assert main(["opt", str(exported), "-p", pipeline, "-o", str(out)]) == 0
    formulas = [explain(out, "model.layers.0.mlp.up_proj.weight", rank=rank).weights[0].formula for rank in (0, 1)]
    assert formulas == [f"model.layers.0.mlp.up_proj.weight[{rows}]" for rows in ("0:48", "48:96")]


def test_a_text_written_by_hand_has_its_names_for_origins(tmp_path: Path) -> None:
    file = tmp_path / "hand.vacc"
    file.write_text("g (float[4] x) => (float[4] y) { h = Neg (x) y = Exp (h) }\n")
    assert explain(file, "h").nodes[0].origins == (Origin("h", "", "Neg"),)


def test_a_schedule_that_cites_nodes_of_another_graph_is_refused(artifact: Artifact) -> None:
    (model,) = explainers(artifact.path, "decode")
    assert model.program is not None
    calls = (replace(model.program.calls[0], nodes=("elsewhere",)), *model.program.calls[1:])
    other = replace(model, program=replace(model.program, calls=calls))
    with pytest.raises(UserError, match="decode: call 0 does not name nodes of the graph"):
        other.find("call 0")


def test_the_command_prints_the_same_and_json_holds_everything(
    artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(artifact.path), "call 10", "--rank", "1"]) == 0
    assert re.sub(r"\.py:\d+", ".py:LINE", capsys.readouterr().out) == LINEAR
    assert main(["explain", str(artifact.path), "model", "--phase", "decode", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (model,) = explainers(artifact.path, "decode")
    assert found["kind"] == "module"
    assert {node["name"] for node in found["nodes"]} <= {node.output.name for node in model.graph.nodes()}
    assert len(found["nodes"]) > 24  # more than the text lists
    assert found["nodes"][0]["origins"][0]["source"].startswith("modeling_llama.py:")


def test_neither_torch_nor_onnxruntime_is_loaded(artifact: Artifact) -> None:
    code = (
        "import sys; from vacc_opt.cli.main import main; "
        f"assert main(['explain', {str(artifact.path)!r}, 'call 0']) == 0; "
        "assert not {'torch', 'onnxruntime', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

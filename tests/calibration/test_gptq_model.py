"""GPTQ over a model: layer by layer, resumable, spilled to disk if need be; and the pass that takes its codes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vacc_opt.calibration import gptq_model
from vacc_opt.calibration.gptq_model import LayerResult, Options, quantize_model
from vacc_opt.ir import Graph
from vacc_opt.ir.copy import copy
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.ir.storage import read_safetensors_header, write_safetensors
from vacc_opt.ir.tensor import Literal
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.testing import assert_close, run_pass
from vacc_opt.passes.quantize.w8a16 import W8A16
from vacc_opt.tests.passes.decoder import decoder, empty_past, growing_feeds

NAMES = ["wq", "wk", "wv", "wo", "wg", "wu", "wd"]


def feeds(count: int = 6, tokens: int = 40) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 40, (count, 1, tokens))
    return [growing_feeds(one, np.ones_like(one), empty_past(1)) for one in ids]


def quantized(graph: Graph, directory: Path, *, key: str = "k", **options: Any) -> tuple[Path, list[LayerResult]]:
    out = directory / "codes.safetensors"
    found = quantize_model(graph, feeds(), out, directory / "work", key, Options(threads=1, **options))
    return out, found


def output_error(graph: Graph, given: Sequence[dict[str, np.ndarray]]) -> float:
    """Mean square of what the logits are off the float model's."""
    float_model, other = Executable(decoder()), Executable(graph)
    apart = [float_model.run(one)[0]["logits"] - other.run(one)[0]["logits"] for one in given]
    return float(np.mean(np.square(apart)))


@pytest.mark.parametrize("sequential", [False, True])
def test_a_model_with_its_codes_is_nearer_to_the_float_one_than_with_rounding(sequential: bool, tmp_path: Path) -> None:
    path, layers = quantized(decoder(), tmp_path, true_sequential=sequential)
    assert [one.name for one in layers] == NAMES
    assert all(one.loss < one.rounding_loss for one in layers)
    solved, nearest = decoder(), decoder()
    run_pass(W8A16(codes=str(path)), solved)
    run_pass(W8A16(), nearest)
    assert output_error(solved, feeds()) < 0.6 * output_error(nearest, feeds())


def test_the_codes_of_the_graph_are_those_of_the_file(tmp_path: Path) -> None:
    path, _ = quantized(decoder(), tmp_path)
    graph = decoder()
    run_pass(W8A16(codes=str(path)), graph)
    stored = read_safetensors_header(path)
    for node in graph.by_op("QuantizedLinearPerChannel", "Vastai"):
        _, codes, scales = node.inputs
        assert codes is not None
        assert scales is not None
        assert codes.const == stored[codes.name.replace(".qweight", ".codes")]
        assert scales.const == stored[scales.name.replace(".scale", ".scales")]


def test_the_reference_of_given_codes_is_what_they_stand_for(tmp_path: Path) -> None:
    path, _ = quantized(decoder(), tmp_path)
    item, after = W8A16(codes=str(path)), decoder()
    run_pass(item, after)
    before = decoder()
    made = {node.output.name for node in before.by_op("MatMul") if node.output.name != "logits"}
    reference = item.reference(before, made)
    (given, *_) = feeds()
    expected, found = (Executable(g).run(given)[0]["logits"] for g in (reference, after))
    assert_close(found, expected, 1e-5)


def test_a_run_that_was_ended_continues_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, layers = quantized(decoder(), tmp_path / "whole")
    solved: list[tuple[int, ...]] = []
    solve = gptq_model.solve

    def counted(weight: np.ndarray, *args: Any, **options: Any) -> Any:
        solved.append(weight.shape)
        return solve(weight, *args, **options)

    def stop(done: int, of: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(gptq_model, "solve", counted)
    out, work = tmp_path / "part.safetensors", tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        quantize_model(decoder(), feeds(), out, work, "k", Options(threads=1, true_sequential=False), stop)
    assert not out.exists()
    assert len(solved) == 4
    again = quantize_model(decoder(), feeds(), out, work, "k", Options(threads=1))
    assert len(solved) == 7  # none was solved twice
    assert out.read_bytes() == whole.read_bytes()
    assert again == layers
    # another key means other text, weights or options: nothing of the old run is taken
    solved.clear()
    quantize_model(decoder(), feeds(), out, work, "other", Options(threads=1))
    assert len(solved) == 7


KILLED = """
import os, signal, sys
from pathlib import Path
from vacc_opt.tests.calibration.test_gptq_model import Options, decoder, feeds, quantize_model

def kill(done, of):
    if done == 4:
        os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
quantize_model(decoder(), feeds(), folder / "codes.safetensors", folder / "work", "k", Options(threads=1, true_sequential=True), kill)
"""


@pytest.mark.full
def test_a_process_that_was_killed_half_way_is_continued_and_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole, layers = quantized(decoder(), tmp_path / "whole", true_sequential=True)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(list((tmp_path / "work").glob("*.safetensors"))) == 4
    path, again = quantized(decoder(), tmp_path, true_sequential=True)
    assert path.read_bytes() == whole.read_bytes()
    assert again == layers


def test_activations_beyond_the_budget_go_to_files_and_change_nothing(tmp_path: Path) -> None:
    within, _ = quantized(decoder(), tmp_path / "within")
    beyond, _ = quantized(decoder(), tmp_path / "beyond", budget=0)
    assert within.read_bytes() == beyond.read_bytes()
    assert not list((tmp_path / "beyond").rglob("*.npy"))


def with_outlier() -> Graph:
    """A layer with a channel that takes all of a row's steps, and that no input ever reads."""
    weight = np.random.default_rng(0).standard_normal((16, 20)).astype(np.float32)
    weight[:, 0] = 300
    gate = np.random.default_rng(1).standard_normal((20, 16)).astype(np.float32)
    gate[0] = 0
    return decoder(wd=weight, wg=gate)


def test_a_layer_that_loses_much_stays_float_and_the_report_says_so(tmp_path: Path) -> None:
    path, layers = quantized(with_outlier(), tmp_path, keep_share=0.2)
    assert [one.name for one in layers if one.kept] == ["wd"]
    graph = with_outlier()
    record = run_pass(W8A16(codes=str(path)), graph)
    assert len(graph.by_op("QuantizedLinearPerChannel", "Vastai")) == 6
    (missed,) = [r.message for r in record.remarks if "stays float" in r.message]
    assert missed.startswith("wd stays float")
    assert not any(one.kept for one in quantized(with_outlier(), tmp_path / "none", keep_share=0.0)[1])


def test_codes_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    path, _ = quantized(decoder(), tmp_path)
    other = decoder(wo=np.ones((16, 48), np.float32))
    with pytest.raises(UserError, match=r"wo is another weight than the model's"):
        run_pass(W8A16(codes=str(path)), other)


def test_a_file_that_lacks_a_layer_or_is_of_something_else_is_refused(tmp_path: Path) -> None:
    path, _ = quantized(decoder(), tmp_path)
    tensors = {n: s for n, s in read_safetensors_header(path).items() if not n.startswith("wg.")}
    write_safetensors(tmp_path / "lacks.safetensors", tensors)
    with pytest.raises(UserError, match=r"lacks\.safetensors: no codes of wg"):
        run_pass(W8A16(codes=str(tmp_path / "lacks.safetensors")), decoder())
    write_safetensors(tmp_path / "else.safetensors", {"a": Literal(np.ones(2, np.float32))})
    with pytest.raises(UserError, match=r"holds no `\.\.\.\.mark`"):
        run_pass(W8A16(codes=str(tmp_path / "else.safetensors")), decoder())
    with pytest.raises(UserError, match="cannot read the weight file"):
        run_pass(W8A16(codes=str(tmp_path / "no.safetensors")), decoder())


def test_codes_are_split_over_ranks_like_any_others(tmp_path: Path) -> None:
    path, _ = quantized(decoder(), tmp_path)
    whole, split = decoder(), decoder()
    pipeline = f'kv-cache{{context=64}},w8a16{{codes="{path}"}}'
    run_pipeline(whole, pipeline)
    run_pipeline(split, f"{pipeline},split-tp{{tp=2}},expand-ranks")
    ids = feeds()[0]["input_ids"]
    one, two = (copy(graph) for graph in (whole, split))
    given = {"input_ids": ids, "pos": np.zeros(1, np.int64), "valid": np.full(1, ids.shape[1])}
    results = []
    for graph in (one, two):
        buffers = {
            v.name: np.zeros([1 if i == 0 else int(str(d)) for i, d in enumerate(v.shape or ())], np.float32)
            for v in graph.inputs
            if v.name not in given
        }
        used = {n: v for n, v in given.items() if graph.input_named(n)}
        results.append(Executable(graph).run({**used, **buffers})[0]["logits"])
    assert_close(results[1], results[0], 1e-5)


def test_what_cannot_be_calibrated_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one sequence"):
        quantize_model(decoder(), [], tmp_path / "a", tmp_path / "w", "k")
    with pytest.raises(UserError, match="no linear layer"):
        quantize_model(Graph("empty"), feeds(), tmp_path / "a", tmp_path / "w", "k")
    bad = np.ones((20, 16), np.float32)
    bad[3, 3] = np.nan
    with pytest.raises((UserError, CheckError), match="NaN or infinity"):
        quantized(decoder(wg=bad), tmp_path)

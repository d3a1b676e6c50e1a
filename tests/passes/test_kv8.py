"""kv8: buffers in int8 with given scales; what is written, what is attended, and which files are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vacc_opt.ir import CheckError, DType, Graph, Literal, UserError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.ir.storage import read_safetensors_header, write_safetensors
from vacc_opt.passes.infra.testing import assert_close, run_pass
from vacc_opt.passes.legalize.kv_cache import KvCache
from vacc_opt.passes.quantize.kv8 import Kv8
from vacc_opt.tests.passes.decoder import KV, WIDTH, cached_logits, decoder

RNG = np.random.default_rng(9)
IDS = RNG.integers(0, 40, (1, 10))
SCALE = RNG.uniform(0.02, 0.03, (KV, WIDTH)).astype(np.float32)
ZERO = RNG.uniform(-0.2, 0.2, (KV, WIDTH)).astype(np.float32)


def scales(path: Path, shape: tuple[int, int] = (KV, WIDTH), layer: int = 0) -> str:
    stored = {}
    for what in ("key", "value"):
        stored[f"layers.{layer}.{what}.scale"] = Literal(np.resize(SCALE, shape))
        stored[f"layers.{layer}.{what}.zero"] = Literal(np.resize(ZERO, shape))
    write_safetensors(path / "kv.safetensors", stored)
    return str(path / "kv.safetensors")


def cached() -> Graph:
    graph = decoder()
    run_pass(KvCache(context=32), graph)
    return graph


def first_call(graph: Graph) -> dict[str, np.ndarray]:
    buffers = {
        v.name: np.zeros([1, *(int(str(d)) for d in (v.shape or ())[1:])], v.type.dtype.numpy)
        for v in graph.inputs
        if v.rank == 4
    }
    return Executable(graph).run({"input_ids": IDS, "pos": np.zeros(1, np.int64), "valid": np.array([10]), **buffers})[
        0
    ]


@pytest.mark.parametrize("new_tokens", ["float", "quantized"])
def test_the_codes_are_those_of_the_float_cache(tmp_path: Path, new_tokens: str) -> None:
    floats = first_call(cached())
    graph = cached()
    run_pass(Kv8(scales=scales(tmp_path), new_tokens=new_tokens), graph)
    found = first_call(graph)
    for what in ("key", "value"):
        wide = floats[f"present.0.{what}"][:, :, :10]
        expected = np.clip(np.rint((wide - ZERO[:, None]) / SCALE[:, None]), -127, 127)
        assert found[f"present.0.{what}"].dtype == np.int8
        np.testing.assert_array_equal(found[f"present.0.{what}"][:, :, :10], expected)


def test_new_tokens_in_float_are_attended_unquantized(tmp_path: Path) -> None:
    graph = cached()
    run_pass(Kv8(scales=scales(tmp_path)), graph)
    # nothing is cached yet, so a first call does not see a quantized key: the same sums, the same bits
    assert_close(first_call(graph)["logits"], first_call(cached())["logits"], 1e-6)


def test_new_tokens_quantized_do_not_depend_on_how_a_prompt_is_cut(tmp_path: Path) -> None:
    graph = cached()
    run_pass(Kv8(scales=scales(tmp_path), new_tokens="quantized"), graph)
    # rounding in another order may move a code by a step only where it lies on a boundary: none here
    assert_close(cached_logits(graph, IDS, 1), cached_logits(graph, IDS, 10), 1e-5)


def test_both_readings_stay_near_the_float_cache(tmp_path: Path) -> None:
    exact = cached_logits(cached(), IDS, 1)
    for new_tokens in ("float", "quantized"):
        graph = cached()
        run_pass(Kv8(scales=scales(tmp_path), new_tokens=new_tokens), graph)
        found = cached_logits(graph, IDS, 1)
        # half a step of 0.03 on keys and values of about 1
        assert_close(found, exact, 0.02)
        assert np.abs(found - exact).max() > 0


def test_the_interface_keeps_its_names(tmp_path: Path) -> None:
    graph = cached()
    record = run_pass(Kv8(scales=scales(tmp_path)), graph)
    assert list(graph.outputs) == ["logits", "present.0.key", "present.0.value"]
    assert {graph.values[f"past_key_values.0.{w}"].type.dtype for w in ("key", "value")} == {DType.INT8}
    assert record.summary == "2 KV buffers int8, new tokens float"
    assert graph.op_counts()["TensorScatter"] == 4


def test_without_scales_it_is_refused() -> None:
    with pytest.raises(UserError, match="kv8 needs calibrated scales"):
        run_pass(Kv8(), cached())


def test_an_unknown_reading_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="new_tokens is 'flaot'\n  did you mean `float`"):
        run_pass(Kv8(scales=scales(tmp_path), new_tokens="flaot"), cached())


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layers\.0\.key\.scale is \[3, 8\], the model has 2 KV heads of 8 channels"):
        run_pass(Kv8(scales=scales(tmp_path, (3, WIDTH))), cached())


def test_scales_of_other_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tensor 'layers\.0\.key\.scale'\n  did you mean `layers\.1\.key\.scale`"):
        run_pass(Kv8(scales=scales(tmp_path, layer=1)), cached())


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        run_pass(Kv8(scales=str(tmp_path / "none")), cached())


def test_a_graph_without_buffers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="the graph has no KV buffers\n  run kv-cache before kv8"):
        run_pass(Kv8(scales=scales(tmp_path)), decoder())


def test_a_split_graph_is_refused(tmp_path: Path) -> None:
    graph = cached()
    graph.ranks = 2
    with pytest.raises(CheckError, match="put kv8 before split-tp"):
        run_pass(Kv8(scales=scales(tmp_path)), graph)


@pytest.mark.parametrize(("what", "number"), [("scale", 0.0), ("scale", np.nan), ("zero", np.inf)])
def test_scales_that_no_code_can_come_from_are_refused(tmp_path: Path, what: str, number: float) -> None:
    stored = {}
    for kind in ("key", "value"):
        stored[f"layers.0.{kind}.scale"] = Literal(SCALE)
        stored[f"layers.0.{kind}.zero"] = Literal(ZERO)
    stored[f"layers.0.key.{what}"] = Literal(np.full_like(SCALE, number))
    write_safetensors(tmp_path / "kv.safetensors", stored)
    with pytest.raises(UserError, match=f"layers.0.key.{what} holds a number that is not"):
        run_pass(Kv8(scales=str(tmp_path / "kv.safetensors")), cached())


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    graph = cached()
    item = Kv8(scales=scales(tmp_path))
    run_pass(item, graph)
    record = run_pass(item, graph)
    assert (record.changes, record.summary) == (0, "the KV buffers are int8 already")


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("new_tokens", ["float", "quantized"])
def test_scales_of_another_float_type_are_those_numbers(tmp_path: Path, dtype: type, new_tokens: str) -> None:
    (tmp_path / "other").mkdir()
    scales(tmp_path)
    stored = {
        n: Literal(s.read().astype(dtype)) for n, s in read_safetensors_header(tmp_path / "kv.safetensors").items()
    }
    write_safetensors(tmp_path / "other" / "kv.safetensors", stored)
    same = {n: Literal(one.array.astype(np.float32)) for n, one in stored.items()}
    write_safetensors(tmp_path / "kv.safetensors", same)
    logits = []
    for place in (tmp_path, tmp_path / "other"):
        graph = cached()
        run_pass(Kv8(scales=str(place / "kv.safetensors"), new_tokens=new_tokens), graph)
        logits.append(first_call(graph)["logits"])
    np.testing.assert_array_equal(*logits)

"""Which operators lowering fuses into the linear before them, which it leaves alone, and that values stay."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vacc_opt.backends.vacc import Program, ValueSimulator, load_target, lower, verify
from vacc_opt.backends.vacc.fusion import EVERY, Fusion
from vacc_opt.backends.vacc.schedule import Kernel
from vacc_opt.backends.vacc.simulate_time import time_kernel
from vacc_opt.backends.vacc.timing import KernelTiming
from vacc_opt.ir import DType, Graph, TensorType
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.fuse.fold_norm_weight import FoldNormWeight
from vacc_opt.passes.infra.testing import run_pass
from vacc_opt.tests.backends.llama import Llama, inputs
from vacc_opt.tests.backends.pack import empty_caches, rank_weights

Array = npt.NDArray[Any]
TARGET = load_target("vacc-reference")
MODELS = {
    "float": Llama(layers=1),
    "int8 weights, codes of new rows, 3 ranks": Llama(layers=1, ranks=3, int8_weights=True, kv="int8-quantised"),
    "decode, new rows as floats": Llama(layers=1, length=1, kv="int8"),
    "one KV head": Llama(layers=1, kv_heads=1, heads=3),
    "longer than a query tile": Llama(layers=1, length=19, kv="int8-quantised"),
}


def families(graph: Graph, fusions: Collection[Fusion] = EVERY) -> list[str]:
    """Kernels of the calls, without their numbers."""
    return [call.kernel.rpartition(".")[0] for call in lower(graph, TARGET, phase="prefill", fusions=fusions).calls]


def layer(fusions: Collection[Fusion], **options: Any) -> list[str]:
    """Kernels that the only layer of a model calls, in order."""
    found = families(Llama(layers=1, **options).graph(), fusions)
    return found[found.index("rms_norm") + 1 : found.index("select_row")]


def test_a_layer_becomes_one_kernel_a_linear_and_what_is_no_epilogue() -> None:
    found = layer(EVERY)
    assert sorted(found[:3]) == ["linear+bias+append", "linear+bias+rotary", "linear+bias+rotary+append"]
    assert found[3:] == ["attention", "linear+residual", "rms_norm", "linear+swiglu", "linear+residual"]


@pytest.mark.parametrize("length", [5, 1], ids=["prefill", "decode"])
def test_a_phase_of_any_depth_takes_at_most_16_kernels(length: int) -> None:
    program = lower(Llama(layers=3, length=length, ranks=3).graph(), TARGET, phase="prefill")
    assert len(program.kernels) <= 16


def test_without_fusions_every_operator_is_a_kernel() -> None:
    qk = ["linear", "bias", "rotary"]
    feed = ["linear", "linear", "swiglu", "linear", "add"]
    assert sorted(layer(())) == sorted(
        [*qk, *qk, "kv_append", "linear", "bias", "kv_append", "attention", "linear", "add", "rms_norm", *feed]
    )


@pytest.mark.parametrize(
    ("off", "apart"),
    [
        (Fusion.GATE, "swiglu"),
        (Fusion.BIAS, "bias"),
        (Fusion.ROTARY, "rotary"),
        (Fusion.APPEND, "kv_append"),
        (Fusion.RESIDUAL, "add"),
    ],
)
def test_each_fusion_is_switched_off_alone(off: Fusion, apart: str) -> None:
    assert apart not in layer(EVERY)
    assert apart in layer([one for one in EVERY if one is not off])


def test_new_rows_that_attention_reads_as_floats_are_stored_for_it() -> None:
    assert layer(EVERY, kv="int8").count("kv_append_i8") == 2
    assert not [one for one in layer(EVERY, kv="int8-quantised") if one.startswith("kv_append")]


def test_rows_of_a_batch_stand_at_different_positions_so_their_heads_are_not_turned_together() -> None:
    """One linear for all rows reads its weight once."""
    found = layer(EVERY, batch=2)
    assert found.count("linear+bias") == 3
    assert found.count("rotary") == 4
    assert found.count("kv_append") == 4


def small(build: Callable[[Rewriter, Any, Callable[..., Any]], Any]) -> Graph:
    """A graph over x [1, 3, 8]; `build` gets the rewriter, x and what multiplies by a weight of some columns."""
    graph = Graph("small")
    rw = Rewriter(graph)
    x = rw.add_input("x", TensorType(DType.FLOAT, (1, 3, 8)))
    rng = np.random.default_rng(0)

    def linear(one: Any, columns: int = 8) -> Any:
        return rw.op.MatMul(one, rw.const(rng.standard_normal((one.type.static_shape[-1], columns), np.float32)))

    for name, value in build(rw, x, linear).items():
        rw.set_output(name, value)
    return graph


def vector(rw: Rewriter, *shape: int) -> Any:
    return rw.const(np.random.default_rng(1).standard_normal(shape, np.float32))


def test_sums_that_leave_the_graph_are_stored() -> None:
    def build(rw: Rewriter, x: Any, linear: Callable[..., Any]) -> Any:
        y = linear(x)
        return {"sums": y, "y": rw.op.Add(y, vector(rw, 8))}

    assert families(small(build)) == ["linear", "bias"]


def test_sums_with_a_second_reader_are_stored() -> None:
    def build(rw: Rewriter, x: Any, linear: Callable[..., Any]) -> Any:
        y = linear(x)
        return {"y": rw.op.Add(y, vector(rw, 8)), "z": rw.op.Tanh(y)}

    assert families(small(build)) == ["linear", "bias", "tanh"]


def test_a_value_that_is_gate_and_factor_at_once_is_stored() -> None:
    def build(rw: Rewriter, x: Any, linear: Callable[..., Any]) -> Any:
        y = linear(x)
        return {"y": rw.vastai.SwiGLU(y, y)}

    assert families(small(build)) == ["linear", "swiglu"]


def test_gates_of_different_inputs_are_two_linears() -> None:
    def build(rw: Rewriter, x: Any, linear: Callable[..., Any]) -> Any:
        return {"y": rw.vastai.SwiGLU(linear(x), linear(rw.op.Tanh(x)))}

    assert sorted(families(small(build))) == ["linear", "linear", "swiglu", "tanh"]


def test_a_gate_of_which_one_side_has_a_bias_is_two_linears() -> None:
    def build(rw: Rewriter, x: Any, linear: Callable[..., Any]) -> Any:
        return {"y": rw.vastai.SwiGLU(rw.op.Add(linear(x), vector(rw, 8)), linear(x))}

    assert sorted(families(small(build))) == ["linear", "linear+bias", "swiglu"]


@pytest.mark.parametrize("shape", [(3, 8), (3, 1), (1, 3, 1), (1,)], ids=str)
def test_only_a_number_a_column_is_a_bias(shape: tuple[int, ...]) -> None:
    def build(rw: Rewriter, x: Any, linear: Callable[..., Any]) -> Any:
        return {"y": rw.op.Add(linear(x), vector(rw, *shape))}

    assert families(small(build))[0] == "linear"
    assert "linear+bias" not in families(small(build))


def test_a_second_bias_is_added_behind_the_kernel() -> None:
    def build(rw: Rewriter, x: Any, linear: Callable[..., Any]) -> Any:
        return {"y": rw.op.Add(vector(rw, 8), rw.op.Add(vector(rw, 1, 8), linear(x)))}

    graph = small(build)
    assert families(graph) == ["linear+bias", "bias"]
    program = lower(graph, TARGET, phase="prefill")
    plain = lower(graph, TARGET, phase="prefill", fusions=())
    x = {"x": np.random.default_rng(2).standard_normal((1, 3, 8), np.float32)}
    found, want = (ValueSimulator(one, [rank_weights(one, graph, 0)]).run(x)["y"] for one in (program, plain))
    assert np.array_equal(found, want)  # the same f32 operations in the same order


def block(rw: Rewriter, x: Any, part: Any, first: bool) -> Any:
    """A sum and its norm, the sum read once more."""
    weights, given = rw.const(np.ones(8, np.float32)), (part, x) if first else (x, part)
    y, total = rw.add("AddRMSNormalization", (*given, weights), {"epsilon": 1e-6}, domain="Vastai", outputs=2).outputs
    return rw.op.Sub(y, total)


@pytest.mark.parametrize("first", [True, False])
def test_a_linear_adds_the_residual_stream_and_the_norm_reads_the_sum(first: bool) -> None:
    graph = small(lambda rw, x, linear: {"y": block(rw, x, linear(x), first)})
    assert families(graph) == ["linear+residual", "rms_norm", "sub"]
    apart = [one for one in EVERY if one is not Fusion.RESIDUAL]
    assert families(graph, apart) == ["linear", "add_rms_norm", "sub"]
    assert families(graph, [one for one in apart if one is not Fusion.NORM]) == ["linear", "add", "rms_norm", "sub"]
    x = {"x": np.random.default_rng(2).standard_normal((1, 3, 8), np.float32)}
    found, *others = (
        ValueSimulator(lower(graph, TARGET, phase="prefill", fusions=one), [rank_weights(lower(graph, TARGET, phase="prefill"), graph, 0)]).run(x)["y"]
        for one in (EVERY, apart, ())
    )  # fmt: skip
    assert all(np.array_equal(found, one) for one in others)  # the same f32 operations in the same order


def folded(build: Callable[[Rewriter, Any, Any], Any], int8: bool = False) -> Graph:
    """What `build` makes of a rewriter, a norm whose weight is all ones, and what multiplies; the norm is of x."""

    def whole(rw: Rewriter, x: Any, linear: Callable[..., Any]) -> Any:
        rng = np.random.default_rng(3)

        def quantized(one: Any) -> Any:
            codes = rw.const(rng.integers(-127, 128, (8, 8), np.int8))
            return rw.vastai.QuantizedLinearPerChannel(one, codes, rw.const(rng.uniform(0.01, 0.02, 8).astype("f")))

        norm = rw.op.RMSNormalization(x, rw.const(np.ones(8, np.float32)), epsilon=1e-5)
        return build(rw, norm, quantized if int8 else linear)

    return small(whole)


@pytest.mark.parametrize("int8", [False, True])
def test_linears_scale_the_rows_of_a_norm_without_a_weight(int8: bool) -> None:
    """f32 sums, multiplied behind and not before them: a few units in the last place of the largest."""

    def build(rw: Rewriter, norm: Any, linear: Callable[..., Any]) -> Any:
        gated = rw.vastai.SwiGLU(linear(norm), linear(norm))
        return {"gated": gated, "biased": rw.op.Add(linear(norm), vector(rw, 8))}

    graph, name = folded(build, int8), "linear_w8" if int8 else "linear"
    assert sorted(families(graph)) == [f"{name}+row_scale+bias", f"{name}+row_scale+swiglu", "row_scale"]
    assert "rms_norm" in families(graph, [one for one in EVERY if one is not Fusion.ROW_SCALE])
    x = {"x": 50 * np.random.default_rng(2).standard_normal((1, 3, 8), np.float32)}
    found, plain = (
        ValueSimulator(program, [rank_weights(program, graph, 0)]).run(x)
        for program in (lower(graph, TARGET, phase="prefill", fusions=one) for one in (EVERY, ()))
    )
    verify(lower(graph, TARGET, phase="prefill"), TARGET)
    for key, one in found.items():
        assert np.max(np.abs(one - plain[key])) <= 5e-6 * np.max(np.abs(plain[key]))


def test_a_norm_that_another_operator_reads_is_stored() -> None:
    def build(rw: Rewriter, norm: Any, linear: Callable[..., Any]) -> Any:
        return {"y": linear(norm), "z": rw.op.Tanh(norm)}

    assert sorted(families(folded(build))) == ["linear", "rms_norm", "tanh"]


@pytest.mark.parametrize("dtype", [DType.FLOAT, DType.FLOAT16])
@pytest.mark.parametrize("name", ["float", "one KV head", "longer than a query tile"])
def test_a_model_whose_norms_are_folded_scales_rows_in_its_linears(name: str, dtype: DType) -> None:
    """f32: sums in another order; f16: rows are rounded before instead of behind their scale, so 1e-2 at most."""
    graph = replace(MODELS[name], dtype=dtype).graph()
    assert run_pass(FoldNormWeight(), graph).fused == 3
    program, plain = (lower(graph, TARGET, phase="prefill", fusions=one) for one in (EVERY, ()))
    verify(program, TARGET)
    kernels = [call.kernel.rpartition(".")[0] for call in program.calls]
    assert (kernels.count("row_scale"), kernels.count("rms_norm")) == (3, 0)
    assert sum("+row_scale" in one for one in kernels) == 5  # Q, K, V, gate and other linear in one, lm_head
    feeds = inputs(MODELS[name], [4], [MODELS[name].length])
    found, want = (
        ValueSimulator(one, [rank_weights(one, graph, 0)]).run(feeds, empty_caches(one))["logits"].astype(np.float64)
        for one in (program, plain)
    )
    assert np.max(np.abs(found - want)) <= (1e-5 if dtype is DType.FLOAT else 1e-2) * np.max(np.abs(want))


def test_each_call_implements_what_it_computes() -> None:
    graph = small(lambda rw, x, linear: {"y": block(rw, x, linear(x), True)})
    first, second, _ = lower(graph, TARGET, phase="prefill").calls
    product, norm, _ = (node.outputs[0].name for node in graph.nodes())
    assert (first.nodes, second.nodes) == ((norm, product), (norm,))


def test_of_two_linears_that_are_added_up_one_adds_the_other() -> None:
    def build(rw: Rewriter, x: Any, linear: Callable[..., Any]) -> Any:
        return {"y": rw.op.Add(linear(x), linear(x))}

    assert families(small(build)) == ["linear", "linear+residual"]


def test_what_a_fusion_gains_is_asked_for_each_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """An addition, and one with a norm behind it, of the same sums: two kernels that a fusion spares."""
    timed: list[str] = []

    def listened(kernel: Kernel, *more: Any) -> KernelTiming:
        timed.append(kernel.name)
        return time_kernel(kernel, *more)

    def build(rw: Rewriter, x: Any, linear: Callable[..., Any]) -> Any:
        return {"y": rw.op.Add(linear(x), x), "z": block(rw, x, linear(x), True)}

    monkeypatch.setattr(import_module("vacc_opt.backends.vacc.fusion"), "time_kernel", listened)
    families(small(build))
    assert sorted(timed) == ["add", "add_rms_norm", "rms_norm"]


@pytest.mark.parametrize("what", ["gated", "read twice", "repeated for every column"])
def test_what_is_no_sum_of_one_linear_and_a_stream_of_its_shape_is_added_behind(what: str) -> None:
    def build(rw: Rewriter, x: Any, linear: Callable[..., Any]) -> Any:
        if what == "gated":
            return {"y": rw.op.Add(x, rw.vastai.SwiGLU(linear(x), linear(x)))}
        product = linear(x)
        if what == "read twice":
            return {"y": rw.op.Add(x, product), "z": rw.op.Tanh(product)}
        first, second, axis = (rw.const(np.array([one])) for one in (0, 1, 2))
        return {"y": rw.op.Add(product, rw.op.Slice(x, first, second, axis))}

    found = families(small(build))
    assert "linear+residual" not in found
    assert {"add", "bias"} & set(found)


def run(m: Llama, fusions: Collection[Fusion], order: int = 0) -> tuple[Array, list[dict[str, Array]]]:
    """Logits and caches of a model, from its schedule text."""
    graph = m.graph()
    program = Program.from_text(lower(graph, TARGET, phase="prefill", fusions=fusions).to_text())
    verify(program, TARGET)
    caches = empty_caches(program)
    weights = [rank_weights(program, graph, rank) for rank in range(m.ranks)]
    simulator = ValueSimulator(program, weights, order=order)
    return simulator.run(inputs(m, [4], [m.length]), caches)["logits"].astype(np.float64), caches


@pytest.mark.parametrize("name", MODELS)
def test_fused_and_unfused_programs_agree_in_f32_and_in_any_order(name: str) -> None:
    """f32 sums: a few units in the last place a layer. Codes may turn over where a sum ends between two of them."""
    m = MODELS[name]
    want, stored = run(m, ())
    for order in range(4):
        found, caches = run(m, EVERY, order)
        assert np.max(np.abs(found - want)) <= 1e-5 * np.max(np.abs(want))
        for one, other in zip(caches, stored, strict=True):
            for key, array in one.items():
                step = 1 if array.dtype == np.int8 else 1e-5
                assert np.max(np.abs(array.astype(np.float64) - other[key])) <= step


def test_f16_models_come_no_further_from_f32_when_fused() -> None:
    """What is fused is not rounded to 11 bits in between: within twice the error of the unfused program."""
    half = replace(MODELS["float"], dtype=DType.FLOAT16)
    graph = half.graph()
    whole = lower(replace(half, dtype=DType.FLOAT).graph(), TARGET, phase="prefill", fusions=())
    given = rank_weights(lower(graph, TARGET, phase="prefill", fusions=()), graph, 0)
    wide = {k: v.astype(np.float32) if v.dtype == np.float16 else v for k, v in given.items()}
    exact = ValueSimulator(whole, [wide]).run(inputs(half, [4], [5]), empty_caches(whole))["logits"].astype(np.float64)
    scale = np.max(np.abs(exact))
    plain, fused = (float(np.max(np.abs(run(half, fusions)[0] - exact)) / scale) for fusions in ((), EVERY))
    assert fused <= 2 * plain < 2e-2

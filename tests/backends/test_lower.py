"""A lowered graph, executed from its schedule text, equals the same graph on onnxruntime: logits and caches, all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vacc_opt.backends.vacc import Program, ValueSimulator, load_target, lower, verify
from vacc_opt.ir import DType, Graph, TensorType, UserError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.ir.onnx_proto import export_names
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.storage import stored_tensors
from vacc_opt.tests.backends.llama import Llama, inputs
from vacc_opt.tests.backends.pack import empty_caches, rank_weights

Array = npt.NDArray[Any]
TARGET = load_target("vacc-reference")
W8KV8 = {"int8_weights": True, "kv": "int8"}

MODELS = {
    "fp32": Llama(),
    "fp32 decode": Llama(length=1),
    "fp32, prefill longer than a query tile": Llama(length=19),
    "fp32, 3 ranks": Llama(ranks=3),
    "fp32, two rows at different positions": Llama(batch=2),
    "int8 KV, new tokens as floats": Llama(kv="int8"),
    "int8 KV, new tokens as floats, decode": Llama(kv="int8", length=1),
    "int8 KV, new tokens quantised": Llama(kv="int8-quantised"),
    "int8 weights and KV, 3 ranks": Llama(ranks=3, **W8KV8),
    "int8 weights and KV, 3 ranks, decode": Llama(ranks=3, length=1, **W8KV8),
    "one KV head": Llama(kv_heads=1, heads=3),
    "71 query heads, one KV head": Llama(kv_heads=1, heads=71, layers=1),
    "channels of no power of two, two rows": Llama(batch=2, width=20, kv_heads=1, heads=3),
    "ALiBi": Llama(alibi=True),
    "ALiBi, two rows at different positions, decode": Llama(alibi=True, batch=2, length=1),
    "window, clamp and ALiBi over int8 KV": Llama(kv="int8", alibi=True, window=3, clamp=0.4),
    "soft cap over int8 KV, new tokens quantised": Llama(kv="int8-quantised", softcap=0.5),
    "window, longer than a query tile": Llama(length=19, window=6),
    "window, decode": Llama(length=1, window=3),
    "everything, int8 weights and KV, 3 ranks": Llama(ranks=3, alibi=True, window=4, clamp=0.4, softcap=0.5, **W8KV8),
}


def caches_of(program: Program) -> list[dict[str, Array]]:
    """Caches with random contents: what lies behind the valid length must not matter."""
    rng, caches = np.random.default_rng(1), empty_caches(program)
    for one in caches:
        for array in one.values():
            array[...] = (
                rng.integers(-127, 128, array.shape) if array.dtype == np.int8 else rng.standard_normal(array.shape)
            )
    return caches


def compare(m: Llama, pos: list[int], valid: list[int]) -> tuple[float, float]:
    """Largest error of the logits relative to their scale, and of the caches in units of the cache."""
    graph = m.graph()
    program = Program.from_text(lower(graph, TARGET, phase="prefill").to_text())
    simulator = ValueSimulator(program, [rank_weights(program, graph, rank) for rank in range(m.ranks)])
    caches = caches_of(program)
    before = [{name: array.copy() for name, array in one.items()} for one in caches]
    feeds = inputs(m, pos, valid)
    found = simulator.run(feeds, caches)["logits"].astype(np.float64)
    weights = [{k: np.asarray(e.read()) for k, e in stored_tensors(graph, rank).items()} for rank in range(m.ranks)]
    expected = Executable(graph, weights=weights).run(feeds, before)
    logits = expected[0].pop("logits").astype(np.float64)
    assert found.shape == logits.shape
    cache_error = 0.0
    for rank, outputs in enumerate(expected):
        for name, array in outputs.items():
            if name.startswith("present"):
                mine = caches[rank][name.replace("present", "past_key_values")].astype(np.float64)
                cache_error = max(cache_error, float(np.max(np.abs(mine - array))))
    return float(np.max(np.abs(found - logits)) / np.max(np.abs(logits))), cache_error


@pytest.mark.parametrize("name", MODELS)
def test_the_schedule_computes_what_onnxruntime_computes(name: str) -> None:
    m = MODELS[name]
    logits, cache = compare(m, [4, 0][: m.batch], [min(3, m.length), m.length][: m.batch])
    assert logits < 1e-5  # fp32, relative to the scale of the logits
    assert cache < (1e-5 if m.kv == "float" else 1.5)  # floats of size 1; codes at most one step apart


def test_every_interleaving_of_the_engines_gives_the_same_bits() -> None:
    m = MODELS["int8 weights and KV, 3 ranks"]
    graph = m.graph()
    program = lower(graph, TARGET, phase="prefill")
    weights = [rank_weights(program, graph, rank) for rank in range(m.ranks)]
    found = []
    for order in range(4):
        caches = caches_of(program)
        found.append(ValueSimulator(program, weights, order=order).run(inputs(m, [2], [4]), caches)["logits"])
    assert all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    "options",
    [{}, W8KV8, {"alibi": True, "window": 3, "clamp": 0.4, "softcap": 0.5}],
    ids=["fp16", "fp16 with int8 weights and KV", "fp16 with ALiBi, window and limits"],
)
def test_fp16_activations_stay_within_their_rounding(options: dict[str, Any]) -> None:
    """Against the same weights in fp32; each of the two layers rounds its activations to 11 bits about ten times."""
    half, full = Llama(dtype=DType.FLOAT16, **options), Llama(dtype=DType.FLOAT, **options)
    results = []
    for m in (half, full):
        graph = m.graph()
        program = lower(graph, TARGET, phase="prefill")
        weights = rank_weights(program, half.graph(), 0) if m is half else widened(half)
        caches = empty_caches(program)
        results.append(ValueSimulator(program, [weights]).run(inputs(m, [0], [5]), caches)["logits"].astype(np.float64))
    assert np.max(np.abs(results[0] - results[1])) < 2e-2 * np.max(np.abs(results[1]))


def widened(half: Llama) -> dict[str, Array]:
    program = lower(half.graph(), TARGET, phase="prefill")
    found = rank_weights(program, half.graph(), 0)
    return {k: v.astype(np.float32) if v.dtype == np.float16 else v for k, v in found.items()}


def test_chunks_and_single_steps_leave_the_same_cache_and_logits_as_one_prefill() -> None:
    """Five tokens at once, or three and then one after the other: `pos` is what joins them."""
    whole, chunk, step = Llama(), Llama(length=3), Llama(length=1)
    ids = inputs(whole, [0], [5])["input_ids"]
    outcomes = []
    for parts in [[(whole, 0)], [(chunk, 0), (step, 3), (step, 4)]]:
        caches, logits = None, None
        for m, pos in parts:
            graph = m.graph()
            program = lower(graph, TARGET, phase="prefill")
            caches = caches or empty_caches(program)
            feeds = {"input_ids": ids[:, pos : pos + m.length], "pos": np.array([pos]), "valid": np.array([m.length])}
            logits = ValueSimulator(program, [rank_weights(program, graph, 0)]).run(feeds, caches)["logits"]
        assert caches is not None
        outcomes.append((logits, caches[0]))
    (first, cache), (second, other) = outcomes
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5 * np.max(np.abs(second)))
    for name, array in cache.items():
        np.testing.assert_allclose(array, other[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_lowered_programs_pass_the_verifier_and_round_trip(name: str) -> None:
    program = lower(MODELS[name].graph(), TARGET, phase="prefill")
    verify(program, TARGET)
    assert Program.from_text(program.to_text()) == program


@pytest.mark.parametrize("name", MODELS)
def test_every_call_names_the_nodes_that_it_implements(name: str) -> None:
    graph = MODELS[name].graph()
    program = lower(graph, TARGET, phase="prefill")
    names = export_names(graph)
    nodes = {names[node.output]: node for node in graph.nodes()}
    assert all(call.nodes and set(call.nodes) <= nodes.keys() for call in program.calls)
    left = nodes.keys() - {one for call in program.calls for one in call.nodes}
    # arithmetic on positions becomes scalars of the calls; the logits leave the program as a window of a tensor
    assert {nodes[one].op for one in left if nodes[one].output.type.dtype is not DType.INT64} <= {"Slice"}


def test_a_call_names_first_what_it_computes_then_what_it_does_inside() -> None:
    graph = MODELS["int8 KV, new tokens as floats"].graph()
    names = export_names(graph)
    nodes = {names[node.output]: node.op for node in graph.nodes()}
    calls = lower(graph, TARGET, phase="prefill").calls
    found = {call.kernel.partition(".")[0]: [nodes[one] for one in call.nodes] for call in calls}
    keys = ["TensorScatter", "Vastai::DequantizeKV"]
    assert found["attention_i8"] == ["Attention", *keys, *keys]
    assert found["kv_append_i8"] == ["TensorScatter", "Vastai::QuantizeKV"]
    assert found["linear+bias"] == ["Add", "Transpose", "Reshape", "MatMul", "Transpose"]
    heads = ["Transpose", "Reshape", "Add", "MatMul", "Transpose"]
    assert found["linear+bias+rotary"] == ["RotaryEmbedding", *heads]
    assert found["linear+swiglu"] == ["Vastai::SwiGLU", "MatMul", "Transpose", "MatMul", "Transpose"]


def test_equal_layers_share_kernels() -> None:
    two, six = (lower(Llama(layers=n).graph(), TARGET, phase="prefill") for n in (2, 6))
    assert len(two.kernels) == len(six.kernels)
    assert len(six.calls) > 2 * len(two.calls)


def test_merged_heads_and_transposed_weights_cost_no_copy() -> None:
    program = lower(Llama().graph(), TARGET, phase="prefill")
    assert not [one for one in program.kernels if one.name.startswith("copy")]


def small(build: Any) -> Graph:
    graph = Graph("small")
    rewriter = Rewriter(graph)
    x = rewriter.add_input("x", TensorType(DType.FLOAT, (2, 3, 4)))
    rewriter.set_output("y", build(rewriter, x))
    return graph


def execute(graph: Graph, x: Array) -> Array:
    program = lower(graph, TARGET, phase="prefill")
    return ValueSimulator(program, [rank_weights(program, graph, 0)]).run({"x": x})["y"]


def test_a_reshape_that_strides_cannot_say_becomes_a_copy() -> None:
    def build(rw: Rewriter, x: Any) -> Any:
        twice = rw.op.Add(x, rw.op.Transpose(rw.op.Transpose(x, perm=(1, 0, 2)), perm=(1, 0, 2)))
        return rw.op.Reshape(rw.op.Transpose(twice, perm=(2, 1, 0)), rw.const(np.array([6, 4])))

    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert np.array_equal(execute(small(build), x), (2 * x).transpose(2, 1, 0).reshape(6, 4))


def test_slices_and_splits_are_views() -> None:
    def build(rw: Rewriter, x: Any) -> Any:
        tail = rw.op.Slice(x, rw.const(np.array([1])), rw.const(np.array([9])), rw.const(np.array([0])))
        left, right = rw.add("Split", (tail,), {"axis": -1, "num_outputs": 2}, outputs=2).outputs
        return rw.op.Mul(left, right)

    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    graph = small(build)
    assert np.array_equal(execute(graph, x), x[1:, :, :2] * x[1:, :, 2:])
    assert len(lower(graph, TARGET, phase="prefill").calls) == 1


def test_an_operator_without_a_kernel_is_named() -> None:
    graph = small(lambda rw, x: rw.op.Sin(x))
    with pytest.raises(UserError, match="no kernel for Sin"):
        lower(graph, TARGET, phase="prefill")


def test_positions_that_do_not_count_up_from_pos_are_refused() -> None:
    graph = Llama().graph()
    rewriter = Rewriter(graph)
    rotary = graph.by_op("RotaryEmbedding")[0]
    rewriter.set_input(rotary, 3, rewriter.op.Mul(rotary.inputs[3], rewriter.const(np.array(2))))
    with pytest.raises(UserError, match="position_ids is not pos"):
        lower(graph, TARGET, phase="prefill")


def test_a_cache_that_is_read_beside_its_write_is_refused() -> None:
    """The write is in place, so whoever wants the old contents could see the new ones."""
    graph = Llama().graph()
    rewriter = Rewriter(graph)
    old = graph.input_named("past_key_values.1.value")
    assert old is not None
    rewriter.set_output("old", rewriter.op.Mul(old, old))
    with pytest.raises(UserError, match=r"reads `past_key_values.1.value`, which .* overwrites in place"):
        lower(graph, TARGET, phase="prefill")


def test_attention_without_a_cache_is_refused() -> None:
    graph = Llama().graph()
    rewriter = Rewriter(graph)
    node = graph.by_op("Attention")[0]
    for position in (1, 2):
        scatter = node.inputs[position].producer
        assert scatter is not None
        rewriter.set_input(node, position, scatter.inputs[1])
    with pytest.raises(UserError, match="do not come from KV caches"):
        lower(graph, TARGET, phase="prefill")


def test_an_attention_that_looks_past_the_new_tokens_is_refused() -> None:
    graph = Llama().graph()
    rewriter = Rewriter(graph)
    node = graph.by_op("Attention")[0]
    rewriter.set_input(node, 6, rewriter.op.Add(node.inputs[6], rewriter.const(np.array([1]))))
    with pytest.raises(UserError, match="nonpad_kv_seqlen is not pos"):
        lower(graph, TARGET, phase="prefill")


@pytest.mark.parametrize("other", ["valid", "input_ids"])
def test_positions_that_depend_on_another_input_too_are_refused(other: str) -> None:
    graph = Llama().graph()
    rw = Rewriter(graph)
    rotary = graph.by_op("RotaryEmbedding")[0]
    added = graph.input_named(other)
    assert added is not None
    if other == "valid":
        added = rw.op.Unsqueeze(added, rw.const(np.array([1])))
    rw.set_input(rotary, 3, rw.op.Add(rotary.inputs[3], added))
    with pytest.raises(UserError, match="position_ids is not pos"):
        lower(graph, TARGET, phase="prefill")


@pytest.mark.parametrize("options", [{}, W8KV8], ids=["fp32", "int8 weights and KV"])
def test_weights_and_caches_lie_at_the_same_addresses_in_both_phases(options: dict[str, Any]) -> None:
    """One memory serves both: 19 token ids take more than an aligned block, 1 takes less."""
    prefill, decode = (
        lower(Llama(length=n, **options).graph(), TARGET, phase=phase) for n, phase in ((19, "prefill"), (1, "decode"))
    )
    kept = [{one.name: one for one in p.tensors if one.role in ("weight", "cache")} for p in (prefill, decode)]
    assert {"weight", "cache"} == {one.role for one in kept[0].values()}
    assert kept[0] == kept[1]  # name, dtype, shape and offset

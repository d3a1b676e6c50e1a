"""Reduction: from thousands of nodes to the few that a bug needs, the same way every time, ready to be a test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vacc_opt.ir import Graph, UserError
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import verify
from vacc_opt.passes.infra import registry
from vacc_opt.passes.infra.base import ancestors
from vacc_opt.passes.infra.debug.failures import FailsNumerics, find_failure
from vacc_opt.passes.infra.debug.reduce import Reducer, Surgeon
from vacc_opt.passes.infra.debug.reduction import reduce_failure, reduce_script
from vacc_opt.passes.infra.debug.reproducer import Numerics
from vacc_opt.passes.infra.debug.shrink import without_files
from vacc_opt.passes.infra.pipeline import parse_pipeline
from vacc_opt.tests.passes import planted
from vacc_opt.tests.passes.decoder import decoder


@pytest.fixture(autouse=True)
def planted_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.all_passes()
    for item in planted.ALL:
        monkeypatch.setitem(registry._PASSES, item.name, item)


def residual(blocks: int, *neg: int) -> Graph:
    """Blocks of ten nodes (a norm, a gated product, a residual sum); those in ``neg`` have a Neg for a Sigmoid."""
    lines, x = [], "x"
    for i in range(blocks):
        gate = "Neg" if i in neg else "Sigmoid"
        lines += [
            f"q{i} = Mul ({x}, {x})", f"m{i} = ReduceMean (q{i}, last)", f"e{i} = Add (m{i}, eps)", f"r{i} = Sqrt (e{i})",
            f"d{i} = Div ({x}, r{i})", f"g{i} = MatMul (d{i}, w)", f"s{i} = {gate} (g{i})", f"t{i} = Mul (g{i}, s{i})",
            f"u{i} = MatMul (t{i}, v)", f"h{i} = Add ({x}, u{i})",
        ]  # fmt: skip
        x = f"h{i}"
    weights = [f"# const \"{n}\" = Source('/nowhere', {i}, 'float', (32, 32))" for i, n in enumerate("wv")]
    head = "g (float[B,S,32] x) => (float[B,S,32] y) <float eps = {1e-5}, int64[1] last = {-1}>"
    return from_text("\n".join([head, "{", *lines, f"y = Tanh ({x})", "}", *weights, ""]))


def has(*ops: str) -> Callable[[Graph], bool]:
    return lambda graph: all(op in graph.op_counts() for op in ops)


def test_one_node_is_what_one_node_needs() -> None:
    graph = residual(12, 7)
    before = to_text(graph)
    reducer = Reducer(graph, has("Neg"))
    small = reducer.run()
    verify(small)
    assert [node.op for node in small.nodes()] == ["Neg"]
    assert [str(v.type) for v in small.inputs] == ["float[B,S,4]"]
    assert to_text(graph) == before


def test_two_nodes_far_apart_stay_connected_when_that_is_what_the_test_asks() -> None:
    def connected(graph: Graph) -> bool:
        return any(node.op == "Neg" for one in graph.by_op("Tanh") for node in ancestors(graph, one.output))

    reducer = Reducer(residual(20, 3), connected)
    small = reducer.run()
    verify(small)
    assert {"Neg", "Tanh"} <= set(small.op_counts())
    assert len(small) <= 5


def test_the_same_graph_and_test_give_the_same_result() -> None:
    first, again = (to_text(Reducer(residual(12, 7), has("Neg", "Div")).run()) for _ in range(2))
    assert first == again


def test_every_graph_that_is_tried_is_valid() -> None:
    def test(graph: Graph) -> bool:
        verify(graph)
        return has("Neg", "Sqrt")(graph)

    Reducer(residual(12, 7), test).run()


def test_a_region_computes_what_its_nodes_compute() -> None:
    import numpy as np

    from vacc_opt.passes.infra.check.calls import Call, seeded_call
    from vacc_opt.passes.infra.check.layerwise import Layerwise
    from vacc_opt.passes.infra.check.locate import Capture

    graph = decoder()
    values = Capture(set(graph.values))
    call = seeded_call(graph)
    Layerwise().run(graph, call, values)
    known = {**call.shared, **{name: ranks[0] for name, ranks in values.values.items()}}
    region = Surgeon(graph).region(graph.nodes()[20:40])
    verify(region)
    found = Layerwise().run(region, Call({v.name: known[v.name] for v in region.inputs}))[0]
    assert found
    for name, array in found.items():
        np.testing.assert_array_equal(array, known[name])


def test_a_graph_that_is_not_interesting_is_refused() -> None:
    with pytest.raises(UserError, match="the test does not find the model interesting"):
        Reducer(residual(2), has("Neg")).run()


def test_a_pass_that_changes_values_is_reduced_to_what_it_changes() -> None:
    found = reduce_failure(residual(30, 20), parse_pipeline("simplify,wrong-at{at=1},legalize"), Numerics(), "")
    assert [node.op for node in found.graph.nodes()] == ["Neg"]
    assert found.why.startswith("wrong-at{at=1}: an exact pass, but y differs by ")
    assert found.lines()[1] == f"301 nodes to 1 in {found.tries} tries"


def test_a_graph_that_the_pass_leaves_alone_is_never_run() -> None:
    test = FailsNumerics(planted.WrongAt(), Numerics())
    assert not test(residual(3))
    assert test.runs == 0


def test_an_error_is_reduced_by_its_words() -> None:
    found = reduce_failure(
        residual(30, 20, 25), parse_pipeline("simplify,raises-at{at=2,check=true}"), None, "cannot rewrite"
    )
    assert found.graph.op_counts()["Neg"] == 2
    assert len(found.graph) <= 4
    with pytest.raises(
        UserError, match=r"the pipeline fails otherwise: raises-at: .*\n  its message does not hold 'other'"
    ):
        reduce_failure(residual(3, 1), parse_pipeline("raises-at{at=1,check=true}"), None, "other")


def test_a_pipeline_that_does_not_fail_is_refused() -> None:
    with pytest.raises(UserError, match="every pass keeps its promise about values"):
        find_failure(residual(2), parse_pipeline("simplify"), Numerics())
    with pytest.raises(UserError, match="the pipeline runs without an error"):
        find_failure(residual(2), parse_pipeline("simplify"))


def test_the_weights_of_the_result_are_in_no_file() -> None:
    found = reduce_failure(residual(5, 2), [planted.WrongAt(at=1)], Numerics(), "")
    assert "Source" not in to_text(found.graph)
    with_weight = Reducer(
        residual(5, 2), lambda graph: bool(graph.by_op("MatMul")) and len(graph.constants()) > 0
    ).run()
    assert "Seeded('nowhere:" in to_text(with_weight)


def test_the_emitted_test_fails_now_and_passes_once_the_pass_is_mended(tmp_path: Path) -> None:
    found = reduce_failure(residual(5, 2), [planted.WrongAt(at=1)], Numerics(seed=3), "")
    assert "CheckNumerics(seed=3)" in found.test
    scope: dict[str, object] = {}
    exec(compile(found.test, "test", "exec"), scope)
    test = scope["test_wrong_at_keeps_the_values"]
    with pytest.raises(Exception, match="wrong-at"):
        test()  # type: ignore[operator]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planted.WrongAt, "make", planted.SubtractFromZero.make)
        test()  # type: ignore[operator]


def test_a_script_is_asked_about_models_on_disk(tmp_path: Path) -> None:
    script = tmp_path / "has_neg.py"
    script.write_text("import sys, onnx\nsys.exit(any(n.op_type == 'Neg' for n in onnx.load(sys.argv[1]).graph.node))")
    (tmp_path / "models").mkdir()
    graph = without_files(residual(2, 1))  # the model on disk has its weights, so they have to be there
    assert graph is not None
    found = reduce_script(graph, [], f"{sys.executable} {script}", tmp_path / "models")
    assert [node.op for node in found.graph.nodes()] == ["Neg"]
    emitted = tmp_path / "test_it.py"
    emitted.write_text(found.test)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", emitted], capture_output=True, check=False, text=True)  # fmt: skip
    assert "1 failed" in done.stdout


@pytest.mark.full
def test_five_thousand_nodes_go_to_fifteen_at_most_in_a_bounded_number_of_tries() -> None:
    graph = residual(500, 317)
    assert len(graph) > 5000
    found = reduce_failure(graph, [planted.WrongAt(at=1)], Numerics(), "")
    assert len(found.graph) <= 15
    assert found.tries <= 60
    # and with a test that does not say where the bug is
    reducer = Reducer(residual(500, 317), FailsNumerics(planted.WrongAt(at=1), Numerics()))
    assert len(reducer.run()) <= 15
    assert reducer.calls <= 100

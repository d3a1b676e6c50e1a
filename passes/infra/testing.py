"""What tests of passes are written with: one call for a rewrite, one for a refusal, both shown on onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir import Graph, Value
from vacc_opt.ir.copy import copy
from vacc_opt.ir.evaluate import Executable, random_feeds
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.passes.infra.author.examples import doc_of
from vacc_opt.passes.infra.base import Kind, Pass
from vacc_opt.passes.infra.check.numerics import CheckNumerics
from vacc_opt.passes.infra.instrument import PassRecord
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.patterns.pattern_pass import Matching, PatternPass
from vacc_opt.passes.infra.pipeline import parse_pipeline

Array = npt.NDArray[Any]
Values = Mapping[str, Array]
# fp32 sums of a few hundred terms in another order differ by about 1e-6 of the output's scale
REASSOCIATED = 1e-5
SIZES = {"batch": 2, "seq": 5, "past": 3, "B": 2, "S": 5, "T": 7, "N": 4}


def run_pass(item: Pass, graph: Graph) -> PassRecord:
    """Run one pass in place, verified."""
    return run_pipeline(graph, [item]).records[0]


def assert_rewrites(item: Pass, before: str, after: str, *, sizes: Mapping[str, int] = SIZES) -> None:
    """``item`` turns ``before`` into ``after`` (ONNX text), and both compute what the pass's kind promises.

    Raises:
        AssertionError: with both texts, or the first output that differs.
    """
    graph = from_text(before)
    original = copy(graph)
    run_pass(item, graph)
    expected = from_text(after)
    assert canonical(graph) == canonical(expected), f"got\n{canonical(graph)}\nexpected\n{canonical(expected)}"
    if item.kind in (Kind.EXACT, Kind.REASSOCIATING):
        assert_same_values(original, graph, item.kind, sizes=sizes)
    elif item.kind is Kind.INTERFACE:
        check = CheckNumerics(sizes=sizes)
        run_pipeline(original, [item], instruments=[check])
        assert [one.sentence for one in check.checked if not one.compared] == []


def assert_examples(cls: type[Pass]) -> None:
    """The docstring of a pass has before and after graphs, and the pass turns each of them into the other."""
    examples = doc_of(cls).examples
    assert examples, f"the docstring of {cls.__name__} has no 'Before:' and 'After:'"
    for example in examples:
        (item,) = parse_pipeline(example.spec)
        assert isinstance(item, cls), f"the example of {cls.name} runs {example.spec}"
        assert_rewrites(item, example.before, example.after)


def canonical(graph: Graph) -> str:
    """The text without names of nodes, values and constants, and without provenance: what a rewrite is about."""
    graph = copy(graph)
    kept = {v.name for v in graph.inputs} | {name for name, v in graph.outputs.items() if v.name == name}
    wanted: dict[Value, str] = {}
    for index, node in enumerate(graph.nodes()):
        node.name = ""
        wanted |= {value: f"v{index}_{position}" for position, value in enumerate(node.outputs)}
    constants = sorted(graph.constants(), key=lambda v: (v.const.key if v.const else "", v.name))
    wanted |= {value: f"c{index}" for index, value in enumerate(constants)}
    for value in graph.values.values():
        if value.name not in kept:
            value.name = wanted.get(value, value.name)
            while value.name in kept:
                value.name += "_"
    graph.values = {value.name: value for value in graph.values.values()}
    lines = to_text(graph).splitlines()
    return "\n".join(line for line in lines if not line.startswith("# from"))


def assert_no_match(item: Pass, text: str, reason: str) -> None:
    """``item`` leaves the graph as it is and says ``reason``: in a missed remark, or without anchors to why-not."""
    graph = from_text(text)
    before = to_text(graph)
    record = run_pass(item, graph)
    assert to_text(graph) == before, f"{item.name} changed the graph:\n{to_text(graph)}"
    missed = [r.message for r in record.remarks if r.kind == "missed"]
    if isinstance(item, PatternPass) and not item.anchors:
        work = Matching(item, graph)
        missed += [m.message(work.matcher.size()) for m in work.not_matched(every=True)]
    assert any(reason in message for message in missed), f"nothing says {reason!r}; what is said: {missed}"


def assert_same_values(
    before: Graph,
    after: Graph,
    kind: Kind,
    *,
    sizes: Mapping[str, int] = SIZES,
    feeds: Values | None = None,
    tolerance: float = REASSOCIATED,
) -> None:
    """Both graphs give the same outputs on the same seeded inputs: bit for bit (exact) or within the tolerance."""
    given = dict(feeds if feeds is not None else random_feeds(before, sizes))
    left = Executable(before, threads=2).run(given)[0]
    right = Executable(after, threads=2).run({v.name: given[v.name] for v in after.inputs})[0]
    assert left.keys() == right.keys(), f"outputs {list(left)} became {list(right)}"
    for name, expected in left.items():
        if kind is Kind.EXACT:
            np.testing.assert_array_equal(right[name], expected, err_msg=name)
        else:
            assert_close(right[name], expected, tolerance, name)


def assert_close(found: Array, expected: Array, tolerance: float, name: str = "") -> None:
    """``max|found - expected| <= tolerance * max|expected|``, the comparison of all float results."""
    assert found.shape == expected.shape, f"{name}: shape {found.shape}, expected {expected.shape}"
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    error = float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0))
    assert error <= tolerance * scale, f"{name}: differs by {error:g} on a scale of {scale:g}, allowed {tolerance:g} x"


def run_stages(graph: Graph, passes: Sequence[Pass], after: Callable[[Pass, Graph, Graph], None]) -> None:
    """Run passes one by one and call ``after(pass, graph before, graph after)`` for each."""
    for item in passes:
        before = copy(graph)
        run_pass(item, graph)
        after(item, before, graph)

"""Mutation test of the fusions: graphs that are nearly what a pass fuses are declined with the right reason, or fused
into something that computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from vacc_opt.ir import Graph, Literal
from vacc_opt.ir.copy import copy
from vacc_opt.ir.errors import CheckError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.ir.text import to_text
from vacc_opt.passes.fuse.fuse_gqa import FuseGqa
from vacc_opt.passes.fuse.fuse_rms_norm import FuseRmsNorm
from vacc_opt.passes.fuse.fuse_rotary import FuseRotary
from vacc_opt.passes.fuse.fuse_swiglu import FuseSwiglu
from vacc_opt.passes.fuse.split_packed_linear import SplitPackedLinear
from vacc_opt.passes.infra.base import Kind, Pass
from vacc_opt.passes.infra.check.adapters import Pair
from vacc_opt.passes.infra.check.compare import compare, tolerance_of
from vacc_opt.passes.infra.instrument import PassRecord
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.patterns.match import Match, Reason
from vacc_opt.passes.infra.patterns.pattern import Pattern, op
from vacc_opt.passes.infra.patterns.pattern_pass import Capture, Const, PatternPass, Scalar
from vacc_opt.passes.simplify.simplify import Simplify
from vacc_opt.tests.passes.mutation_bases import BASES, Base, attention, norm
from vacc_opt.tests.passes.mutations import Mutant, mutants, part, rebuilt

Array = npt.NDArray[Any]
EVERY = 8  # `make test` runs every eighth mutant, `make test-full` all
SIZES = {"B": 2, "S": 4}
POSITIONS = 16  # rows of the tables that the rotary passes make
# a guard against NaN replaces what only garbage can make: the root of a negative number, not a row without keys
GARBAGE = {("attention, filled", "operator:qs:Pow"), ("attention, filled", "operator:ts:Pow")}
# mutants of each pass: the list must not shrink unseen
FLOORS = {
    "fuse-rms-norm": 1300, "fuse-rotary": 2000, "fuse-gqa": 2700, "fuse-swiglu": 300, "split-packed-linear": 450,
    "fuse-residual-norm": 110, "fuse-head-norms": 390, "fold-norm-head": 200, "gather-channels": 120,
}  # fmt: skip


@cache
def base_graph(name: str) -> Graph:
    return BASES[name].graph()


@cache
def mutants_of(name: str) -> tuple[Mutant, ...]:
    return tuple(mutants(base_graph(name)))


def cases() -> Iterator[Any]:
    for name in BASES:
        for index, mutant in enumerate(mutants_of(name)):
            marks = () if index % EVERY == 0 else (pytest.mark.full,)
            yield pytest.param(name, mutant, id=f"{name}-{mutant.id}", marks=marks)


def feeds(graph: Graph) -> dict[str, Array]:
    """Seeded inputs: sizes of several orders, masks that hide some keys but never all, positions inside the tables."""
    rng = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for value in graph.inputs:
        shape = value.type.bind(_sizes(graph)).static_shape
        assert shape is not None
        array: Array = rng.standard_normal(shape)
        if value.name == "mask":
            array = np.where(rng.random(shape) < 0.3, -1e9, array)
            array[..., :1] = 0.5
        elif value.name == "x" and len(shape) > 1:
            array[..., 0, :] *= 1e-3  # where an epsilon counts
        elif value.name == "position_ids":
            array = rng.integers(0, POSITIONS, shape)
        elif not value.type.dtype.is_float:
            array = rng.integers(0, 4, shape)
        made[value.name] = np.asarray(array).astype(value.type.dtype.numpy)
    return made


def _sizes(graph: Graph) -> dict[str, int]:
    """Numbers for the named sizes: that of another input where a mutant has one in their place."""
    sizes = dict(SIZES)
    x, positions = graph.input_named("x"), graph.input_named("position_ids")
    if x is not None and positions is not None and x.shape is not None and len(x.shape) == 4:
        axes = (1, 0) if str(x.shape[0]) == "S" or str(x.shape[1]) == "B" else (0, 2)
        sizes |= {n: d for n, a in zip("BS", axes, strict=True) if isinstance(d := x.shape[a], int) and d > 1}
    return sizes


def run(graph: Graph) -> dict[str, Array]:
    """Outputs as the nodes stand, without rewrites by onnxruntime."""
    return Executable(graph, optimize=False).run(feeds(graph))[0]


@dataclass(frozen=True)
class Verdict:
    """What a pass made of a mutant: fused places, and what is wrong about it, empty for nothing."""

    fused: int
    wrong: str = ""


def judged(item: Pass, graph: Graph, *, before: Iterable[Pass] = ()) -> tuple[Verdict, PassRecord]:
    """Run ``item`` on a mutant; a fusion must compute what the mutant did, by the pass's kind."""
    original = copy(graph)
    text = to_text(graph)
    record = run_pipeline(graph, [*before, item]).records[-1]
    if not record.changes:
        return Verdict(0, "" if before or to_text(graph) == text else "the text changed"), record
    try:
        expected = run(original)
    except CheckError:
        return Verdict(record.fused or 0), record  # no model that onnxruntime runs: nothing to hold the fusion against
    tolerance = None if item.kind is Kind.EXACT else max(map(tolerance_of, (original, graph)))
    found = run(graph)
    difference = compare([Pair(n, a, found.get(n)) for n, a in expected.items()], tolerance).wrong
    return Verdict(record.fused or 0, str(difference or "")), record


def said(record: PassRecord) -> list[str]:
    """Reasons and the places that they are given for."""
    return [str(r) for r in record.remarks if r.kind == "missed"]


def expected_words(base: Base, mutant: Mutant) -> list[str]:
    """What a reason to decline the mutant may mention: the node, its operator, the attribute, the value, or the
    statement of the check that speaks of this part of the graph."""
    places = {mutant.place, *mutant.names}
    return [*mutant.names, *(words for words, parts in base.statements if parts & places)]


def is_candidate(base: Base, graph: Graph) -> bool:
    """False when the mutation took away what makes a person, or the pass, expect a fusion there."""
    if isinstance(base.item, PatternPass):
        return any(n.op in base.item.anchors and not base.item.done(n) for n in part(graph))
    return bool(run_pipeline(copy(graph), [base.item]).records[0].candidates)


@pytest.mark.parametrize(("name", "mutant"), cases())
def test_a_mutant_is_declined_with_the_right_reason_or_fused_right(name: str, mutant: Mutant) -> None:
    base = BASES[name]
    graph = rebuilt(base_graph(name), mutant.change)
    candidate = is_candidate(base, graph)
    verdict, record = judged(base.item, graph, before=[Simplify()] if mutant.same else ())
    if (name, mutant.id) in GARBAGE:
        assert verdict.wrong
        return
    assert not verdict.wrong, f"fused wrongly: {verdict.wrong}\n{to_text(rebuilt(base_graph(name), mutant.change))}"
    if mutant.same:
        assert verdict.fused == (0 if base.folds else base.fused), f"not fused after simplify: {said(record)}"
    elif not verdict.fused and candidate:
        words = expected_words(base, mutant)
        reasons = said(record)
        assert any(word in reason for word in words for reason in reasons), f"{reasons} name none of {words}"


@pytest.mark.parametrize("name", BASES)
def test_the_graph_that_is_mutated_is_fused(name: str) -> None:
    verdict, _ = judged(BASES[name].item, BASES[name].graph())
    assert verdict == Verdict(BASES[name].fused)


def test_no_mutant_is_lost() -> None:
    counts: Counter[str] = Counter()
    kinds: dict[str, set[str]] = {}
    for name, base in BASES.items():
        counts[base.item.name] += len(mutants_of(name))
        kinds.setdefault(base.item.name, set()).update(m.kind for m in mutants_of(name))
        ids = [m.id for m in mutants_of(name)]
        assert len(set(ids)) == len(ids), f"{name}: two mutants have one name"
    assert not {n: c for n, c in counts.items() if c < FLOORS[n]}
    common = {"operator", "swap", "operand", "insert", "harmless", "user", "shape"}
    kinds["gather-channels"] |= {
        "operator",
        "swap",
    }  # it moves rows: no operator of it has a like, nor a second operand
    assert not {n: common - found for n, found in kinds.items() if common - found}


# more than one change at once, where one alone would be ill-typed or no trap

TILED = [("heads = Constant", "one = Constant <value_ints = [1]> () tile = Constant <value_ints = [1, 2, 1, 1, 1]> () heads = Constant")]  # fmt: skip
TILED_KEYS = [*TILED, ("Unsqueeze (k, two)", "Unsqueeze (k, one)"), ("Expand (ku, group)", "Expand (ku, tile)")]
TILED_VALUES = [("Unsqueeze (v, two)", "Unsqueeze (v, one)"), ("Expand (vu, group)", "Expand (vu, tile)")]
AFTER_REPEAT = ("y = Attention <scale = 0.5, is_causal = 0> (q, kr, vr, mask)", "")
EAGER_KEYS = ("t = Transpose <perm = [0, 1, 3, 2]> (kr)", "t = Transpose <perm = [0, 1, 3, 2]> (r)")
TWO = np.array([1.0, 0.3], np.float32)
VARIANTS: dict[str, tuple[str, list[tuple[str, str]], str]] = {
    "keys and values repeated in the order of tiles": ("attention, grouped", [*TILED_KEYS, *TILED_VALUES], ""),
    "keys repeated in the order of tiles, values grouped": ("attention, grouped", TILED_KEYS, "k has 4 heads, v has 2"),
    "the same, exported as sdpa": ("attention, sdpa", TILED_KEYS, "k has 4 heads, v has 2"),
    "keys turned within the head": ("attention", [("perm = [0, 1, 3, 2]", "perm = [0, 2, 3, 1]")], ""),
    "a softmax over the heads": ("attention", [("Softmax <axis = -1> (masked)", "Softmax <axis = 1> (masked)")], "Softmax axis is 1, expected -1"),
    "a softmax over queries by another name": ("attention", [("Softmax <axis = -1> (masked)", "Softmax <axis = -2> (masked)")], "Softmax axis is -2, expected -1"),
    "a scale a channel": ("attention", [("float {0.5}", "float[4] {0.5, 0.5, 0.5, 0.6}")], "scale"),
    "a scale a head": ("attention", [("float {0.5}", "float[4,1,1] {0.5, 0.5, 0.5, 0.6}")], "scale"),
    "a mask by multiplication": ("attention", [("Add (scaled, mask)", "Mul (scaled, mask)")], "coefficient is the input mask, expected a constant number"),
    "the mask before the scale": ("attention", [("Mul (product, scale)", "Add (product, mask)"), ("Add (scaled, mask)", "Mul (scaled, scale)")], "found the input mask, expected Mul"),
    "a mean over two axes": ("norm", [("last = Constant <value_ints = [-1]>", "last = Constant <value_ints = [-2, -1]>")], "ReduceMean axes is [-2, -1], expected [-1]"),
    "epsilon outside the root": ("norm", [("shifted = Add (mean, eps) root = Sqrt (shifted)", "shifted = Sqrt (mean) root = Add (shifted, eps)"), ("shifted = Add (mean, eps)", "shifted = Sqrt (mean)"), ("root = Sqrt (shifted)", "root = Add (shifted, eps)")], "found Add root, expected Sqrt"),
    "the standard deviation": ("norm", [("SQUARE", ""), ("square = Pow (x, two)", "m = ReduceMean (x, last) d = Sub (x, m) square = Pow (d, two)")], "x is x, expected d again"),
    "halves swapped": ("rotary", [("Concat <axis = -1> (negative, low)", "Concat <axis = -1> (low, negative)")], "found Slice low, expected Neg"),
    "cos and sin exchanged": ("rotary", [("Mul (x, cos)", "Mul (x, sin)"), ("Mul (rotated, sin)", "Mul (rotated, cos)")], ""),
    "the inverse rotation": ("rotary", [("y = Add (straight, turned)", "y = Sub (straight, turned)")], "Sub y"),
    "interleaved frequencies": ("rotary", [("both = Concat <axis = -1> (angle, angle)", "u = Unsqueeze (angle, three) d = Concat <axis = -1> (u, u) four = Constant <value_ints = [0, 0, 4]> () both = Reshape (d, four)")], "its two halves differ"),
    "the interleaved operator": ("rotary, operator", [("interleaved = 0", "interleaved = 1")], "RotaryEmbedding interleaved is 1, expected 0"),
    "a rotation of the first channels": ("rotary, operator", [("interleaved = 0", "rotary_embedding_dim = 2"), (str(Literal(TWO)), str(Literal(TWO[:1])))], "rotary_embedding_dim is 2, expected 0"),
    "up broadcast over tokens": ("gated", [("float[2,4,4] up", "float[2,1,4] up")], "gate is float[2,4,4], up is float[2,1,4]"),
    "gate broadcast over rows": ("gated", [("float[2,4,4] gate", "float[4] gate")], "gate is float[4], up is float[2,4,4]"),
    "the sigmoid of the other": ("gated", [("Sigmoid (gate)", "Sigmoid (up)")], "gate is gate, expected up again"),
    "parts that leave a hole": ("packed", [("middle, end, last", "five, end, last"), ("end = Constant <value_ints = [8]>", "five = Constant <value_ints = [4]> () end = Constant <value_ints = [8]>")], ""),
    "parts backwards": ("packed", [("left = Slice (packed, zero, middle, last)", "three = Constant <value_ints = [3]> () before = Constant <value_ints = [-9]> () back = Constant <value_ints = [-1]> () left = Slice (packed, three, before, last, back)")], ""),
    "parts taken from the end": ("packed", [("middle = Constant <value_ints = [4]>", "middle = Constant <value_ints = [-4]>")], ""),
}  # fmt: skip


@pytest.mark.parametrize("case", VARIANTS)
def test_a_variant_is_declined_with_the_right_reason_or_fused_right(case: str) -> None:
    name, edits, reason = VARIANTS[case]
    text = BASES[name].text
    for old, new in edits:
        text = text.replace(old, new)
    assert text != BASES[name].text
    verdict, record = judged(BASES[name].item, replace(BASES[name], text=text).graph())
    assert not verdict.wrong
    if reason:
        assert not verdict.fused
        assert any(reason in r for r in said(record)), said(record)


SHARED = {
    "two norms of one mean": norm("square = Mul (x, x)", "n = Div (x, root) i = Reciprocal (root) m = Mul (x, i) v = Mul (w, n) u = Mul (m, w) y = Add (v, u)"),
    "a norm of a norm": norm("square = Mul (x, x)", "n = Div (x, root) a = Mul (w, n) s = Mul (a, a) q = ReduceMean <keepdims = 1> (s, last) e = Add (q, eps) r = Sqrt (e) b = Div (a, r) y = Mul (b, w)"),
    "two attentions of one product": attention("t = Transpose <perm = [0, 1, 3, 2]> (k) product = MatMul (q, t) scaled = Mul (product, scale) masked = Add (scaled, mask) weights = Softmax <axis = -1> (masked) a = MatMul (weights, v) w2 = Softmax <axis = -1> (scaled) b = MatMul (w2, v) y = Add (a, b)"),
    "an attention of an attention": attention("t = Transpose <perm = [0, 1, 3, 2]> (k) p = MatMul (q, t) s = Mul (p, scale) w = Softmax <axis = -1> (s) a = MatMul (w, v) p2 = MatMul (a, t) s2 = Mul (p2, scale) w2 = Softmax <axis = -1> (s2) y = MatMul (w2, v)"),
    "weights of one attention, values of two": attention("t = Transpose <perm = [0, 1, 3, 2]> (k) p = MatMul (q, t) s = Mul (p, scale) w = Softmax <axis = -1> (s) a = MatMul (w, v) b = MatMul (w, k) y = Add (a, b)"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARED)
def test_places_that_share_nodes_are_all_fused_right(case: str) -> None:
    item = FuseRmsNorm() if "norm" in case else FuseGqa()
    verdict, _ = judged(item, Base(item, SHARED[case]).graph())
    assert verdict == Verdict(2)


HIDDEN = {"-inf": -np.inf, "the least float": np.finfo(np.float32).min, "-1e9": -1e9, "-1e4": -1e4}


@pytest.mark.parametrize("name", ["attention", "attention, filled"])
@pytest.mark.parametrize("fill", HIDDEN)
def test_a_query_that_sees_no_key_stays_finite_and_leaves_the_others_alone(name: str, fill: str) -> None:
    """What such a query gets is not defined: NaN, the mean of all values, or zeros. It is a pad, which nothing reads."""
    text = BASES[name].text.replace("{-1e9}", f"{{{HIDDEN[fill]:.9g}}}")
    before = replace(BASES[name], text=text).graph()
    given = feeds(before)
    mask = np.where(given["mask"] < -1, -1.0, 0.5)
    mask[0, 0, 1] = -1
    given["mask"] = (mask if "filled" in name else np.where(mask < 0, HIDDEN[fill], 0.0)).astype(np.float32)
    after = copy(before)
    assert run_pipeline(after, [FuseGqa()]).records[0].fused == 1
    expected, found = (Executable(g, optimize=False).run(given)[0]["y"] for g in (before, after))
    assert np.isfinite(found).all()
    seen = np.ones(found.shape[:3], bool)
    seen[0, :, 1] = False
    assert compare([Pair("y", expected[seen], found[seen])], tolerance_of(after)).wrong is None


# the judgement itself: passes that do not look closely must be caught


@dataclass(frozen=True)
class LooseNorm(FuseRmsNorm):
    """Takes any mean, any epsilon and any weight."""

    def pattern(self, x: Capture, weight: Const, eps: Scalar) -> Pattern:
        mean = op.ReduceMean(op.Pow(x, ...) | x * x, ...)
        return x * op.Reciprocal(op.Sqrt(mean + eps)) * weight

    def check(self, m: Match) -> Iterator[Reason]:
        yield from ()


@dataclass(frozen=True)
class LooseRotary(FuseRotary):
    """Takes any two slices for the halves."""

    def check(self, m: Match) -> Iterator[Reason]:
        return (r for r in super().check(m) if "slices" not in str(r))


@dataclass(frozen=True)
class LooseGqa(FuseGqa):
    """Takes any softmax."""

    def pattern(self, q: Capture, k: Capture, v: Capture, mask: Capture, scale: Scalar) -> Pattern:  # type: ignore[override]
        weights = op.Softmax(op.MatMul(q, k) * scale + mask)
        return op.MatMul(weights, v)


@dataclass(frozen=True)
class LooseSwiglu(FuseSwiglu):
    """Takes any function for a sigmoid."""

    def pattern(self, gate: Capture, up: Capture) -> Pattern:
        return gate * (op.Sigmoid(gate) | op.HardSigmoid(gate)) * up


@dataclass(frozen=True)
class LooseSplit(SplitPackedLinear):
    """Exchanges the first two rows of each weight."""

    name: ClassVar[str] = "loose-split"

    def run(self, graph: Graph, rw: Any) -> Any:
        outcome = super().run(graph, rw)
        for value in graph.constants():
            if value.const is not None and value.const.shape == (4, 4):
                array = value.const.read()
                with rw.applying():
                    rw.set_const(value, Literal(array[:, [1, 0, 2, 3]]))
        return outcome


LOOSE: dict[str, tuple[Pass, tuple[str, ...]]] = {
    "norm": (LooseNorm(), ("attribute", "constant")),
    "rotary": (LooseRotary(positions=POSITIONS), ("constant",)),
    "attention": (LooseGqa(), ("attribute",)),
    "gated": (LooseSwiglu(), ("operator",)),
    "packed": (LooseSplit(), ("user",)),
}


@pytest.mark.parametrize("name", LOOSE)
def test_a_pass_that_does_not_look_closely_is_caught(name: str) -> None:
    item, kinds = LOOSE[name]
    wrong = 0
    for mutant in mutants_of(name):
        if mutant.kind in kinds:
            try:
                wrong += bool(judged(item, rebuilt(base_graph(name), mutant.change))[0].wrong)
            except CheckError:
                wrong += 1  # the verifier or the rewriter saw it first
    assert wrong

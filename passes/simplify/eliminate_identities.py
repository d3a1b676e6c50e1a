"""Remove operations that give back their input, and make symbolic reshapes constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Dim, DType, Graph, Node, Value
from vacc_opt.ir.infer import RULES_OPSET, elements_of
from vacc_opt.ir.infer_rules import slice_bounds
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.types import least
from vacc_opt.passes.infra.base import Kind, Outcome, Pass
from vacc_opt.passes.infra.driver import Make, Rule, replacement, run_rules
from vacc_opt.passes.infra.patterns.values import scalar
from vacc_opt.passes.infra.registry import register


@register
@dataclass(frozen=True)
class EliminateIdentities(Pass):
    """Drop Identity, full Slice, same-shape Reshape and Expand, same-type Cast, x*1, x+0, transpose pairs and the like.

    A Reshape whose target entries are dimensions of its input gets a constant target with 0 (same) and -1 (the rest),
    which ends Shape and Concat chains.

    Before:
        g (float[B,8] x) => (float[B,8] y) <float zero = {0}> {
            a = Add (x, zero)
            b = Identity (a)
            y = Neg (b)
        }
    After:
        g (float[B,8] x) => (float[B,8] y) {
            y = Neg (x)
        }
    """

    name: ClassVar[str] = "eliminate-identities"
    kind: ClassVar[Kind] = Kind.EXACT

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Apply the rules until none applies."""
        if graph.opset < RULES_OPSET:
            return Outcome(f"nothing at opset {graph.opset}: the rules are for {RULES_OPSET} and newer")
        counts = run_rules(graph, rw, identity_rules(graph))
        return Outcome(f"removed {counts.total()} nodes")


def identity_rules(graph: Graph) -> list[Rule]:
    """The rules, each named after what it drops or makes; none for a graph of an older opset."""
    if graph.opset < RULES_OPSET:
        return []
    return [replacement(name, roots.split(), make) for name, roots, make in RULES]


def _identity(node: Node, rw: Rewriter) -> Value | None:
    return node.inputs[0]


def _unchanged(node: Node, rw: Rewriter) -> Value | None:
    x = node.inputs[0]
    assert x is not None
    return x if x.type == node.output.type and x.type.shape is not None else None


def _expand(node: Node, rw: Rewriter) -> Value | None:
    x, target = node.inputs
    assert x is not None
    assert target is not None
    # the types agree already where two names are broadcast: only entries that are x's own, or 1, expand nothing
    return _unchanged(node, rw) if _expands_nothing(x.shape, elements_of(target)) else None


def _expands_nothing(shape: tuple[Dim, ...] | None, by: tuple[Dim, ...] | None) -> bool:
    """True when a tensor of ``shape`` stays what it is if it is broadcast with one of shape ``by``."""
    if shape is None or by is None or len(by) > len(shape):
        return False
    return all(b == 1 or a == b for a, b in zip(reversed(shape), reversed(by), strict=False))


def _slice(node: Node, rw: Rewriter) -> Value | None:
    x, starts, stops = node.inputs[:3]
    assert x is not None
    if x.shape is None or starts is None or stops is None:
        return None
    low, high = elements_of(starts), elements_of(stops)
    axes = _ints(node.input(3)) or (tuple(range(len(low))) if low is not None and node.input(3) is None else None)
    steps = _ints(node.input(4)) or (1,) * len(axes or ())
    unknown = node.input(4) is not None and _ints(node.input(4)) is None
    if low is None or high is None or axes is None or unknown or set(steps) != {1}:
        return None
    for axis, a, b in zip(axes, low, high, strict=True):
        bounds = slice_bounds(x.shape[axis], a, b, 1)
        if bounds is None or bounds[0] != 0 or bounds[1] != x.shape[axis]:
            return None
    return x


def _ints(value: Value | None) -> tuple[int, ...] | None:
    entries = elements_of(value) if value is not None else None
    if entries is None:
        return None
    numbers = tuple(e for e in entries if isinstance(e, int))
    return numbers if len(numbers) == len(entries) else None


def _transpose(node: Node, rw: Rewriter) -> Value | None:
    x = node.inputs[0]
    assert x is not None
    perm = node.attributes.get("perm")
    if perm is None:
        return None
    if tuple(perm) == tuple(range(len(perm))):
        return x
    inner = x.producer
    if inner is not None and inner.op == "Transpose" and "perm" in inner.attributes:
        joined = tuple(inner.attributes["perm"][p] for p in perm)
        return inner.inputs[0] if joined == tuple(range(len(perm))) else rw.op.Transpose(inner.inputs[0], perm=joined)
    return None


def _neutral(number: float) -> Make:
    def rule(node: Node, rw: Rewriter) -> Value | None:
        sides = ((0, 1), (1, 0)) if node.op in ("Add", "Mul") else ((0, 1),)
        for keep, other in sides:
            value = node.inputs[keep]
            constant = node.inputs[other]
            if value is None or constant is None or scalar(constant) != number or value.type != node.output.type:
                continue
            if _expands_nothing(value.shape, constant.shape):
                return value
        return None

    return rule


def _reshape(node: Node, rw: Rewriter) -> Value | None:
    same = _unchanged(node, rw)
    if same is not None:
        return same
    x, target = node.inputs
    assert x is not None
    assert target is not None
    inner = x.producer
    wanted = elements_of(target)
    if inner is not None and inner.op in ("Reshape", "Squeeze", "Unsqueeze") and target.const is not None:
        numbers = _ints(target)
        if numbers is not None and 0 not in numbers:
            return rw.op.Reshape(inner.inputs[0], target)
    if target.const is not None or wanted is None or x.shape is None:
        return None
    entries = constant_target(x.shape, wanted)
    return None if entries is None else rw.op.Reshape(x, rw.ints(*entries))


def constant_target(shape: tuple[Dim, ...], wanted: tuple[Dim, ...]) -> list[int] | None:
    """The target of a Reshape in numbers: 0 where a symbolic entry repeats the input's, -1 for one other."""
    entries: list[int] = []
    for axis, entry in enumerate(wanted):
        if isinstance(entry, int):
            entries.append(entry)
        elif axis < len(shape) and shape[axis] == entry:
            entries.append(0)
        else:
            entries.append(-1)
    # a literal 0 would now mean "same"; and nothing can be inferred beside a kept size that may be 0
    if entries.count(-1) > 1 or any(w == 0 for w in wanted):
        return None
    empty = any(entry == 0 and least(shape[axis]) <= 0 for axis, entry in enumerate(entries))
    return None if empty and -1 in entries else entries


def _cast_like(node: Node, rw: Rewriter) -> Value | None:
    x, like = node.inputs
    assert x is not None
    assert like is not None
    if x.type.dtype is like.type.dtype:
        return x
    return rw.op.Cast(x, to=like.type.dtype.onnx, **node.attributes)


def _concat(node: Node, rw: Rewriter) -> Value | None:
    """Parts without elements join nothing; one part alone is the whole."""
    axis = int(node.attributes["axis"])
    kept = [v for v in node.inputs if v is None or v.shape is None or v.shape[axis] != 0] or node.inputs[:1]
    if len(kept) == 1:
        return kept[0]
    return rw.op.Concat(*kept, axis=axis) if len(kept) < len(node.inputs) else None


def _and(node: Node, rw: Rewriter) -> Value | None:
    for keep, other in ((0, 1), (1, 0)):
        value = node.inputs[keep]
        ones = node.inputs[other]
        if value is None or ones is None or value.type.dtype is not DType.BOOL or not _all_true(ones):
            continue
        if value.type == node.output.type and _expands_nothing(value.shape, ones.shape):
            return value
    return None


def _all_true(value: Value | None) -> bool:
    """True for a mask of ones, also one of symbolic size: a Cast/Expand/Reshape of the constant 1."""
    while value is not None and value.producer is not None and value.producer.op in ("Cast", "Expand", "Reshape"):
        value = value.producer.inputs[0]
    return scalar(value) == 1.0


RULES: tuple[tuple[str, str, Make], ...] = (
    ("drop-identity", "Identity", _identity),
    ("drop-cast", "Cast", _unchanged),
    ("drop-expand", "Expand", _expand),
    ("cast-like", "CastLike", _cast_like),
    ("drop-slice", "Slice", _slice),
    ("join-transposes", "Transpose", _transpose),
    ("reshape-to-constant", "Reshape", _reshape),
    ("drop-concat", "Concat", _concat),
    ("and-true", "And", _and),
    ("add-zero", "Add Sub", _neutral(0.0)),
    ("multiply-by-one", "Mul Div", _neutral(1.0)),
)

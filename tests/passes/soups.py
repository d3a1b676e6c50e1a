"""Random mixtures of operators: well-typed graphs with symbolic sizes, constants, dead nodes and odd interfaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from vacc_opt.ir import Dim, DType, Graph, Value
from vacc_opt.ir.types import Shape
from vacc_opt.tests.passes.graphs import BATCH, SEQ, Builder, Draw

SIZES = {"batch": 2, "seq": 7}  # the sizes that seeded inputs have
# smooth functions with slopes near 1 or below, so that rounding stays rounding
UNARY = ("Neg", "Abs", "Tanh", "Sigmoid", "Sin", "Cos", "Relu", "Identity", "Erf")
BINARY = ("Add", "Mul", "Max", "Min")
REDUCE = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2")


class Soup(Builder):
    """A graph that grows by drawn steps; each adds values to the pool that later steps take from."""

    def __init__(self, draw: Draw, opset: int) -> None:
        super().__init__(draw, "soup", opset)
        self.pool: list[Value] = []

    def take(self, fits: Callable[[Value], bool] = lambda v: True) -> Value | None:
        """A float value of the pool that fits; the newest is the simplest."""
        found = [v for v in reversed(self.pool) if v.type.dtype is DType.FLOAT and v.shape is not None and fits(v)]
        return self.draw(st.sampled_from(found)) if found else None

    def step(self) -> None:
        """One drawn step, if what it needs is there."""
        made = self.draw(st.sampled_from(STEPS))(self)
        if made is not None:
            self.pool += made if isinstance(made, list) else [made]

    def array(self, *shape: int) -> np.ndarray:
        """Seeded numbers between 0.5 and 1.5, of both signs."""
        signs = np.where(self.rng.random(shape) < 0.5, -1, 1)
        return (signs * self.rng.uniform(0.5, 1.5, shape)).astype(np.float32)


def rank(value: Value) -> int:
    assert value.rank is not None
    return value.rank


def numbers(shape: Shape | None) -> list[tuple[int, int]]:
    """(axis, size) of the sizes that are numbers."""
    return [(axis, size) for axis, size in enumerate(shape or ()) if isinstance(size, int)]


def broadcasts(a: Shape, b: Shape) -> bool:
    """True when the sizes are equal, or 1, from the back."""
    return all(x == y or x == 1 or y == 1 for x, y in zip(reversed(a), reversed(b), strict=False))


# steps: each gives the values that it makes, or None when it finds nothing to work on


def unary(s: Soup) -> Value | None:
    x = s.take()
    return None if x is None else getattr(s.op, s.one_of(*UNARY))(x)


def binary(s: Soup) -> Value | None:
    x = s.take()
    y = None if x is None else s.take(lambda v: broadcasts(v.shape or (), x.shape or ()))
    return None if y is None else getattr(s.op, s.one_of(*BINARY))(x, y)


def with_constant(s: Soup) -> Value | None:
    """An operation with a constant: often one that changes nothing, now and then of a shape that does."""
    x = s.take()
    if x is None:
        return None
    op, number = s.one_of(("Add", 0), ("Mul", 1), ("Sub", 0), ("Div", 1), ("Mul", 2), ("Add", 1), ("Mul", 0), ("Div", 2), ("Mul", 1.000009))  # fmt: skip
    shape = s.one_of((), (1,), (1,) * rank(x), (1,) * (rank(x) + 1), "last")
    if shape == "last":
        size = x.shape[-1] if x.shape else 1
        shape = (size if isinstance(size, int) else 1,)
    constant = s.rw.const(np.full(shape, number, np.float32), "c")
    flipped = op in ("Add", "Mul") and s.yes()
    return getattr(s.op, op)(*((constant, x) if flipped else (x, constant)))


def no_change(s: Soup) -> Value | None:
    """An operation that gives back its operand."""
    x = s.take()
    if x is None:
        return None
    return s.one_of(
        lambda: s.op.Identity(x),
        lambda: s.op.Cast(x, to=DType.FLOAT.onnx),
        lambda: s.op.Reshape(x, s.op.Shape(x)),
        lambda: s.op.Expand(x, s.op.Shape(x)),
        lambda: s.op.Expand(x, s.rw.ints(1)),
        lambda: s.op.Concat(x, axis=0) if rank(x) else s.op.Identity(x),
        lambda: s.op.CastLike(x, s.number(0.0)),
        lambda: s.op.CastLike(s.op.CastLike(x, s.number(0.0, np.float64)), x),
        lambda: s.op.Squeeze(s.op.Unsqueeze(x, s.rw.ints(0)), s.rw.ints(0)),
        lambda: s.op.Cast(s.op.Cast(x, to=DType.DOUBLE.onnx), to=DType.FLOAT.onnx),
        lambda: s.op.Slice(x, s.rw.ints(0), s.rw.ints(2**62), s.rw.ints(-1)) if rank(x) else s.op.Identity(x),
        lambda: s.op.Where(s.rw.const(np.array(s.yes())), x, x),
        lambda: s.op.Dropout(x),
    )()


def transposed(s: Soup) -> Value | None:
    x = s.take(lambda v: 1 < rank(v) < 5)
    if x is None:
        return None
    perm = tuple(s.draw(st.permutations(range(rank(x)))))
    return s.op.Transpose(x) if s.yes() and perm == tuple(reversed(range(rank(x)))) else s.op.Transpose(x, perm=perm)


def transposed_twice(s: Soup) -> Value | None:
    x = s.take(lambda v: 1 < rank(v) < 5)
    if x is None:
        return None
    first = tuple(s.draw(st.permutations(range(rank(x)))))
    back = tuple(first.index(i) for i in range(rank(x)))
    return s.op.Transpose(s.op.Transpose(x, perm=first), perm=back if s.yes() else first)


def reshaped(s: Soup) -> Value | None:
    """To a target of numbers, 0 and -1, or one computed from Shape as exporters write it."""
    x = s.take(lambda v: 0 < rank(v) < 5)
    if x is None or x.shape is None:
        return None
    dims: list[Dim] = list(x.shape)
    at = s.draw(st.integers(0, len(dims) - 1))
    size = dims[at]
    if isinstance(size, int) and size > 1 and s.yes():
        factor = next(f for f in (2, 3, size) if size % f == 0)
        dims[at : at + 1] = [size // factor, factor]
    elif len(dims) > 1:
        at = min(at, len(dims) - 2)
        dims[at : at + 2] = [dims[at] * dims[at + 1]]
    if s.yes():
        open_ = s.draw(st.integers(0, len(dims) - 1))
        entries = [-1 if i == open_ else d for i, d in enumerate(dims)]
    else:
        entries = list(dims)
    if all(isinstance(e, int) for e in entries):
        return s.op.Reshape(x, s.rw.ints(*(e for e in entries if isinstance(e, int))))
    zeros = [0 if i < rank(x) and x.shape[i] == e else e for i, e in enumerate(entries)]
    if all(isinstance(e, int) for e in zeros) and s.yes():
        return s.op.Reshape(x, s.rw.ints(*(e for e in zeros if isinstance(e, int))))
    lengths = s.op.Shape(x)
    parts = []
    for entry in entries:
        if isinstance(entry, int):
            parts.append(s.rw.ints(entry))
        elif entry in x.shape:
            parts.append(s.op.Gather(lengths, s.rw.ints(x.shape.index(entry))))
        else:
            both = next(i for i, (a, b) in enumerate(pairwise(x.shape)) if a * b == entry)
            a, b = (s.op.Gather(lengths, s.rw.ints(i)) for i in (both, both + 1))
            parts.append(s.op.Mul(a, b))
    return s.op.Reshape(x, s.op.Concat(*parts, axis=0))


def sliced(s: Soup) -> Value | None:
    x = s.take(lambda v: bool(numbers(v.shape)))
    if x is None:
        return None
    axis, size = s.draw(st.sampled_from(numbers(x.shape)))
    start, step = s.draw(st.integers(0, size - 1)), s.one_of(1, 1, 2, -1)
    stop = s.draw(st.integers(start + 1, size)) if step > 0 else -size - 1
    if step > 0 and s.yes():
        start, stop = start - size, s.one_of(stop, stop if stop < size else 2**62)
    named = axis if s.yes() else axis - rank(x)
    operands = [s.rw.ints(start), s.rw.ints(stop), s.rw.ints(named)]
    return s.op.Slice(x, *operands, *([s.rw.ints(step)] if step != 1 or s.yes() else []))


def last_steps(s: Soup) -> Value | None:
    """All but the first along a symbolic axis, or the last one."""
    x = s.take(lambda v: SEQ in (v.shape or ()))
    if x is None or x.shape is None:
        return None
    axis, start = s.rw.ints(x.shape.index(SEQ)), s.one_of(-1, 1)
    return s.op.Slice(x, s.rw.ints(start), s.rw.ints(2**63 - 1), axis)


def concatenated(s: Soup) -> Value | None:
    x = s.take(lambda v: rank(v) > 0)
    if x is None or x.shape is None:
        return None
    axis = s.draw(st.integers(0, rank(x) - 1))
    rest = [d for i, d in enumerate(x.shape) if i != axis]
    alike = s.take(lambda v: rank(v) == rank(x) and [d for i, d in enumerate(v.shape or ()) if i != axis] == rest)
    assert alike is not None
    return s.op.Concat(x, alike, axis=axis if s.yes() else axis - rank(x))


def parts(s: Soup) -> list[Value] | None:
    x = s.take(lambda v: any(size > 1 for _, size in numbers(v.shape)))
    if x is None:
        return None
    axis, size = s.draw(st.sampled_from([n for n in numbers(x.shape) if n[1] > 1]))
    cut = s.draw(st.integers(1, size - 1))
    if s.yes():
        return list(s.rw.add("Split", [x, s.rw.ints(cut, size - cut)], {"axis": axis}, outputs=2).outputs)
    return list(s.rw.add("Split", [x], {"axis": axis, "num_outputs": 2}, outputs=2).outputs)


def gathered(s: Soup) -> Value | None:
    x = s.take(lambda v: bool(numbers(v.shape)) and rank(v) < 4)
    if x is None:
        return None
    axis, size = s.draw(st.sampled_from(numbers(x.shape)))
    index = s.draw(st.integers(-size, size - 1))
    return s.op.Gather(x, s.one_of(s.rw.ints(index), s.number(index, np.int64), s.rw.ints(index, 0)), axis=axis)


def unsqueezed(s: Soup) -> Value | None:
    x = s.take(lambda v: rank(v) < 4)
    return None if x is None else s.op.Unsqueeze(x, s.rw.ints(s.draw(st.integers(-rank(x) - 1, rank(x)))))


def squeezed(s: Soup) -> Value | None:
    x = s.take(lambda v: 1 in (v.shape or ()))
    return None if x is None or x.shape is None else s.op.Squeeze(x, s.rw.ints(x.shape.index(1)))


def expanded(s: Soup) -> Value | None:
    """A dimension of size 1 repeated, which a Reshape may join with its neighbour."""
    x = s.take(lambda v: rank(v) < 4)
    if x is None:
        return None
    axis = s.draw(st.integers(0, rank(x)))
    wide = s.op.Unsqueeze(x, s.rw.ints(axis))
    times = s.rw.ints(*(2 if i == axis else 1 for i in range(rank(wide))))
    return s.op.Expand(wide, times) if s.yes() else s.op.Tile(wide, times)


def linear(s: Soup) -> Value | None:
    x = s.take(lambda v: rank(v) > 1 and isinstance((v.shape or (0,))[-1], int))
    if x is None or x.shape is None:
        return None
    width, size = x.shape[-1], s.one_of(4, 6)
    assert isinstance(width, int)
    if rank(x) == 2 and s.yes():
        matrix = s.weight("gemm.weight", *((size, width) if (turned := s.yes()) else (width, size)))
        bias = [s.weight("gemm.bias", size)] if s.yes() else []
        given = {"transB": 1} if turned else {}
        return s.op.Gemm(x, matrix, *bias, **given, **({"alpha": 0.5} if s.yes() else {}))
    return s.linear(x, size, "linear", bias=s.yes())


def packed(s: Soup) -> list[Value] | None:
    x = s.take(lambda v: rank(v) == 3 and isinstance((v.shape or (0,))[-1], int))
    if x is None:
        return None
    sizes = s.one_of((4, 4), (2, 6), (4, 2, 2))
    return s.split(s.linear(x, sum(sizes), "packed", bias=s.yes()), sizes)


def product(s: Soup) -> Value | None:
    """X x^T, over the last axes."""
    x = s.take(lambda v: rank(v) > 1)
    if x is None:
        return None
    perm = (*range(rank(x) - 2), rank(x) - 1, rank(x) - 2)
    return s.op.Mul(s.op.MatMul(x, s.op.Transpose(x, perm=perm)), s.number(0.25))


def softmax(s: Soup) -> Value | None:
    x = s.take(lambda v: rank(v) > 0)
    return None if x is None else s.op.Softmax(x, axis=s.draw(st.integers(-rank(x), rank(x) - 1)))


def reduced(s: Soup) -> Value | None:
    x = s.take(lambda v: rank(v) > 0)
    if x is None:
        return None
    axes = s.rw.ints(s.draw(st.integers(-rank(x), rank(x) - 1)))
    return getattr(s.op, s.one_of(*REDUCE))(x, axes, keepdims=s.one_of(1, 0))


def chosen(s: Soup) -> Value | None:
    """Where, by an input, a constant, or positions."""
    x = s.take()
    y = None if x is None else s.take(lambda v: broadcasts(v.shape or (), x.shape or ()))
    if x is None or y is None:
        return None
    flags = [v for v in s.pool if v.type.dtype is DType.BOOL and broadcasts(v.shape or (), x.shape or ())]
    ok = [v for v in flags if broadcasts(v.shape or (), y.shape or ())]
    condition = s.draw(st.sampled_from(ok)) if ok and s.yes() else s.rw.const(np.array([s.yes()]))
    return s.op.Where(condition, x, y)


def flags(s: Soup) -> Value:
    """A mask over positions, as integers compare."""
    steps = s.op.Range(s.number(0, np.int64), s.number(4, np.int64), s.number(1, np.int64))
    compared = getattr(s.op, s.one_of("Less", "Equal", "GreaterOrEqual"))(steps, s.number(2, np.int64))
    given = s.graph.input_named("flag")
    mask = given if given is not None and given.rank == 1 else compared
    return s.op.And(mask, s.rw.const(np.array([s.yes(), True, True, True]))) if s.yes() else mask


def counted(s: Soup) -> Value | None:
    """A float made of a size: Shape, arithmetic, Cast."""
    x = s.take(lambda v: rank(v) > 0)
    if x is None:
        return None
    at = s.draw(st.integers(0, rank(x) - 1))
    size = s.op.Squeeze(s.op.Shape(x, start=at, end=at + 1)) if s.yes() else s.op.Gather(s.op.Shape(x), s.number(at, np.int64))  # fmt: skip
    more = s.op.Add(size, s.number(1, np.int64)) if s.yes() else size
    return s.op.Mul(s.op.Cast(more, to=DType.FLOAT.onnx), s.number(0.01))


def filled(s: Soup) -> Value | None:
    """Zeros or ones of a computed shape."""
    x = s.take(lambda v: rank(v) > 0)
    value = np.array([s.one_of(0.0, 1.0)], np.float32)
    return None if x is None else s.op.ConstantOfShape(s.op.Shape(x), value=value)


def of_constants(s: Soup) -> Value:
    """Something that depends on constants alone."""
    a, b = s.rw.const(s.array(4), "a"), s.rw.const(s.array(2, 4), "b")
    return s.one_of(
        lambda: s.op.Tanh(s.op.Add(a, b)),
        lambda: s.op.Concat(b, s.op.Unsqueeze(a, s.rw.ints(0)), axis=0),
        lambda: s.op.ReduceMean(b, s.rw.ints(0), keepdims=0),
        lambda: s.op.Gather(b, s.rw.ints(1), axis=0),
        lambda: s.op.MatMul(b, s.op.Unsqueeze(a, s.rw.ints(1))),
    )()


def again(s: Soup) -> Value | None:
    """What an earlier node computes, computed once more."""
    nodes = [n for n in s.graph.nodes() if len(n.outputs) == 1 and n.output.type.dtype is DType.FLOAT]
    if not nodes:
        return None
    node = s.draw(st.sampled_from(nodes))
    declared = [node.output.type]
    return s.rw.add(node.op_type, node.inputs, node.attributes, domain=node.domain, declared=declared).output


def normalized(s: Soup) -> Value | None:
    x = s.take(lambda v: rank(v) > 1 and isinstance((v.shape or (0,))[-1], int))
    return None if x is None else s.norm(x, "norm")


def _is_tokens(value: Value) -> bool:
    shape = value.shape or ()
    return len(shape) == 3 and shape[:2] == (BATCH, SEQ) and isinstance(shape[2], int)


def attended(s: Soup) -> Value | None:
    """Attention of tokens to themselves, rotated, with grouped heads."""
    x = s.take(_is_tokens)
    if x is None:
        return None
    heads, kv = s.one_of((2, 1), (2, 2), (4, 2))
    q = s.heads(s.linear(x, heads * 4, "q"), heads, 4)
    k, v = (s.heads(s.linear(x, kv * 4, name), kv, 4) for name in "kv")
    positions = s.graph.input_named("position_ids")
    if positions is not None and s.yes():
        q, k = s.rotary(q, positions), s.rotary(k, positions)
    mask = s.graph.input_named("mask")
    return s.joined(s.attention(q, k, v, mask if s.yes() else None), heads * 4)


def fed_forward(s: Soup) -> Value | None:
    x = s.take(_is_tokens)
    return None if x is None else s.gated(s.linear(x, 6, "gate"), s.linear(x, 6, "up"))


def embedded(s: Soup) -> Value | None:
    ids = s.graph.input_named("input_ids")
    return None if ids is None else s.op.Gather(s.weight("embed.weight", 9, 4), ids)


def called(s: Soup) -> Value | None:
    """A call of a local function of one input, of which there may be several calls."""
    x = s.take()
    if x is None or any("." in str(d) for d in x.shape or ()):
        return None
    name = next((n for n, body in s.graph.functions.items() if body.inputs[0].type == x.type), None)
    if name is None or s.yes():
        name = f"local::Part{len(s.graph.functions)}"
        body = Soup(s.draw, s.graph.opset)
        body.graph.name = name
        body.pool.append(body.input("a", x.type.dtype, *(x.shape or ())))
        for step in s.draw(st.lists(st.sampled_from(INSIDE), min_size=1, max_size=4)):
            made = step(body)
            body.pool += [made] if isinstance(made, Value) else []
        body.rw.set_output("b", body.pool[-1])
        if not body.pool[-1].producer or any("." in str(d) for d in body.pool[-1].shape or ()):
            return None
        s.graph.functions[name] = body.finished()
        s.graph.domains["local"] = 1
    result = s.graph.functions[name].outputs["b"].type
    return s.rw.add(name.partition("::")[2], [x], domain="local", declared=[result]).output


INSIDE: tuple[Callable[[Soup], Any], ...] = (unary, binary, with_constant, no_change, transposed, reshaped, linear, softmax, again, normalized)  # fmt: skip
STEPS: tuple[Callable[[Soup], Any], ...] = (
    unary, binary, with_constant, no_change, transposed, transposed_twice, reshaped, sliced, last_steps, concatenated,
    parts, gathered, unsqueezed, squeezed, expanded, linear, packed, product, softmax, reduced, chosen, flags, counted,
    filled, of_constants, again, normalized, attended, fed_forward, embedded, called, with_constant, no_change, again,
)  # fmt: skip


def _inputs(s: Soup) -> Iterator[Value]:
    yield s.input("x", DType.FLOAT, *s.one_of((BATCH, SEQ, 4), (2, 3, 4), (BATCH, 4), (4,), (BATCH, 2, SEQ, 4)))
    if s.yes():
        yield s.input("y", DType.FLOAT, *s.one_of((BATCH, SEQ, 4), (SEQ, 1), (4,), ()))
    if s.yes():
        s.input("input_ids", DType.INT64, BATCH, SEQ)
        s.input("position_ids", DType.INT64, BATCH, SEQ)
    if s.yes():
        s.input("mask", DType.FLOAT, 1, 1, SEQ, SEQ)
    if s.yes():
        yield s.input("flag", DType.BOOL, *s.one_of((4,), ()))


@st.composite
def soups(draw: Draw) -> Graph:
    """A graph of up to 16 drawn steps; outputs may be inputs, constants, or one value under two names."""
    s = Soup(draw, draw(st.sampled_from((24, 23, 20))))
    s.pool += _inputs(s)
    for _ in range(draw(st.integers(1, 16))):
        s.step()
    made = [v for v in s.graph.values.values() if v.producer is not None]
    outputs = [draw(st.sampled_from(made[::-1]))] if made else [s.pool[0]]
    if s.yes():
        outputs += draw(st.lists(st.sampled_from(list(s.graph.values.values())[::-1]), max_size=3))
    for index, value in enumerate(outputs):
        s.rw.set_output("logits" if index == 0 and _is_tokens(value) else f"out{index}", value)
    return s.finished()

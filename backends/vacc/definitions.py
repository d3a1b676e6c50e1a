"""What each family of kernels computes, element by element, told without tiles: a kernel's stores are held against it.

A definition says what a box of an output is in terms of boxes of the inputs. Numbers that belong to the model (an
epsilon, a scale, the form of a GELU) are taken from the kernel itself, where all operations of a kind agree on them.
Families that are not listed have no definition; their kernels are held to the general rules alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vacc_opt.backends.vacc.epilogue import GATES
from vacc_opt.backends.vacc.expressions import Expressions, Node
from vacc_opt.backends.vacc.schedule import Kernel, Op

Range = tuple[int, int]


@dataclass(frozen=True)
class Wanted:
    """The box of output `name` that a store writes, and what a definition may look at."""

    kernel: Kernel
    scalars: Mapping[str, int]
    make: Expressions
    name: str
    box: tuple[Range, ...]

    def of(self, param: str, *box: Range | None) -> Node:
        """A box of a parameter; None is a whole axis."""
        one = self.kernel.param[param]
        ranges = [(0, size) if at is None else at for at, size in zip(box, one.shape, strict=True)]
        return self.make.box(param, one.dtype, [a for a, _ in ranges], [b for _, b in ranges])

    def apply(self, kind: str, *parts: Node) -> Node:
        """A vector operation with the attributes that the kernel gives it; rows become one element."""
        shape = self.shape if kind not in {"row_mean", "inverse_rms", "row_dot"} else (*parts[0].shape[:-1], 1)
        op = self.operation(kind)
        given = dict(op.attributes) if op else {}
        data = tuple(_number(given[name]) for name in sorted(given))
        return self.make.apply(kind, parts, data, shape)

    def operation(self, kind: str) -> Op | None:
        """The first operation of a kind."""
        return next((op for _, op in self.kernel.operations() if op.kind == kind), None)

    def stored(self, node: Node, param: str | None = None) -> Node:
        """The value rounded to the type of a parameter, by default of the output."""
        return self.make.rounded(node, self.kernel.param[param or self.name].dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the box."""
        return tuple(b - a for a, b in self.box)


def _number(value: object) -> object:
    return value if isinstance(value, float) else int(value.constant)  # type: ignore[attr-defined]


Definition = Callable[[Wanted], Node]


def _linear(w: Wanted) -> Node:
    """Sums of a weight with their scale and bias; what the name of the kernel lists is done to them, in its order."""
    rows, (first, last) = w.box[-2:]
    fused, given = family(w.kernel.name).split("+")[1:], w.kernel.param
    if len(w.box) == 3:  # rows of a head
        start = w.box[0][0] * given[w.name].shape[2]
        first, last = start + first, start + last
    columns = first, last
    at = w.scalars["pos"] if "append" in fused else 0
    shape = rows[1] - rows[0], last - first
    x = w.of("X", (rows[0] - at, rows[1] - at), None)

    def sums(weight: str, scale: str, bias: str) -> Node:
        found = w.make.dot(x, w.of(weight, columns, None), True, shape)
        if "row_scale" in fused:
            found = w.make.apply("mul", (found, w.of("RS", (rows[0] - at, rows[1] - at), None)), (), shape)
        found = w.make.apply("mul", (found, w.of(scale, columns)), (), shape) if scale in given else found
        return w.make.apply("add", (found, w.of(bias, columns)), (), shape) if "bias" in fused else found

    node = sums("W", "S", "B")
    for one in fused:
        if one in GATES:
            node = _as_given(w, GATES[one], node, sums("U", "SU", "BU"))
        elif one == "residual":
            kind = "add_share" if "all_reduce" in fused else "add"
            node = _as_given(w, kind, node, w.of("RES", rows, columns))
        elif one == "rotary":
            turned = rows[0] - at + w.scalars["pos"], rows[1] - at + w.scalars["pos"]
            node = _as_given(w, "rotary", node, w.of("COS", turned, None), w.of("SIN", turned, None))
    if "SCALE" in given:
        node = _as_given(w, "quantize", node, w.of("SCALE", columns), w.of("ZERO", columns))
    node = w.stored(node)
    if "all_reduce" in fused:
        node = w.stored(w.make.apply("all_reduce", (node,), (), node.shape))
    return node if w.shape == node.shape else w.make.make("reshape", (), (node,), w.shape, node.dtype)


def _as_given(w: Wanted, kind: str, *parts: Node) -> Node:
    """An operation with the attributes that the kernel gives it, on parts of the shape of the first."""
    op = w.operation(kind)
    data = tuple(_number(value) for _, value in sorted(op.attributes)) if op else ()
    return w.make.apply(kind, parts, data, parts[0].shape)


def _elementwise(kind: str) -> Definition:
    def definition(w: Wanted) -> Node:
        names = [one for one in ("A", "B") if one in w.kernel.param]
        return w.stored(w.apply(kind, *(w.of(n, *w.box[-len(w.kernel.param[n].shape) :]) for n in names)))

    return definition


def _normalized(w: Wanted, x: Node, whole: Node) -> Node:
    return w.apply("mul", w.apply("mul", x, w.apply("inverse_rms", whole)), w.of("W", w.box[1]))


def _rms_norm(w: Wanted) -> Node:
    return w.stored(_normalized(w, w.of("X", *w.box), w.of("X", w.box[0], None)))


def _add_rms_norm(w: Wanted) -> Node:
    def total(*box: Range | None) -> Node:
        parts = w.of("X", *box), w.of("R", *box)
        return w.stored(w.make.apply("add", parts, (), parts[0].shape), "S")

    if w.name == "S":
        return total(*w.box)
    return w.stored(_normalized(w, total(*w.box), total(w.box[0], None)))


def _layer_norm(w: Wanted) -> Node:
    def centered(*box: Range | None) -> Node:
        x = w.of("X", *box)
        return w.make.apply("sub", (x, w.apply("row_mean", w.of("X", w.box[0], None))), (), x.shape)

    normed = w.apply("mul", centered(*w.box), w.apply("inverse_rms", centered(w.box[0], None)))
    scaled = w.apply("mul", normed, w.of("W", w.box[1]))
    return w.stored(w.apply("add", scaled, w.of("C", w.box[1])) if "C" in w.kernel.param else scaled)


def _rotary(w: Wanted) -> Node:
    heads, rows, _ = w.box
    at = rows[0] + w.scalars["pos"], rows[1] + w.scalars["pos"]
    parts = w.of("X", heads, rows, None), w.of("COS", at, None), w.of("SIN", at, None)
    turn = w.operation("rotary")
    data = tuple(_number(value) for _, value in turn.attributes) if turn else ()
    return w.stored(w.make.make("rotary", data, parts, w.shape))


def _embedding(w: Wanted) -> Node:
    rows, columns = w.box
    first = (w.of("FIRST"),) if "FIRST" in w.kernel.param else ()
    table = w.of("T", None, columns)
    return w.make.make("gather", (), (table, w.of("IDS", rows), *first), w.shape, table.dtype)


def _kv_append(w: Wanted) -> Node:
    heads, rows, columns = w.box
    new = w.of("NEW", heads, (rows[0] - w.scalars["pos"], rows[1] - w.scalars["pos"]), columns)
    if "SCALE" not in w.kernel.param:
        return w.stored(new)
    tables = (w.of(name, heads, None, columns) for name in ("SCALE", "ZERO"))
    return w.stored(w.apply("quantize", new, *tables))


def _only_input(w: Wanted) -> str:
    (name,) = (one.name for one in w.kernel.params if one.mode == "in")
    return name


def _select_row(w: Wanted) -> Node:
    return w.of(_only_input(w), (w.scalars["valid"] - 1, w.scalars["valid"]), w.box[1])


def _all_gather(w: Wanted) -> Node:
    rows, _, columns = w.box
    return w.make.make("all_gather", (), (w.of("X", rows, columns),), w.shape)


# what the name of a linear may list, each behind a `+`
_FUSED = {"row_scale", "bias", *GATES, "residual", "rotary", "append", "all_reduce"}

DEFINITIONS: Mapping[str, Definition] = {
    "linear": _linear,
    "linear_w8": _linear,
    **{kind: _elementwise(kind) for kind in ("add", "sub", "mul", "div", "tanh", "gelu", "cast")},
    "bias": _elementwise("add"),
    "swiglu": _elementwise("silu_mul"),
    "geglu": _elementwise("gelu_mul"),
    "rms_norm": _rms_norm,
    "row_scale": lambda w: w.stored(w.apply("inverse_rms", w.of("X", w.box[0], None))),
    "add_rms_norm": _add_rms_norm,
    "layer_norm": _layer_norm,
    "rotary": _rotary,
    "embedding": _embedding,
    "embedding_shard": _embedding,
    "kv_append": _kv_append,
    "kv_append_i8": _kv_append,
    "copy": lambda w: w.of(_only_input(w), *w.box),
    "select_row": _select_row,
    "all_reduce": lambda w: w.stored(w.apply("all_reduce", w.of("X", *w.box))),
    "reduce_scatter": lambda w: w.stored(w.make.make("reduce_scatter", (), (w.of("X", None, *w.box),), w.shape)),
    "all_gather": lambda w: w.stored(_all_gather(w)),
}


def definition(name: str) -> Definition | None:
    """The definition of a kernel's family; None for a family that has none."""
    base, *fused = family(name).split("+")
    known = not fused or (base in {"linear", "linear_w8"} and _FUSED.issuperset(fused))
    return DEFINITIONS.get(base) if known else None


def family(name: str) -> str:
    """The family of a kernel: its name without the number that a program gives it."""
    base, dot, number = name.rpartition(".")
    return base if dot and number.isdigit() else name

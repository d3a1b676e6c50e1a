"""Mutants of a graph: one operator, operand, attribute, constant, edge, type or shape changed, in all ways of a list."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from vacc_opt.ir import DType, Graph, Literal, Node, TensorType, Value
from vacc_opt.ir.errors import VaccError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.types import Shape
from vacc_opt.ir.verify import verify
from vacc_opt.passes.infra.base import ancestors

Array = npt.NDArray[Any]
Operands = list[Value | None]
Make = Callable[[Rewriter, Node, Operands], Sequence[Value]]

# operators that take each other's place: same operands, same attributes, same type of result
UNARY = ("Sqrt", "Reciprocal", "Exp", "Log", "Abs", "Neg", "Sin", "Cos", "Tanh", "Sigmoid", "HardSigmoid", "Softplus",
         "Relu", "Swish", "HardSwish", "Gelu", "Mish", "Erf", "Floor")  # fmt: skip
BINARY = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mod", "PRelu")
REDUCE = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd")
FAMILIES = (UNARY, BINARY, REDUCE, ("Softmax", "LogSoftmax", "Hardmax"), ("MatMul", "Add", "Sub", "Mul", "Div"),
            ("Expand", "Tile"), ("Slice",), ("Concat", "Max", "Add", "Mul"))  # fmt: skip

FLOAT8_ONLY = ("saturate", "round_mode")  # of Cast: without a meaning for other types


@dataclass(frozen=True)
class Change:
    """What is different when a graph is built again: types of inputs, constants, the making of one node, outputs."""

    inputs: Mapping[str, TensorType] = field(default_factory=dict)
    constants: Mapping[str, Array] = field(default_factory=dict)
    node: str = ""
    make: Make | None = None
    outputs: tuple[str, ...] = ()
    dtype: DType | None = None


@dataclass(frozen=True)
class Mutant:
    """One change of a graph; a reason to decline it mentions one of ``names``.

    ``same`` says that the graph computes what it did: after ``simplify`` the pass must still find its pattern.
    """

    kind: str
    place: str
    what: str
    change: Change
    names: tuple[str, ...]
    same: bool = False

    @property
    def id(self) -> str:
        """Names the mutant in a report."""
        return f"{self.kind}:{self.place}:{self.what}"


def rebuilt(base: Graph, change: Change) -> Graph:
    """``base`` with one change, all types inferred anew and all names kept.

    Raises:
        VaccError: the change does not fit the types.
    """
    graph = Graph(base.name, opset=base.opset)
    rw = Rewriter(graph, by="mutation")
    made: dict[Value, Value] = {}
    for value in base.inputs:
        made[value] = rw.add_input(value.name, change.inputs.get(value.name, _cast(value.type, change.dtype)))
    for name, type in change.inputs.items():
        if base.input_named(name) is None:
            rw.add_input(name, type)
    for value in base.constants():
        assert isinstance(value.const, Literal)
        array = change.constants.get(value.name, value.const.array)
        if change.dtype is not None and value.type.dtype is DType.FLOAT:
            with np.errstate(over="ignore"):
                array = array.astype(change.dtype.numpy)
        made[value] = rw.const(array, value.name)
    for node in base.nodes():
        operands = [None if v is None else made[v] for v in node.inputs]
        make = change.make if node.output.name == change.node and change.make is not None else again
        outputs = make(rw, node, operands)
        for old, new in zip(node.outputs, outputs, strict=True):  # the rewriter counts further outputs
            del graph.values[new.name]
            new.name = old.name
            graph.values[old.name] = new
        made.update(zip(node.outputs, outputs, strict=True))
    for name, value in base.outputs.items():
        rw.set_output(name, made[value])
    for name in change.outputs:
        rw.set_output(name, graph.values[name])
    rw.erase_unused_constants()
    verify(graph)
    return graph


def _cast(type: TensorType, dtype: DType | None) -> TensorType:
    return TensorType(dtype, type.shape) if dtype is not None and type.dtype is DType.FLOAT else type


def again(rw: Rewriter, node: Node, operands: Operands) -> Sequence[Value]:
    """The node as it is."""
    return rw.add(
        node.op_type, operands, node.attributes, domain=node.domain, outputs=len(node.outputs), name=node.output.name
    ).outputs


def part(base: Graph) -> list[Node]:
    """The nodes that the first output is computed from: what else there is stays as it is."""
    (first, *_) = base.outputs.values()
    inside = set(ancestors(base, first))
    return [n for n in base.nodes() if n in inside]


def mutants(base: Graph) -> Iterator[Mutant]:
    """All mutants that are valid graphs, in a fixed order."""
    for generate in GENERATORS:
        for mutant in generate(base):
            try:
                rebuilt(base, mutant.change)
            except VaccError:
                continue
            yield mutant


def _of_node(kind: str, node: Node, what: str, make: Make, *names: str, **more: Any) -> Mutant:
    name = node.output.name
    change = Change(node=name, make=make, inputs=more.pop("inputs", {}))
    return Mutant(kind, name, what, change, (*names, name), **more)


def operators(base: Graph) -> Iterator[Mutant]:
    """Another operator in the place of each."""
    for node in part(base):
        others = dict.fromkeys(op for family in FAMILIES if node.op in family for op in family if op != node.op)
        for op in others:
            read = [v.name for v in node.inputs if v is not None]
            yield _of_node("operator", node, op, _operator(op), f"{op} {node.output.name}", f"by {op}", *read)


def _operator(op: str) -> Make:
    known = onnx.defs.get_schema(op, 24).attributes

    def make(rw: Rewriter, node: Node, operands: Operands) -> Sequence[Value]:
        kept = {n: a for n, a in node.attributes.items() if n in known}
        return rw.add(op, operands, kept, name=node.output.name).outputs

    return make


def swaps(base: Graph) -> Iterator[Mutant]:
    """Two operands of a node, exchanged."""
    for node in part(base):
        for i, j in itertools.combinations(range(len(node.inputs)), 2):
            if node.inputs[i] is not node.inputs[j]:
                names = [v.name for v in (node.inputs[i], node.inputs[j]) if v is not None]
                yield _of_node("swap", node, f"{i}-{j}", _with_operands({i: j, j: i}), *names)


def _with_operands(take: Mapping[int, int | str]) -> Make:
    """The node with other operands: the one at another position, or the value of a name."""

    def make(rw: Rewriter, node: Node, operands: Operands) -> Sequence[Value]:
        given = list(operands)
        for position, source in take.items():
            given[position] = operands[source] if isinstance(source, int) else rw.graph.values[source]
        return again(rw, node, given)

    return make


def operands(base: Graph) -> Iterator[Mutant]:
    """Each operand, replaced by an input that has nothing to do with it, and by each earlier value of its type."""
    order = {n: i for i, n in enumerate(base.nodes())}
    for node in part(base):
        for position, value in enumerate(node.inputs):
            if value is None:
                continue
            stranger = {"stranger": value.type}
            make = _with_operands({position: "stranger"})
            yield _of_node("operand", node, f"{position}=stranger", make, "stranger", inputs=stranger)
            for other in base.values.values():
                early = other.producer is None or order[other.producer] < order[node]
                if other is not value and early and other.type == value.type:
                    make = _with_operands({position: other.name})
                    yield _of_node("operand", node, f"{position}={other.name}", make, other.name, value.name)


def drops(base: Graph) -> Iterator[Mutant]:
    """Each operand but the first, left away."""
    for node in part(base):
        for position in range(1, len(node.inputs)):
            if node.inputs[position] is not None:
                yield _of_node("drop", node, str(position), _without(position), node.op)


def _without(position: int) -> Make:
    def make(rw: Rewriter, node: Node, operands: Operands) -> Sequence[Value]:
        return again(rw, node, [*operands[:position], None, *operands[position + 1 :]])

    return make


def attributes(base: Graph) -> Iterator[Mutant]:
    """Each attribute that the operator has, given or not, with other values."""
    for node in part(base):
        if node.domain:
            continue
        for name, declared in sorted(onnx.defs.get_schema(node.op_type, 24).attributes.items()):
            if name in FLOAT8_ONLY:
                continue
            have = node.attributes.get(name)
            if have is None and declared.default_value.type:
                have = onnx.helper.get_attribute_value(declared.default_value)
            for value in _other_values(declared.type.name, name, have):
                names = (f"{node.op} {name}", f"{name}: ", name)
                yield _of_node("attribute", node, f"{name}={_short(value)}", _with_attribute(name, value), *names)


def _other_values(kind: str, name: str, have: Any) -> list[Any]:
    if kind == "INT":
        near = [-3, -2, -1, 0, 1, 2, 3, 4]
        if name == "to":
            near = [d.onnx for d in (DType.FLOAT, DType.FLOAT16, DType.DOUBLE, DType.INT64, DType.INT32)]
        return [v for v in near if v != have]
    if kind == "FLOAT":
        near_floats = [0.0, 0.5, 1.0, 2.0, -1.0, *([have * 1.5, -have] if have else [])]
        return [v for v in dict.fromkeys(near_floats) if v != have]
    if kind == "INTS" and have is not None:
        return [p for p in itertools.permutations(have) if p != tuple(have)]
    return []


def _with_attribute(name: str, value: Any) -> Make:
    def make(rw: Rewriter, node: Node, operands: Operands) -> Sequence[Value]:
        given = {**node.attributes, name: value}
        return rw.add(
            node.op_type, operands, given, domain=node.domain, outputs=len(node.outputs), name=node.output.name
        ).outputs

    return make


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"


def constants(base: Graph) -> Iterator[Mutant]:
    """Each constant with other entries and other shapes."""
    for value in base.constants():
        assert isinstance(value.const, Literal)
        readers = tuple(f"{u.op} " for u in value.users())
        for what, array in _other_arrays(value.const.array):
            names = (value.name, *readers, *(u.output.name for u in value.users()))
            yield Mutant("constant", value.name, what, Change(constants={value.name: array}), names)


def _other_arrays(array: Array) -> Iterator[tuple[str, Array]]:
    if array.dtype.kind == "i":
        for at in range(array.size):
            for entry in (-3, -2, -1, 0, 1, 2, 3, 4, 2**62):
                other = array.copy()
                other.reshape(-1)[at] = entry
                if not np.array_equal(other, array):
                    yield f"[{at}]={entry}", other
        if array.size > 1:
            yield "reversed", array[::-1].copy()
        yield "longer", np.concatenate([array.reshape(-1), array.reshape(-1)[-1:]])
        return
    for number in (0.0, 1.0, -1.0, 2.0, 3.0, 1e-5, 1e-2):
        if not np.all(array == number):
            yield f"={number:g}", np.full_like(array, number)
    for factor in (-1, 1.25, 1e3):
        yield f"x{factor:g}", (array * factor).astype(array.dtype)
    for shape in ((1,), (4,), (1, 4), (4, 1), (4, 4), (1, 1, 1), (2, 1, 1, 1), (1, 4, 1, 1), (1, 1, 1, 1, 1)):
        if shape == array.shape:
            continue
        flat = np.resize(array.reshape(-1), shape)
        yield f"as {list(shape)}", flat.astype(array.dtype)
        if flat.size > 1 and np.ptp(flat) == 0:
            steps = (flat.reshape(-1) * (1 + np.arange(flat.size))).reshape(shape)
            yield f"steps of {list(shape)}", steps.astype(array.dtype)


# what stands on an edge and computes something else: the operator, and how it is made of a value
INSERTED: dict[str, Callable[[Rewriter, Value], Value]] = {
    "Neg": lambda rw, v: rw.op.Neg(v),
    "Abs": lambda rw, v: rw.op.Abs(v),
    "Clip": lambda rw, v: rw.op.Clip(v, rw.const(np.array(-0.5, v.type.dtype.numpy)), rw.const(np.array(0.5, v.type.dtype.numpy))),
    "Tanh": lambda rw, v: rw.op.Tanh(v),
    "Transpose": lambda rw, v: rw.op.Transpose(v, perm=(*range((v.rank or 0) - 2), (v.rank or 0) - 1, (v.rank or 0) - 2)),
    "Mul": lambda rw, v: rw.op.Mul(v, rw.const(np.array(2, v.type.dtype.numpy))),
    "Add": lambda rw, v: rw.op.Add(v, rw.const(np.array(1, v.type.dtype.numpy))),
    "Cast": lambda rw, v: rw.op.Cast(rw.op.Cast(v, to=DType.FLOAT16.onnx), to=v.type.dtype.onnx),
    "CumSum": lambda rw, v: rw.op.CumSum(v, rw.const(np.array((v.rank or 1) - 1))),
    "Softmax": lambda rw, v: rw.op.Softmax(v, axis=-1),
}  # fmt: skip
CONSTANTS = {"Mul": ("the constant 2",), "Add": ("the constant 1",)}  # of what is inserted
# what stands on an edge and changes nothing
HARMLESS: dict[str, Callable[[Rewriter, Value], Value]] = {
    "Identity": lambda rw, v: rw.op.Identity(v),
    "Cast to the same": lambda rw, v: rw.op.Cast(v, to=v.type.dtype.onnx),
    "Reshape to the same": lambda rw, v: rw.op.Reshape(v, rw.op.Shape(v)),
    "Transpose twice": lambda rw, v: rw.op.Transpose(rw.op.Transpose(v, perm=_turn(v)), perm=_turn(v, back=True)),
}


def _turn(value: Value, *, back: bool = False) -> tuple[int, ...]:
    rank = value.rank or 0
    return tuple((i + (rank - 1 if back else 1)) % rank for i in range(rank))


def inserts(base: Graph) -> Iterator[Mutant]:
    """A node on each edge."""
    for node in part(base):
        for position, value in enumerate(node.inputs):
            if value is None or value.is_const or not value.type.dtype.is_float:
                continue
            for what, build in INSERTED.items():
                yield _of_node(
                    "insert",
                    node,
                    f"{position}<{what}",
                    _inserted(position, build),
                    f"{what} ",
                    f"is {what}",
                    *CONSTANTS.get(what, ()),
                    value.name,
                )
            for what, build in HARMLESS.items():
                yield _of_node("harmless", node, f"{position}<{what}", _inserted(position, build), same=True)


def _inserted(position: int, build: Callable[[Rewriter, Value], Value]) -> Make:
    def make(rw: Rewriter, node: Node, operands: Operands) -> Sequence[Value]:
        value = operands[position]
        assert value is not None
        given = [*operands[:position], build(rw, value), *operands[position + 1 :]]
        return again(rw, node, given)

    return make


def users(base: Graph) -> Iterator[Mutant]:
    """Each interior value, read by somebody else too, or made an output."""
    for node in part(base):
        value = node.output
        if base.is_output(value):
            continue
        change = Change(outputs=(value.name,))
        yield Mutant("user", value.name, "an output", change, (value.name,))
        if value.type.dtype.is_float:
            yield _of_node("user", node, "read twice", _read_twice, "Neg")


def _read_twice(rw: Rewriter, node: Node, operands: Operands) -> Sequence[Value]:
    outputs = again(rw, node, operands)
    rw.set_output(f"{node.output.name}_too", rw.op.Neg(outputs[0]))
    return outputs


def dtypes(base: Graph) -> Iterator[Mutant]:
    """All floats of another type."""
    for dtype in (DType.FLOAT16, DType.DOUBLE):
        yield Mutant("dtype", "all", dtype.value, Change(dtype=dtype), (dtype.value,))


def shapes(base: Graph) -> Iterator[Mutant]:
    """Each size of each input another number, and each input of another rank."""
    for value in [v for v in base.inputs if any(n in part(base) for n in v.users())]:
        shape = value.shape
        assert shape is not None
        others: dict[str, Shape] = {f"[{axis}]={size}": (*shape[:axis], size, *shape[axis + 1 :])
                  for axis, own in enumerate(shape) for size in (1, 2, 3, 4, 6, 8) if size != own}  # fmt: skip
        others |= {f"rank {len(shape) - n}": shape[n:] for n in range(1, len(shape))}
        others["rank up"] = (1, *shape)
        for what, other in others.items():
            change = Change(inputs={value.name: TensorType(value.type.dtype, other)})
            text = str(change.inputs[value.name])
            names = (text, value.name, *(u.output.name for u in value.users()), "is [", "broadcast")
            yield Mutant("shape", value.name, what, change, names)


GENERATORS = (operators, swaps, operands, drops, attributes, constants, inserts, users, dtypes, shapes)

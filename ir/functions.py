"""Local functions of a model: what a call makes of a generic ONNX function, so that the body can be fully typed.

ONNX functions have neither types nor attribute values; a body in ``graph.functions`` has both. Each combination of
input types, attribute values and outputs asked for is a function of its own, whose call takes every input and output
of the body and no attributes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import onnx
import onnx.inliner
from onnx import AttributeProto, FunctionProto, NodeProto

from vacc_opt.ir import ops
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Graph, Node
from vacc_opt.ir.subgraph import inner_graphs, nodes_inside
from vacc_opt.ir.types import Dim, SymbolicDim, TensorType

Key = tuple[str, str, str]  # domain, name, overload
_STANDARD = ("", "ai.onnx")


def function_table(functions: Iterable[FunctionProto]) -> dict[Key, FunctionProto]:
    """The functions that become bodies: not those of our own operators, nor redefinitions of standard ones."""
    return {(f.domain, f.name, f.overload): f for f in functions if f.domain not in (*_STANDARD, ops.DOMAIN)}


def key_of(node: NodeProto) -> Key:
    """Which function a node would call."""
    return node.domain, node.op_type, node.overload


def inline_inside_subgraphs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with those functions inlined that are called from a subgraph, which is carried as a message.

    Raises:
        UserError: such a function is written for another opset than the model.
    """
    table = function_table(model.functions)
    if not table:
        return model
    outer = (*model.graph.node, *(n for f in table.values() for n in f.node))
    pending = [n for node in outer for graph in inner_graphs(node) for n in nodes_inside(graph)]
    found: dict[Key, None] = {}
    while pending:
        key = key_of(pending.pop())
        if key in table and key not in found:
            found[key] = None
            pending += table[key].node
    if not found:
        return model
    try:
        inlined: onnx.ModelProto = onnx.inliner.inline_selected_functions(model, [key[:2] for key in found])
    except RuntimeError as error:
        names = ", ".join(f"{key[0]}::{key[1]}" for key in found)
        raise UserError(f"{names}, called inside a subgraph, cannot be inlined: {error}") from error
    return inlined


def specialized(
    function: FunctionProto, attributes: Mapping[str, AttributeProto], absent: Iterable[str]
) -> list[NodeProto]:
    """The function's nodes with attributes filled in and the inputs ``absent`` from the call left out."""
    values = {a.name: a for a in function.attribute_proto} | dict(attributes)
    gone = set(absent)
    result: list[NodeProto] = []
    for node in function.node:
        made = NodeProto()
        made.CopyFrom(node)
        for one in (*(n for graph in inner_graphs(made) for n in nodes_inside(graph)), made):
            one.input[:] = ["" if name in gone else name for name in one.input]
            _fill_in(one, values)
        result.append(made)
    return result


def _fill_in(node: NodeProto, values: Mapping[str, AttributeProto]) -> None:
    kept: list[AttributeProto] = []
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            kept.append(attribute)
        elif attribute.ref_attr_name in values:
            value = AttributeProto()
            value.CopyFrom(values[attribute.ref_attr_name])
            value.name = attribute.name
            kept.append(value)
    kept = [AttributeProto.FromString(a.SerializeToString()) for a in kept]
    node.ClearField("attribute")
    node.attribute.extend(kept)


def local_types(given: Mapping[str, TensorType], declared: Mapping[str, TensorType]) -> dict[str, TensorType]:
    """The types of a body's inputs: as declared if the call agrees with all of it, else the call's.

    A dimension that is named after a value of the caller is named after the input instead, so that calls which differ
    in nothing else have the same types.
    """
    names: dict[str, Dim] = {}
    for formal, type in given.items():
        for axis, dim in enumerate(type.shape or ()):
            for name in _opaque_names(dim):
                names.setdefault(name, SymbolicDim((((f"{formal}.{axis}",), 1),)))
    if all(formal in declared and agrees(type, declared[formal]) for formal, type in given.items()):
        return {formal: declared[formal] for formal in given}
    return {formal: type.bind(names) for formal, type in given.items()}


def agrees(type: TensorType, declared: TensorType) -> bool:
    """True when a value of ``type`` may be passed where ``declared`` is written."""
    if type.shape is None or declared.shape is None:
        return type.dtype is declared.dtype and (declared.shape is None or type == declared)
    if type.dtype is not declared.dtype or len(type.shape) != len(declared.shape):
        return False
    pairs = zip(type.shape, declared.shape, strict=True)
    return all(a == b or not isinstance(a, int) or not isinstance(b, int) for a, b in pairs)


def call_problem(call: Node, body: Graph) -> str | None:
    """How a call does not fit the body, if it does not."""
    ends = (("input", call.inputs, body.inputs), ("output", call.outputs, list(body.outputs.values())))
    for what, given, formal in ends:
        if len(given) != len(formal):
            return f"{call!r} has {len(given)} {what}s, the body of {call.op} has {len(formal)}"
        for value, inner in zip(given, formal, strict=True):
            if value is None:
                return f"{call!r} leaves the {what} {inner.name!r} out"
            known = value.shape is not None and inner.shape is not None
            if value.type.dtype is not inner.type.dtype or (known and not agrees(value.type, inner.type)):
                return f"{value.name!r} is {value.type}, the {what} {inner.name!r} of {call.op} is {inner.type}"
    return None


def caller_dims(
    inner: Iterable[TensorType], outer: Iterable[TensorType], results: Iterable[TensorType], label: str
) -> dict[str, Dim]:
    """What the body's dimensions are called outside, by unifying the inputs' types.

    Those that the body made up in ``results`` are named after ``label``: two calls may have different ones.
    """
    found: dict[str, Dim] = {}
    for type, actual in zip(inner, outer, strict=True):
        for dim, own in zip(type.shape or (), actual.shape or (), strict=False):
            names = [] if isinstance(dim, int) else list(dim.names())
            if len(names) == 1 and dim == SymbolicDim((((names[0],), 1),)):
                found.setdefault(names[0], own)
    for type in results:
        for dim in type.shape or ():
            for name in _opaque_names(dim):
                found.setdefault(name, SymbolicDim((((f"{label}.{name}",), 1),)))
    return found


def _opaque_names(dim: Dim) -> Iterator[str]:
    if not isinstance(dim, int):
        yield from (name for name in dim.names() if "." in name)


def called_functions(graph: Graph) -> dict[str, Graph]:
    """The bodies that the graph calls, directly or through another body, by operator in order of names."""
    found: dict[str, Graph] = {}
    pending: list[Graph] = [graph]
    while pending:
        for op in pending.pop().op_counts():
            if op in graph.functions and op not in found:
                found[op] = graph.functions[op]
                pending.append(found[op])
    return dict(sorted(found.items()))


def split_op(op: str) -> tuple[str, str]:
    """Domain and name of an operator: ``other::Twice``."""
    domain, _, name = op.rpartition("::")
    return domain, name


def free_name(op: str, taken: Collection[str]) -> str:
    """``op`` itself, or with the first number from 2 that is free.

    >>> free_name("other::Twice", ["other::Twice", "other::Twice_2"])
    'other::Twice_3'
    """
    number = 1
    name = op
    while name in taken:
        number += 1
        name = f"{op}_{number}"
    return name

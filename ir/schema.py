"""Is a node that is about to be made one that its operator's declaration allows: arity, element types, attributes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx

from vacc_opt.ir import ops
from vacc_opt.ir.attributes import Subgraph, subgraphs
from vacc_opt.ir.errors import CheckError, did_you_mean
from vacc_opt.ir.graph import Node, Value
from vacc_opt.ir.types import DType


class RewriteError(CheckError):
    """A rewrite asked for something that would make the graph invalid."""


@dataclass(frozen=True)
class Operand:
    """A formal input: the element types that it takes (None: not only tensors), and whether it must be given."""

    name: str
    dtypes: frozenset[DType] | None
    required: bool
    variable: str  # operands of one type variable have the same type


@dataclass(frozen=True)
class Schema:
    """What a declaration says, read once: asking onnx costs more than the check."""

    inputs: tuple[int, int]
    outputs: int
    attributes: frozenset[str]
    kinds: tuple[tuple[str, str, bool], ...] = ()  # of a standard operator: name, type, required
    operands: tuple[Operand, ...] = ()  # of a standard operator; the last stands for all further ones


Problem = tuple[str, str | None]  # what, and what to do
_Signature = tuple[str, str, int, tuple[DType | None, ...], int, tuple[tuple[str, type], ...]]
_known: set[_Signature] = set()  # that have no problem


def check_schema(node: Node, outputs: int, opset: int, by: str) -> None:
    """Check operator, arity, element types of operands, and attributes.

    Raises:
        RewriteError: naming ``by``, the operator and what it takes.
    """
    problem = schema_problem(node, outputs, opset)
    if problem is not None:
        raise RewriteError(f"{by}: {problem[0]}", problem[1])


def schema_problem(node: Node, outputs: int, opset: int) -> Problem | None:
    """What the declaration of its operator says against a node, if anything; foreign operators have none."""
    kinds = tuple([(name, type(value)) for name, value in node.attributes.items()])
    dtypes = tuple([None if v is None else v.type.dtype for v in node.inputs])
    signature = (node.domain, node.op_type, opset, dtypes, outputs, kinds)
    if signature in _known:
        return None
    problem = _problem(node, outputs, opset)
    # what is inside a tuple or a subgraph is not part of the signature
    if problem is None and not any(kind in (tuple, Subgraph) for _, kind in kinds):
        _known.add(signature)
    return problem


def _problem(node: Node, outputs: int, opset: int) -> Problem | None:
    if node.domain not in ("", ops.DOMAIN):
        return None
    schema = _own_schema(node.op_type) if node.domain else _standard_schema(node.op_type, opset)
    if not isinstance(schema, Schema):
        return schema
    low, high = schema.inputs
    given = len(node.inputs) - sum(len(graph.captures) for _, graph in subgraphs(node.attributes))
    if not low <= given <= high:
        wanted = str(low) if low == high else f"{low} to {high}"
        return f"{node.op} takes {wanted} inputs, got {given}", None
    problem = _operand_problem(node, given, schema.operands)
    if problem is not None:
        return problem
    if outputs > schema.outputs:
        return f"{node.op} has at most {schema.outputs} outputs, {outputs} were asked for", None
    for name in node.attributes:
        if name not in schema.attributes:
            hint = did_you_mean(name, schema.attributes or {"(none)"})
            return f"{node.op} has no attribute {name!r}", hint
    return _attribute_problem(node, schema)


def _operand_problem(node: Node, given: int, operands: tuple[Operand, ...]) -> Problem | None:
    """Operands that must be there are, and each has a type that is allowed beside the others."""
    found: dict[str, Value] = {}
    for position, value in enumerate(node.inputs[:given] if operands else ()):
        operand = operands[min(position, len(operands) - 1)]
        if value is None:
            if operand.required:
                return f"{node.op} needs the operand {operand.name!r}", None
            continue
        if operand.dtypes is not None and value.type.dtype not in operand.dtypes:
            return f"the operand {operand.name!r} of {node.op} cannot be {value.type}", None
        other = found.setdefault(operand.variable, value) if operand.variable else value
        if other.type.dtype is not value.type.dtype:
            return f"{node.op}: operands have types {other.type} and {value.type}", None
    return None


def _own_schema(op_type: str) -> Schema | Problem:
    op = ops.get(op_type)
    if op is None:
        return f"no operator Vastai::{op_type}", did_you_mean(op_type, ops.OPS)
    arity = len(op.inputs) - op.optional, len(op.inputs)
    return Schema(arity, len(op.outputs), frozenset(a for a, _ in op.attributes))


@cache
def _standard_schema(op_type: str, opset: int) -> Schema | Problem:
    try:
        found = onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        names = {s.name for s in onnx.defs.get_all_schemas()}
        if op_type not in names:
            return f"ONNX has no operator {op_type!r} at opset {opset}", did_you_mean(op_type, names)
        newest = onnx.defs.get_schema(op_type).since_version
        what = f"{op_type} is an operator of opset {newest}, the graph imports {opset}"
        return what, f"call rw.raise_opset({newest}) first"
    kinds = tuple((name, a.type.name, bool(a.required)) for name, a in found.attributes.items())
    operands = tuple(
        Operand(f.name, _dtypes(f.types), f.option == _SINGLE, f.type_str if f.is_homogeneous else "")
        for f in found.inputs
    )
    return Schema((found.min_input, found.max_input), found.max_output, frozenset(found.attributes), kinds, operands)


_SINGLE = onnx.defs.OpSchema.FormalParameterOption.Single


def _dtypes(types: set[str]) -> frozenset[DType] | None:
    """The element types among ``tensor(float)``, ``tensor(int64)``; None where a sequence or the like is allowed."""
    if not all(t.startswith("tensor(") for t in types):
        return None
    return frozenset(DType(t[len("tensor(") : -1]) for t in types)


_KINDS: dict[str, tuple[type, ...]] = {
    "INT": (int,),
    "FLOAT": (float,),
    "STRING": (str, bytes),
    "TENSOR": (np.ndarray,),
    "INTS": (int,),
    "FLOATS": (float,),
    "STRINGS": (str, bytes),
}


def _attribute_problem(node: Node, schema: Schema) -> Problem | None:
    """Required attributes are there, and each has the declared type."""
    for name, kind, required in schema.kinds:
        if name not in node.attributes:
            if required:
                return f"{node.op} needs the attribute {name!r}", None
            continue
        value = node.attributes[name]
        items = value if kind.endswith("S") and isinstance(value, tuple) else (value,)
        listed = kind.endswith("S") == isinstance(value, tuple)
        if kind in _KINDS and not (listed and all(isinstance(i, _KINDS[kind]) for i in items)):
            return f"attribute {name!r} of {node.op} is {value!r}, {kind.lower()} is expected", None
    return None

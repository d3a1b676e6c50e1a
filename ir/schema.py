"""Is a node that is about to be made one that its operator's declaration allows: arity, attribute names and types."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx

from vacc_opt.ir import ops
from vacc_opt.ir.errors import CheckError, did_you_mean
from vacc_opt.ir.graph import Node


class RewriteError(CheckError):
    """A rewrite asked for something that would make the graph invalid."""


@dataclass(frozen=True)
class Schema:
    """What a declaration says, read once: asking onnx costs more than the check."""

    inputs: tuple[int, int]
    outputs: int
    attributes: frozenset[str]
    kinds: tuple[tuple[str, str, bool], ...] = ()  # of a standard operator: name, type, required


def check_schema(node: Node, outputs: int, opset: int, by: str) -> None:
    """Check arity and attributes.

    Raises:
        RewriteError: naming ``by``, the operator and what it takes.
    """
    schema = _own_schema(node.op_type, by) if node.domain == ops.DOMAIN else _standard_schema(node.op_type, opset)
    _check_attributes(node, schema, by)
    low, high = schema.inputs
    if not low <= len(node.inputs) <= high:
        wanted = str(low) if low == high else f"{low} to {high}"
        raise RewriteError(f"{by}: {node.op} takes {wanted} inputs, got {len(node.inputs)}")
    if outputs > schema.outputs:
        raise RewriteError(f"{by}: {node.op} has at most {schema.outputs} outputs, {outputs} were asked for")
    for name in node.attributes:
        if name not in schema.attributes:
            hint = did_you_mean(name, schema.attributes or {"(none)"})
            raise RewriteError(f"{by}: {node.op} has no attribute {name!r}", hint)


def _own_schema(op_type: str, by: str) -> Schema:
    op = ops.get(op_type)
    if op is None:
        raise RewriteError(f"{by}: no operator Vastai::{op_type}", did_you_mean(op_type, ops.OPS))
    return Schema((len(op.inputs), len(op.inputs)), len(op.outputs), frozenset(a for a, _ in op.attributes))


@cache
def _standard_schema(op_type: str, opset: int) -> Schema:
    try:
        found = onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        names = {s.name for s in onnx.defs.get_all_schemas()}
        if op_type in names:
            newest = onnx.defs.get_schema(op_type).since_version
            raise RewriteError(
                f"{op_type} is an operator of opset {newest}, the graph imports {opset}",
                f"call rw.raise_opset({newest}) first",
            ) from None
        raise RewriteError(f"ONNX has no operator {op_type!r} at opset {opset}", did_you_mean(op_type, names)) from None
    kinds = tuple((name, a.type.name, bool(a.required)) for name, a in found.attributes.items())
    return Schema((found.min_input, found.max_input), found.max_output, frozenset(found.attributes), kinds)


_KINDS: dict[str, tuple[type, ...]] = {
    "INT": (int,),
    "FLOAT": (float,),
    "STRING": (str, bytes),
    "TENSOR": (np.ndarray,),
    "INTS": (int,),
    "FLOATS": (float,),
    "STRINGS": (str, bytes),
}


def _check_attributes(node: Node, schema: Schema, by: str) -> None:
    """Required attributes are there, and each has the declared type."""
    for name, kind, required in schema.kinds:
        if name not in node.attributes:
            if required:
                raise RewriteError(f"{by}: {node.op} needs the attribute {name!r}")
            continue
        value = node.attributes[name]
        items = value if kind.endswith("S") and isinstance(value, tuple) else (value,)
        listed = kind.endswith("S") == isinstance(value, tuple)
        if kind in _KINDS and not (listed and all(isinstance(i, _KINDS[kind]) for i in items)):
            raise RewriteError(f"{by}: attribute {name!r} of {node.op} is {value!r}, {kind.lower()} is expected")

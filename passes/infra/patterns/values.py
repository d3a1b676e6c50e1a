"""What a pattern looks at in a graph: constants as numbers, attributes in all their forms, operands of a node."""

from __future__ import annotations

import math
from functools import cache

import onnx

from vacc_opt.ir import DType, Literal, Node, Value


def scalar(value: Value | None) -> float | None:
    """The number in a constant whose elements are all equal, else None."""
    const = value.const if value is not None else None
    return const.uniform if isinstance(const, Literal) else None


def _stored(number: float, dtype: DType) -> float:
    """What a constant of this type holds when it was written as ``number``."""
    return float(dtype.numpy.type(number)) if dtype.is_float else number


def is_number(value: Value, number: float) -> bool:
    """True for a constant whose elements all equal ``number`` as its type stores it."""
    const = value.const
    found = const.uniform if isinstance(const, Literal) else None
    return found is not None and (found == number or found == _stored(number, value.type.dtype))


@cache
def _formals(op_type: str, opset: int) -> tuple[str, ...]:
    try:
        return tuple(i.name for i in onnx.defs.get_schema(op_type, opset).inputs)
    except onnx.defs.SchemaError:
        return ()


def formal(node: Node, index: int) -> str:
    """The name that the operator gives its operand at ``index``; empty when it gives none."""
    names = _formals(node.op_type, 24) if not node.domain else ()
    return names[index] if index < len(names) else ""


def attribute(node: Node, name: str) -> object:
    """An attribute, or the constant operand that carries it in newer opsets, or the schema's default, else None."""
    if name in node.attributes:
        return node.attributes[name]
    if not node.domain:
        for index, formal in enumerate(_formals(node.op_type, 24)):
            if formal == name:
                value = node.input(index)
                constant = value.const if value is not None else None
                return tuple(constant.array.reshape(-1).tolist()) if isinstance(constant, Literal) else None
        return _default(node.op_type, name)
    return None


@cache
def _default(op_type: str, name: str) -> object:
    try:
        declared = onnx.defs.get_schema(op_type, 24).attributes.get(name)
    except onnx.defs.SchemaError:
        return None
    if declared is None or not declared.default_value.type:
        return None
    value: object = onnx.helper.get_attribute_value(declared.default_value)
    return value.decode() if isinstance(value, bytes) else value


def equal(have: object, wanted: object) -> bool:
    """Equality of attributes; floats as float32 stores them."""
    if isinstance(wanted, float) and isinstance(have, float):
        return math.isclose(have, wanted, rel_tol=1e-6)  # attributes are stored as float32
    return plain(have) == plain(wanted)


def plain(value: object) -> object:
    """An attribute with lists for tuples and numbers for flags."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return int(value) if isinstance(value, bool) else value


def shown(value: Value) -> str:
    """A value for messages: what makes it, and its name."""
    if value.producer is not None:
        return f"{value.producer.op} {value.name}"
    if value.const is not None:
        number = scalar(value)
        return f"the constant {number:g}" if number is not None else f"the constant {value.name}"
    return f"the input {value.name}"


def operands(node: Node, count: int, attributes: frozenset[str]) -> tuple[Value | None, ...]:
    """The inputs of a node without those behind the first ``count`` that carry one of ``attributes``."""
    inputs = node.inputs
    if len(inputs) <= count or not attributes:
        return inputs
    return tuple(v for i, v in enumerate(inputs) if i < count or formal(node, i) not in attributes)

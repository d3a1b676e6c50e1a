"""Integer arithmetic on `pos` and `valid`, evaluated on sample values to learn what an index tensor means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.types import DType

Integers = npt.NDArray[Any]


def is_affine(graph: Graph, value: Value, name: str, offset: npt.ArrayLike) -> bool:
    """Whether `value` is input `name` ([batch], along the first axis) plus `offset`, whatever the inputs hold."""
    source = graph.input_named(name)
    if source is None or source.type.static_shape is None:
        return False
    batch = source.type.static_shape[0]
    for sample, base in enumerate((np.zeros(batch, np.int64), 5 + 3 * np.arange(batch), 1000 + 17 * np.arange(batch))):
        inputs = _others(graph, sample)
        inputs[name] = base
        try:
            found = evaluate(value, inputs)
        except (IndexError, ValueError):  # sizes or rows of a table that depend on the inputs
            return False
        expected = base.reshape((batch,) + (1,) * (found.ndim - 1)) + np.asarray(offset)
        if found.shape != np.broadcast_shapes(found.shape, expected.shape) or np.any(found != expected):
            return False
    return True


def evaluate(value: Value, inputs: Mapping[str, Integers]) -> Integers:
    """The integers that `value` holds for these inputs; UserError for an operator that is no index arithmetic."""
    known: dict[Value, Integers] = {}

    def get(one: Value) -> Integers:
        if one not in known:
            if one.const is not None:
                known[one] = one.const.rank(0).read()
            elif one.producer is None:
                known[one] = inputs[one.name]
            else:
                known[one] = _apply(one.producer, [get(item) for item in one.producer.inputs if item is not None])
        return known[one]

    return get(value)


def _others(graph: Graph, sample: int) -> dict[str, Integers]:
    """Non-zero values of the integer inputs: unequal within an input, between inputs and between samples."""
    found: dict[str, Integers] = {}
    start = 2 + sample
    for one in graph.inputs:
        if _integer(one):
            shape = one.type.static_shape or ()
            found[one.name] = start + 3 * np.arange(prod(shape)).reshape(shape)
            start += 3 * prod(shape) + 1
    return found


def _integer(value: Value) -> bool:
    return value.type.dtype in (DType.INT64, DType.INT32)


def _axes(given: list[Integers], node: Node) -> tuple[int, ...]:
    return tuple(int(one) for one in (given[1] if len(given) > 1 else node.attributes.get("axes", ())))


def _squeeze(node: Node, given: list[Integers]) -> Integers:
    return np.squeeze(given[0], _axes(given, node) or None)


def _reshape(node: Node, given: list[Integers]) -> Integers:
    shape = [given[0].shape[axis] if size == 0 else int(size) for axis, size in enumerate(given[1])]
    return given[0].reshape(shape)


_OPERATORS: dict[str, Callable[[Node, list[Integers]], Integers]] = {
    "Add": lambda node, given: given[0] + given[1],
    "Sub": lambda node, given: given[0] - given[1],
    "Mul": lambda node, given: given[0] * given[1],
    "Identity": lambda node, given: given[0],
    "Cast": lambda node, given: given[0].astype(np.int64),
    "Unsqueeze": lambda node, given: np.expand_dims(given[0], _axes(given, node)),
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Transpose": lambda node, given: np.transpose(given[0], node.attributes.get("perm")),
    "Expand": lambda node, given: np.array(np.broadcast_to(given[0], np.broadcast_shapes(given[0].shape, given[1]))),
    "Concat": lambda node, given: np.concatenate(given, int(node.attributes["axis"])),
    "Gather": lambda node, given: np.take(given[0], given[1], int(node.attributes.get("axis", 0))),
    "Range": lambda node, given: np.arange(int(given[0]), int(given[1]), int(given[2])),
}


def _apply(node: Node, given: list[Integers]) -> Integers:
    if node.op not in _OPERATORS:
        raise UserError(
            f"`{node.name}`: {node.op} in the arithmetic of an index", "expected positions made of pos, valid"
        )
    return np.asarray(_OPERATORS[node.op](node, given))

"""Which rows of a packed linear layer each part of its output comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.infer import elements_of
from vacc_opt.passes.infra.base import where
from vacc_opt.passes.infra.model.linear import Linear

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """A value that holds some rows of the layer's output; ``shape`` are its dimensions after those of the tokens."""

    value: Value
    node: Node
    rows: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """The parts of a layer, the bias that is added before it is cut, and why it cannot be cut, if so."""

    parts: tuple[Part, ...]
    bias: Value | None
    why: str


def unpack(graph: Graph, linear: Linear) -> Packed | None:
    """Follow a layer's output through its bias and Reshapes to the Split, Slice and Gather nodes that take rows of it.

    None when fewer than two parts are taken; with ``why``, something else stands against splitting the layer.
    """
    y, bias = linear.node.output, None
    if y.shape is None:
        return None
    users = y.users()
    if len(users) == 1 and users[0].op == "Add" and not graph.is_output(y):
        bias = next((v for v in users[0].inputs if v is not None and v.const is not None), None)
        if bias is not None and bias.shape == y.shape[-1:]:
            y = users[0].output
    found = list(_follow(graph, y, np.arange(linear.out_features), len(y.shape or ()) - 1))
    parts = tuple(f for f in found if isinstance(f, Part))
    if len(parts) < 2:
        return None
    why = next((f for f in found if isinstance(f, str)), "")
    taken = [row for part in parts for row in part.rows]
    if not why and len(set(taken)) < len(taken):
        why = "its parts overlap"
    return Packed(parts, bias, why)


def _follow(graph: Graph, value: Value, rows: Rows, lead: int) -> Iterator[Part | str]:
    """Parts of ``value``, whose dimensions from ``lead`` on hold ``rows``; a sentence for every other use."""
    if graph.is_output(value):
        yield f"{value.name!r} is an output"
    for user in value.users():
        shape = _reshaped(user, value, rows, lead) if user.op == "Reshape" else None
        if shape is not None:
            yield from _follow(graph, user.output, rows.reshape(shape), lead)
            continue
        taken = _TAKERS[user.op](user, rows, lead) if user.op in _TAKERS and user.inputs[0] is value else None
        if taken is None or any(v is value for v in user.inputs[1:]):
            yield f"{where(user)} reads all of it"
            continue
        for part, own in zip(user.outputs, taken, strict=True):
            if graph.use_count(part) and own.size == 0:
                yield f"{where(user)} takes nothing of it"
            elif graph.use_count(part):
                yield Part(part, user, tuple(own.reshape(-1).tolist()), own.shape)


def _reshaped(node: Node, value: Value, rows: Rows, lead: int) -> tuple[int, ...] | None:
    """The dimensions that a Reshape makes of the rows alone, or None where it touches the tokens."""
    shape = node.output.shape
    if shape is None or value.shape is None or shape[:lead] != value.shape[:lead]:
        return None
    own = tuple(d for d in shape[lead:] if isinstance(d, int))
    return own if len(own) == len(shape) - lead and np.prod(own) == rows.size else None


def _axis(axis: Any, rows: Rows, lead: int) -> int | None:
    """The axis of ``rows`` that an axis of the value is; None for tokens, and for channels inside each head."""
    own = axis % (lead + rows.ndim) - lead
    return own if own >= 0 and (rows.ndim == 1 or own < rows.ndim - 1) else None


def _split(node: Node, rows: Rows, lead: int) -> list[Rows] | None:
    axis = _axis(node.attributes.get("axis", 0), rows, lead)
    if axis is None:
        return None
    sizes = [v.shape[lead + axis] if v.shape is not None else None for v in node.outputs]
    known = [s for s in sizes if isinstance(s, int)]
    return np.split(rows, np.cumsum(known)[:-1], axis) if len(known) == len(sizes) else None


def _slice(node: Node, rows: Rows, lead: int) -> list[Rows] | None:
    starts, ends, axes, steps = (_ints(node.input(i)) for i in (1, 2, 3, 4))
    if starts is None or ends is None or (steps is None and node.input(4) is not None):
        return None
    for n, axis in enumerate(axes if axes is not None else range(len(starts))):
        own = _axis(axis, rows, lead)
        if own is None:
            return None
        index = [slice(None)] * rows.ndim
        index[own] = slice(starts[n], ends[n], steps[n] if steps is not None else 1)
        rows = rows[tuple(index)]
    return [rows]


def _gather(node: Node, rows: Rows, lead: int) -> list[Rows] | None:
    axis, chosen = _axis(node.attributes.get("axis", 0), rows, lead), _ints(node.input(1))
    if axis is None or chosen is None or node.inputs[1] is None or node.inputs[1].rank not in (0, 1):
        return None
    return [np.take(rows, chosen if node.inputs[1].rank else chosen[0], axis)]


def _ints(value: Value | None) -> tuple[int, ...] | None:
    entries = elements_of(value) if value is not None else None
    numbers = tuple(e for e in entries or () if isinstance(e, int))
    return numbers if entries is not None and len(numbers) == len(entries) else None


_TAKERS = {"Split": _split, "Slice": _slice, "Gather": _gather}

"""Attributes of nodes: ONNX's messages to plain Python values and back; graphs and rare kinds stay messages."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
from onnx import AttributeProto, GraphProto, NodeProto, helper, numpy_helper

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Node
from vacc_opt.ir.subgraph import captured, nodes_inside, plain, renamed

_T = TypeVar("_T")
_AS_MESSAGE = (
    AttributeProto.TYPE_PROTO,
    AttributeProto.TYPE_PROTOS,
    AttributeProto.SPARSE_TENSOR,
    AttributeProto.SPARSE_TENSORS,
    AttributeProto.TENSORS,
)


@dataclass(frozen=True)
class Subgraph:
    """A graph inside a node: a branch of ``If``, a body of ``Loop`` or ``Scan``.

    It is carried as ONNX's own message, which no pass looks into. What it reads of the graph around it is in
    ``captures``, by the names inside; the node has these values as its last inputs, so that whatever happens to them
    happens in the open. A node with several subgraphs has the captures of each, in the order of the attributes' names.
    """

    message: bytes
    captures: tuple[str, ...]

    @staticmethod
    def of(graph: GraphProto) -> Subgraph:
        """The attribute for a graph whose captured names are those of the values around it."""
        return Subgraph(plain(graph).SerializeToString(deterministic=True), captured(graph))

    @cached_property
    def graph(self) -> GraphProto:
        """The graph, not to be changed."""
        return GraphProto.FromString(self.message)


@dataclass(frozen=True)
class OpaqueAttribute:
    """An attribute of a kind that no pass looks at, such as a type, as ONNX's own message."""

    message: bytes


class EmptyList(tuple[Any, ...]):
    """An empty list attribute that is not one of integers: as a tuple it no longer tells of what."""

    kind: int

    @staticmethod
    def of(kind: int) -> EmptyList:
        """An empty list of an AttributeProto type."""
        result = EmptyList()
        result.kind = kind
        return result


def subgraphs(attributes: Mapping[str, Any]) -> list[tuple[str, Subgraph]]:
    """The attributes that are graphs, by name; nearly always none."""
    found = [(name, value) for name, value in attributes.items() if isinstance(value, Subgraph)]
    return sorted(found, key=itemgetter(0)) if found else found


def nodes_within(node: Node) -> Iterator[NodeProto]:
    """The nodes inside a node's subgraphs."""
    for _, inner in subgraphs(node.attributes):
        yield from nodes_inside(inner.graph)


def split_inputs(inputs: Sequence[_T], attributes: Mapping[str, Any]) -> tuple[Sequence[_T], dict[str, Sequence[_T]]]:
    """The operator's own inputs, and for each subgraph what it captures."""
    inner = subgraphs(attributes)
    at = len(inputs) - sum(len(graph.captures) for _, graph in inner)
    own, taken = inputs[:at], {}
    for name, graph in inner:
        taken[name] = inputs[at : at + len(graph.captures)]
        at += len(graph.captures)
    return own, taken


def read_attribute(proto: AttributeProto, label: str) -> Any:
    """The plain form: numbers, text, bytes that are no text, tuples of these, numpy arrays; the rest as messages."""
    if proto.type == AttributeProto.GRAPH:
        return Subgraph.of(proto.g)
    if proto.type == AttributeProto.GRAPHS:
        raise UserError(f"node {label!r} holds a list of graphs, which no standard operator has")
    value = helper.get_attribute_value(proto)
    if proto.type in _AS_MESSAGE:
        return OpaqueAttribute(proto.SerializeToString(deterministic=True))
    if proto.type == AttributeProto.TENSOR:
        return numpy_helper.to_array(value)
    if isinstance(value, bytes):
        return _text(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = tuple(_text(v) if isinstance(v, bytes) else v for v in value)
        return items if items or proto.type == AttributeProto.INTS else EmptyList.of(proto.type)
    return value


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def make_attribute(name: str, value: Any) -> AttributeProto:
    """An ONNX attribute from our form; arrays become tensors."""
    if isinstance(value, np.ndarray):
        return helper.make_attribute(name, numpy_helper.from_array(value))
    if isinstance(value, OpaqueAttribute):
        return AttributeProto.FromString(value.message)
    if isinstance(value, tuple):
        if not value:
            kind = value.kind if isinstance(value, EmptyList) else AttributeProto.INTS
            return helper.make_attribute(name, [], attr_type=kind)
        return helper.make_attribute(name, list(value))
    return helper.make_attribute(name, value)


def make_node(
    op: tuple[str, str],
    inputs: Sequence[str],
    outputs: Sequence[str],
    attributes: Mapping[str, Any],
    taken: Collection[str],
) -> NodeProto:
    """A node of ``(domain, op_type)`` whose inputs include those of its subgraphs; these avoid the names ``taken``."""
    own, captures = split_inputs(inputs, attributes)
    proto = helper.make_node(op[1], own, outputs, domain=op[0] or None)
    for name, value in sorted(attributes.items()):
        if isinstance(value, Subgraph):
            outer = dict(zip(value.captures, captures[name], strict=True))
            proto.attribute.append(helper.make_attribute(name, renamed(value.graph, outer, taken)))
        else:
            proto.attribute.append(make_attribute(name, value))
    return proto

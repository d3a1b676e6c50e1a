"""Graphs inside nodes, as ONNX messages: what they capture of the graph around them, and renaming that keeps scopes.

A name inside means the nearest definition: one of the graph itself, else of a graph around it. What no enclosing
message defines is *captured*.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import count

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, numpy_helper


def inner_graphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs among a node's attributes."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g


def captured(graph: GraphProto) -> tuple[str, ...]:
    """The names that a graph reads and does not define, in the order of their first use."""
    return tuple(_captured(graph, frozenset()))


def _captured(graph: GraphProto, around: frozenset[str]) -> dict[str, None]:
    inside = around | {i.name for i in graph.input} | _initializers(graph)
    found: dict[str, None] = {}
    for node in graph.node:
        read = list(node.input)
        for inner in inner_graphs(node):
            read += _captured(inner, inside)
        found.update((name, None) for name in read if name and name not in inside)
        inside |= set(node.output)
    found.update((o.name, None) for o in graph.output if o.name not in inside)
    return found


def _initializers(graph: GraphProto) -> set[str]:
    return {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}


def nodes_inside(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes of a graph and of the graphs inside it."""
    for node in graph.node:
        yield node
        for inner in inner_graphs(node):
            yield from nodes_inside(inner)


def plain(graph: GraphProto) -> GraphProto:
    """A copy in one form: no documentation or metadata, one way to write the standard domain and tensors' elements."""
    result = GraphProto()
    result.CopyFrom(graph)
    _strip(result)
    return result


def _strip(graph: GraphProto) -> None:
    for message in (graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node):
        message.ClearField("doc_string")
        message.ClearField("metadata_props")
    for node in graph.node:
        if node.domain in ("", "ai.onnx"):
            node.ClearField("domain")
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            for tensor in (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors:
                _same_form(tensor)
        for inner in inner_graphs(node):
            _strip(inner)
    for tensor in graph.initializer:
        _same_form(tensor)


def _same_form(tensor: TensorProto) -> None:
    if tensor.data_location != TensorProto.EXTERNAL:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))


def renamed(graph: GraphProto, outer: Mapping[str, str], taken: Collection[str]) -> GraphProto:
    """A copy in which captured names read what ``outer`` says, and no definition has a name that is ``taken``."""
    result = GraphProto()
    result.CopyFrom(graph)
    _rename(result, dict(outer), set(taken) | set(outer.values()))
    return result


def _rename(graph: GraphProto, names: dict[str, str], taken: set[str]) -> None:
    own = {i.name for i in graph.input} | _initializers(graph) | {o for n in graph.node for o in n.output if o}
    for name in sorted(own):
        fresh = name
        if name in taken:
            fresh = next(f for n in count(1) if (f := f"{name}_{n}") not in taken and f not in own)
        names[name] = fresh
    below = taken | {names[name] for name in own}
    for info in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        info.name = names.get(info.name, info.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = names[sparse.values.name]
    for node in graph.node:
        node.input[:] = [names.get(i, i) for i in node.input]
        node.output[:] = [names.get(o, o) for o in node.output]
        for inner in inner_graphs(node):
            _rename(inner, dict(names), below)

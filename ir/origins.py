"""Everything in a graph comes from somewhere: who breaks this invariant, and origins out of names for a bare model."""

from __future__ import annotations

from collections.abc import Iterator

from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.provenance import Origin, Provenance
from vacc_opt.ir.weights import stored_parts, weight_origins


def without_origin(graph: Graph) -> Iterator[str]:
    """The nodes and constants, of the graph and of its functions, of which nothing says where they come from."""
    for one in (graph, *graph.functions.values()):
        yield from (f"{node!r} has no origin" for node in one.nodes() if not node.provenance.origins)
        yield from (f"constant {v.name!r} has no origin" for v in one.constants() if not v.provenance.origins)


def name_origins(graph: Graph) -> None:
    """Give an origin to what has none: importers call this, since a file may tell nothing but names.

    A node gets its scope out of its name (``/model/layers.0/mlp/Mul`` is in ``model.layers.0.mlp``) and its operator, a
    weight its place in its file, any other constant the first origin of its first reader.
    """
    for one in (graph, *graph.functions.values()):
        for node in one.nodes():
            if not node.provenance.origins:
                node.provenance = Provenance((Origin(_scope(node), "", node.op),), node.provenance.passes)
        for value in one.constants():
            if not value.provenance.origins:
                value.provenance = Provenance(_constant_origins(value), value.provenance.passes)


def _constant_origins(value: Value) -> tuple[Origin, ...]:
    assert value.const is not None
    reader = next(iter(value.users()), None)
    if reader is None or stored_parts(value.const):
        return weight_origins(value.name, value.const)
    return reader.provenance.origins[:1]


def _scope(node: Node) -> str:
    """The dotted scope of an exporter's path name; a name without slashes stays as it is."""
    name = node.name or node.output.name
    path = [part for part in name.split("/") if part]
    return ".".join(path[:-1] if len(path) > 1 else path) or name

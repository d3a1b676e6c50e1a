"""Write the layers that were left out of an export: copies of the second one, on their own weights and cache.

They are written behind the child process that exports, so that neither its time nor its memory depends on how many
layers there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx
import onnx_ir

from vacc_opt.ir.provenance import Origin

KEPT = 2  # layers that are exported; the second one stands for those behind it
DATA = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values.",
)  # what names of inputs but weights begin with
_CACHE = re.compile(r"(past_key_values|present)\.1\.(key|value)")
_MODEL = KEPT - 1  # the layer that is copied


@dataclass(frozen=True)
class Layers:
    """The layers of a model: a ``ModuleList`` under the name ``path``, and how many they are."""

    path: str
    count: int


class NotRepeatable(Exception):
    """The second layer of a graph cannot be told from what surrounds it."""


def is_repeatable(model: onnx.ModelProto, origins: Mapping[str, Origin], layers: Layers) -> bool:
    """Whether the second layer of an exported model can be copied."""
    try:
        _second_layer(onnx_ir.from_proto(model).graph, origins, layers)
    except NotRepeatable:
        return False
    return True


def with_all_layers(
    model: onnx.ModelProto, origins: Mapping[str, Origin], layers: Layers
) -> tuple[onnx.ModelProto, dict[str, Origin]]:
    """The exported model of two layers extended to all of them, and the origins of its values."""
    whole = onnx_ir.from_proto(model)
    added = repeat_layers(whole.graph, origins, layers)
    return onnx_ir.to_proto(whole), {**origins, **added}


def repeat_layers(graph: onnx_ir.Graph, origins: Mapping[str, Origin], layers: Layers) -> dict[str, Origin]:
    """Extend an exported graph of two layers to ``layers.count``; gives the origins of the new values.

    Nodes belong to a layer by the module that they come from; what reads its cache, or makes its cache's result,
    outside of the layer goes with it. New values are named after those of the second layer: ``NAME.i``.

    Raises:
        NotRepeatable: not exactly one value goes from layer to layer; the graph is unchanged.
    """
    copied, taken, given = _second_layer(graph, origins, layers)
    followers = [use for use in given.uses() if use.node not in copied.nodes]
    added: dict[str, Origin] = {}
    hidden = given
    for index in range(KEPT, layers.count):
        made = copied.copy(index, {taken: hidden})
        hidden = made[given]
        for value, new in made.items():
            origin = origins.get(value.name or "")
            if origin is not None and new.name:
                added[new.name] = replace(origin, module=copied.renamed(origin.module, index))
    for node, position in followers:
        node.replace_input_with(position, hidden)
    graph.sort()
    return added


def _second_layer(
    graph: onnx_ir.Graph, origins: Mapping[str, Origin], layers: Layers
) -> tuple[_Copied, onnx_ir.Value, onnx_ir.Value]:
    """The layer that is copied, what it takes from the one before it and what it gives."""
    copied = _Copied(graph, origins, f"{layers.path}.{_MODEL}")
    return copied, *copied.hidden(f"{layers.path}.{_MODEL - 1}")


class _Copied:
    """The nodes of the second layer, and what goes in and out of them."""

    def __init__(self, graph: onnx_ir.Graph, origins: Mapping[str, Origin], path: str) -> None:
        self.graph, self._origins, self._path = graph, origins, path
        self.nodes = {node: None for node in graph if self._inside(node, path)}
        self._cached = {v: None for v in graph.inputs if _CACHE.fullmatch(v.name or "")}
        self._results = [v for v in graph.outputs if _CACHE.fullmatch(v.name or "")]
        self._own = [v for v in graph.inputs if v in self._cached or self.renamed(v.name or "", 0) != v.name]
        self._extend()

    def _inside(self, node: onnx_ir.Node, path: str) -> bool:
        modules = {self._origins[o.name].module for o in node.outputs if o.name in self._origins}
        return any(module == path or module.startswith(f"{path}.") for module in modules)

    def _extend(self) -> None:
        """Nodes outside the layer that read its cache before it does, or make its results of what it gives."""
        waiting = list(self._cached)
        while waiting:
            for node in waiting.pop().consumers():
                if node not in self.nodes:
                    self.nodes[node] = None
                    waiting.extend(node.outputs)
        before: dict[onnx_ir.Node, None] = {}
        behind = [value.producer() for value in self._results]
        while behind:
            node = behind.pop()
            if node is not None and node not in self.nodes and node not in before:
                before[node] = None
                behind += [value.producer() for value in node.inputs if value is not None]
        made = {output for node in self.nodes for output in node.outputs}
        for node in self.graph:
            if node in before and any(value in made for value in node.inputs):
                self.nodes[node] = None
                made.update(node.outputs)
        if not made.issuperset(self._results):
            raise NotRepeatable
        ordered = [node for node in self.graph if node in self.nodes]
        self.nodes = dict.fromkeys(ordered)

    def hidden(self, before: str) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """The value that the layer takes from the one before it, and the one that it gives to what follows."""
        depends = self._depends_on(before)
        taken = {v for node in self.nodes for v in node.inputs if v is not None and v in depends}
        results = set(self._results)
        given = {
            output
            for node in self.nodes
            for output in node.outputs
            if output not in results and any(reader not in self.nodes for reader in output.consumers())
        }
        if len(taken) != 1 or len(given) != 1:
            raise NotRepeatable
        return taken.pop(), given.pop()

    def _depends_on(self, path: str) -> set[onnx_ir.Value]:
        """Values outside the layer that depend on data and on weights of another one (weights may be shared)."""
        found = {v for v in self.graph.inputs if (v.name or "").startswith(f"{path}.")}
        data = {v for v in self.graph.inputs if (v.name or "").startswith(DATA)}
        for node in self.graph:
            if node not in self.nodes:
                for values in (found, data):
                    if any(value in values for value in node.inputs):
                        values.update(node.outputs)
        return found & data

    def renamed(self, name: str, index: int) -> str:
        """A module or weight of the layer as one of layer ``index``; any other name as it is."""
        if name == self._path or name.startswith(f"{self._path}."):
            return f"{self._path.removesuffix(str(_MODEL))}{index}{name.removeprefix(self._path)}"
        return name

    def copy(self, index: int, inputs: Mapping[onnx_ir.Value, onnx_ir.Value]) -> dict[onnx_ir.Value, onnx_ir.Value]:
        """Append the nodes as layer ``index``, on its weights and cache; gives the new values by the old."""
        known = {**inputs, **{v: self._input(v, index) for v in self._own}}
        for node in self.nodes:
            outputs = [self._result(output, index) for output in node.outputs]
            arguments = [known.get(v, v) if v is not None else None for v in node.inputs]
            copied = onnx_ir.Node(
                node.domain, node.op_type, arguments, node.attributes.values(), overload=node.overload, outputs=outputs
            )
            self.graph.append(copied)
            known.update(zip(node.outputs, outputs, strict=True))
        self.graph.outputs.extend(known[value] for value in self._results)
        return known

    def _input(self, value: onnx_ir.Value, index: int) -> onnx_ir.Value:
        name = _CACHE.sub(rf"\g<1>.{index}.\g<2>", value.name or "") if value in self._cached else ""
        made = onnx_ir.Value(name=name or self.renamed(value.name or "", index), type=value.type, shape=value.shape)
        self.graph.inputs.append(made)
        return made

    def _result(self, value: onnx_ir.Value, index: int) -> onnx_ir.Value:
        name = _CACHE.sub(rf"\g<1>.{index}.\g<2>", value.name or "")
        name = name if value in self._results else f"{value.name}.{index}"
        return onnx_ir.Value(name=name, type=value.type, shape=value.shape)

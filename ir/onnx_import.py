"""ONNX models to graphs; weights go by reference, subgraphs as messages, local functions as typed bodies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

import vacc_opt.ir.infer_rules  # noqa: F401 - registers the type rules
from vacc_opt.ir import ops
from vacc_opt.ir.attributes import nodes_within, read_attribute, subgraphs
from vacc_opt.ir.collector import paused
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.functions import (
    Key,
    caller_dims,
    free_name,
    function_table,
    inline_inside_subgraphs,
    key_of,
    local_types,
    specialized,
    split_op,
)
from vacc_opt.ir.graph import Absent, Graph, Node, Value
from vacc_opt.ir.infer import InferenceError, Result, has_type, infer, type_from_proto
from vacc_opt.ir.onnx_export import OUTPUT_PREFIX, PROVENANCE_KEY, provenance_from_json
from vacc_opt.ir.provenance import Provenance
from vacc_opt.ir.subgraph import captured, inner_graphs
from vacc_opt.ir.tensor import Literal, TensorExpr
from vacc_opt.ir.types import Dim, OpaqueType, TensorType, is_opaque

NEWEST_OPSET = 24  # of a model without standard operators
Extras = tuple[Mapping[str, TensorExpr], Mapping[str, Provenance]]  # constants and provenance inside a body


def from_onnx(
    model: onnx.ModelProto,
    constants: Mapping[str, TensorExpr] | None = None,
    provenance: Mapping[str, Provenance] | None = None,
    metadata: Mapping[str, str] | None = None,
    bodies: Mapping[str, Extras] | None = None,
) -> Graph:
    """Build a graph from a model whose weights are graph inputs or external initializers named in ``constants``.

    Local functions of foreign domains become ``graph.functions``; those called inside a subgraph are inlined.

    Args:
        model: the model; initializers with data inside become literals.
        constants: expression of each weight, by the name of the input or initializer that stands for it.
        provenance: where nodes and constants come from, by the name of the constant or of a value that the node makes.
        metadata: facts that travel with the graph.
        bodies: constants and provenance inside the bodies of functions, by the operator that calls them.

    Raises:
        UserError: a node uses a name that nothing defines, or something that we do not handle.
    """
    model = inline_inside_subgraphs(model)
    graph = Graph(model.graph.name or "graph")
    graph.opset, domains = _versions(model.opset_import)
    graph.metadata = {p.key: p.value for p in model.metadata_props if not p.key.startswith("onnxsim.")}
    graph.metadata.update(metadata or {})
    if re.fullmatch("[1-9][0-9]{0,3}", graph.metadata.get("ranks", "")):  # ours; what else a model calls so is its own
        graph.ranks = int(graph.metadata.pop("ranks"))
    functions = _Functions(graph, function_table(model.functions), bodies or {})
    known = {i.name: i.type for i in (*model.graph.value_info, *model.graph.output)}
    reader = _Reader(graph, known, provenance or {}, functions, model)
    with paused():
        reader.interface(model.graph, constants or {})
        reader.nodes(model.graph.node, [o.name for o in model.graph.output])
    graph.domains = _used(domains, graph)
    ordered = sorted(graph.functions.items())
    graph.functions.clear()
    graph.functions.update(ordered)
    return graph


def _versions(imports: Iterable[onnx.OperatorSetIdProto], default: int = NEWEST_OPSET) -> tuple[int, dict[str, int]]:
    versions = {_domain(o.domain): o.version for o in imports}
    return versions.pop("", default), versions


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _used(domains: Mapping[str, int], graph: Graph) -> dict[str, int]:
    """Those versions that some node needs, also one inside a subgraph; our own domain has no versions."""
    used = {domain for domain, _ in map(split_op, graph.op_counts())}
    for node in graph.nodes():
        used |= {n.domain for n in nodes_within(node)}
    return {d: v for d, v in sorted(domains.items()) if d in used and d != ops.DOMAIN}


class _Reader:
    """Fills one graph, that of the model or a function's body, from messages in topological order."""

    def __init__(
        self,
        graph: Graph,
        known: Mapping[str, onnx.TypeProto],
        sources: Mapping[str, Provenance],
        functions: _Functions,
        model: onnx.ModelProto | None = None,
    ) -> None:
        self.graph = graph
        self.known = {name: proto for name, proto in known.items() if has_type(proto)}
        self.sources = sources
        self.functions = functions
        self._model = model  # what ONNX may still be asked about types that are not declared
        self._taken: set[str] = set()

    def interface(self, proto: onnx.GraphProto, constants: Mapping[str, TensorExpr]) -> None:
        """Add inputs and constants; an input with an initializer is a constant."""
        found: dict[str, tuple[TensorExpr, Provenance]] = {}
        for tensor in proto.initializer:
            if tensor.name not in constants:
                found[tensor.name] = _literal(tensor), stored_provenance(tensor)
        for sparse in proto.sparse_initializer:
            found[sparse.values.name] = Literal(dense(sparse)), Provenance()
        for info in proto.input:
            if info.name not in constants and info.name not in found:
                self.graph._add_input(Value(info.name, type_from_proto(info.type, info.name)))
        for name, expr in constants.items():
            self.constant(name, expr)
        for name, (expr, stored) in found.items():
            self.constant(name, expr, stored)

    def constant(self, name: str, expr: TensorExpr, stored: Provenance | None = None) -> None:
        """Add a constant."""
        value = Value(name, expr.type, expr)
        value.provenance = self.sources.get(name) or stored or Provenance()
        self.graph._add_value(value)

    def nodes(self, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> None:
        """Add the nodes, name the outputs, and drop the constants that nothing reads."""
        read = {name for node in nodes for name in node.input}
        read |= {name for node in nodes for inner in inner_graphs(node) for name in captured(inner)}
        self._taken = {name for node in nodes for name in node.output}
        renamed: dict[str, str] = {}  # outputs that to_onnx named by an Identity
        for node in nodes:
            name = node.output[0] if node.op_type == "Identity" else ""
            if name and node.name == f"{OUTPUT_PREFIX}{name}" and name not in read:
                renamed[name] = node.input[0]
            else:
                self._node(node)
        for name in outputs:
            value = self.graph.values.get(renamed.get(name, name))
            if value is None:
                raise UserError(f"{self.graph.name}: nothing computes the output {name!r}")
            self.graph._set_output(name, value)
        for value in self.graph.constants():
            if not value.uses and not self.graph.is_output(value):
                self.graph._remove_value(value)

    def _node(self, proto: onnx.NodeProto) -> None:
        label = next((name for name in proto.output if name), proto.name)
        domain = _domain(proto.domain)
        if proto.op_type == "Constant" and not domain:
            self.constant(proto.output[0], Literal(_constant(proto, label)), stored_provenance(proto))
            return
        inputs = [self._value(name, proto) if name else None for name in proto.input]
        if key_of(proto) in self.functions.table:
            node, names, results = self.functions.call(proto, inputs, label)
        else:
            while inputs and inputs[-1] is None:
                inputs.pop()
            attributes = {a.name: read_attribute(a, label) for a in proto.attribute}
            for _, inner in subgraphs(attributes):
                inputs += [self._value(name, proto) for name in inner.captures]
            node = Node(proto.op_type, inputs, attributes, domain=domain)
            names = list(proto.output)
            while len(names) > 1 and not names[-1]:
                names.pop()
            results = self._types(node, names, label)
        node.name = proto.name
        node.provenance = next((self.sources[o] for o in names if o in self.sources), None) or stored_provenance(proto)
        self._add(node, names, [self._refined(r, n) for r, n in zip(results, names, strict=True)])

    def _value(self, name: str, user: onnx.NodeProto) -> Value:
        value = self.graph.values.get(name)
        if value is None:
            where = user.name or next((o for o in user.output if o), "")
            raise UserError(f"node {where!r} ({user.op_type}) uses {name!r} before anything defines it")
        return value

    def _add(self, node: Node, names: Sequence[str], results: Sequence[Result]) -> None:
        values: list[Value] = []
        for name, result in zip(names, results, strict=True):
            values.append(Value(name, result.type) if name else Absent(self._unused(node), result.type))
            values[-1].elements = result.elements
        self.graph._add_node(node, values)

    def _unused(self, node: Node) -> str:
        name = self.graph.fresh_name(f"{node.name or node.op_type}_unused")
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def _types(self, node: Node, names: Sequence[str], label: str) -> list[Result]:
        """Inferred, else declared, else for a foreign operator what ONNX infers of the whole model."""
        try:
            return infer(node.op, node.inputs, node.attributes, len(names), opset=self.graph.opset, label=label)
        except InferenceError:
            declared = self._declared(names)
            if None in declared and self._model is not None and "::" in node.op:
                self._infer_all(self._model)
                declared = self._declared(names)
            if None in declared:
                raise
            return [Result(type) for type in declared if type is not None]

    def _declared(self, names: Sequence[str]) -> list[TensorType | None]:
        nothing = OpaqueType.of(onnx.TypeProto())
        return [(type_from_proto(self.known[n], n) if n in self.known else None) if n else nothing for n in names]

    def _infer_all(self, model: onnx.ModelProto) -> None:
        self._model = None
        try:
            inferred = onnx.shape_inference.infer_shapes(model)
        except (onnx.shape_inference.InferenceError, RuntimeError):
            return
        for info in inferred.graph.value_info:
            if has_type(info.type):
                self.known.setdefault(info.name, info.type)

    def _refined(self, result: Result, name: str) -> Result:
        declared = type_from_proto(self.known[name], name) if name in self.known else None
        return Result(refine(result.type, declared), result.elements)


class _Functions:
    """Makes bodies of the functions that are called; ``graph.functions`` fills up."""

    def __init__(self, root: Graph, table: dict[Key, onnx.FunctionProto], extras: Mapping[str, Extras]) -> None:
        self.table = table
        self._root = root
        self._extras = extras
        self._made: dict[object, str] = {}
        self._open: list[Key] = []

    def call(
        self, proto: onnx.NodeProto, inputs: Sequence[Value | None], label: str
    ) -> tuple[Node, list[str], list[Result]]:
        """The call of a body that has the types, attributes and outputs of this call, its outputs' names and types."""
        key = key_of(proto)
        if key in self._open:
            raise UserError(f"the function {key[0]}::{key[1]} calls itself")
        function = self.table[key]
        given = {f: v for f, v in zip(function.input, inputs, strict=False) if v is not None}
        outputs = {f: name for f, name in zip(function.output, proto.output, strict=False) if name}
        types = local_types({formal: value.type for formal, value in given.items()}, _declared_types(function))
        attributes = {a.name: a for a in proto.attribute}
        texts = tuple(sorted((n, a.SerializeToString(deterministic=True)) for n, a in attributes.items()))
        identity = (key, tuple(types.items()), texts, tuple(outputs))
        if identity not in self._made:
            op = free_name(f"{key[0]}::{key[1]}", self._names_besides(key))
            self._made[identity] = op
            self._root.functions[op] = Graph(split_op(op)[1])
            self._build(self._root.functions[op], op, key, types, attributes, list(outputs))
        op = self._made[identity]
        body = self._root.functions[op]
        found = [value.type for value in body.outputs.values()]
        dims: dict[str, Dim] = caller_dims(types.values(), (v.type for v in given.values()), found, label)
        node = Node(split_op(op)[1], given.values(), domain=key[0])
        return node, list(outputs.values()), [Result(type.bind(dims)) for type in found]

    def _names_besides(self, key: Key) -> list[str]:
        others = [f"{domain}::{name}" for domain, name, overload in self.table if (domain, name) != key[:2]]
        return [*self._root.functions, *others]

    def _build(
        self,
        body: Graph,
        op: str,
        key: Key,
        types: Mapping[str, TensorType],
        attributes: Mapping[str, onnx.AttributeProto],
        outputs: Sequence[str],
    ) -> None:
        self._open.append(key)
        function = self.table[key]
        body.opset, domains = _versions(function.opset_import, self._root.opset)
        body.functions = self._root.functions  # bodies call each other by the same names
        constants, sources = self._extras.get(op, ({}, {}))
        trusted = _declared_types(function).items() >= types.items()
        known = {i.name: i.type for i in function.value_info} if trusted else {}
        reader = _Reader(body, known, sources, self)
        for formal, type in types.items():
            body._add_input(Value(formal, type))
        for name, expr in constants.items():
            reader.constant(name, expr)
        reader.nodes(specialized(function, attributes, [f for f in function.input if f not in types]), outputs)
        body.domains = _used(domains, body)
        self._open.pop()


def _declared_types(function: onnx.FunctionProto) -> dict[str, TensorType]:
    return {i.name: type_from_proto(i.type, i.name) for i in function.value_info if has_type(i.type)}


def _literal(tensor: onnx.TensorProto) -> Literal:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise UserError(f"weight {tensor.name!r} is stored outside the model, and no file was given for it")
    return Literal(np.array(numpy_helper.to_array(tensor)))


def dense(sparse: onnx.SparseTensorProto) -> npt.NDArray[Any]:
    """The elements of a sparse tensor, zeros included; indices are linear or one row an element."""
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    result = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        result.reshape(-1)[indices] = values
    else:
        result[tuple(indices.T)] = values
    return result


def _constant(proto: onnx.NodeProto, label: str) -> npt.NDArray[Any]:
    for attribute in proto.attribute:
        match attribute.name:
            case "value":
                return np.array(numpy_helper.to_array(attribute.t))
            case "sparse_value":
                return dense(attribute.sparse_tensor)
            case "value_float":
                return np.array(attribute.f, np.float32)
            case "value_floats":
                return np.array(attribute.floats, np.float32)
            case "value_int":
                return np.array(attribute.i, np.int64)
            case "value_ints":
                return np.array(attribute.ints, np.int64)
            case "value_string":
                return np.array(attribute.s.decode(), object)
            case "value_strings":
                return np.array([s.decode() for s in attribute.strings], object)
    raise UserError(f"constant {label!r} has none of the supported forms")


def stored_provenance(proto: onnx.NodeProto | onnx.TensorProto) -> Provenance:
    """What :func:`to_onnx` wrote of a node or an initializer; empty when a model is not ours."""
    for prop in proto.metadata_props:
        if prop.key == PROVENANCE_KEY:
            return provenance_from_json(prop.value)
    return Provenance()


def refine(inferred: TensorType, declared: TensorType | None) -> TensorType:
    """The inferred type with dimensions that only the declaration knows."""
    if isinstance(inferred, OpaqueType):
        return declared if isinstance(declared, OpaqueType) else inferred
    if declared is None or declared.shape is None:
        return inferred
    if inferred.shape is None or len(inferred.shape) != len(declared.shape):
        return TensorType(inferred.dtype, declared.shape)
    dims = tuple(d if is_opaque(i) else i for i, d in zip(inferred.shape, declared.shape, strict=True))
    return TensorType(inferred.dtype, dims)

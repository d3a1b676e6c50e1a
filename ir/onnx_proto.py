"""Graph to ONNX and back; weights go by reference, so neither direction touches weight data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

import vacc_opt.ir.infer_rules  # noqa: F401 - registers the type rules
from vacc_opt.ir import ops
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.infer import InferenceError, Result, infer, make_attribute, type_from_proto, type_proto
from vacc_opt.ir.provenance import Origin, Provenance
from vacc_opt.ir.tensor import Literal, TensorExpr
from vacc_opt.ir.types import Dim, DType, TensorType
from vacc_opt.ir.weights import formula

IR_VERSION = 10
INLINE_ELEMENTS = 16  # literals up to this size stand inside the model, larger constants go by reference
PROVENANCE_KEY, FORMULA_KEY = "vacc_opt.provenance", "vacc_opt.formula"  # in metadata_props of nodes and weights
OUTPUT_PREFIX = "output/"  # names of Identity nodes that stand for a second name of a value
External = Callable[[Value], tuple[str, int, int]]


# ONNX -> Graph


def from_onnx(
    model: onnx.ModelProto,
    constants: Mapping[str, TensorExpr] | None = None,
    provenance: Mapping[str, Provenance] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Graph:
    """Build a graph from a model whose weights are graph inputs or external initializers named in ``constants``.

    Args:
        model: the model; initializers with data inside become literals.
        constants: expression of each weight, by the name of the input or initializer that stands for it.
        provenance: where nodes and constants come from, by the name of the constant or of a value that the node makes.
        metadata: facts that travel with the graph.

    Raises:
        UserError: a node uses a name that nothing defines, control flow, or a type we do not handle.
    """
    constants = dict(constants or {})
    opsets = {o.domain or "": o.version for o in model.opset_import}
    graph = Graph(model.graph.name or "graph", opset=opsets.get("", 24))
    graph.metadata = {p.key: p.value for p in model.metadata_props if not p.key.startswith("onnxsim.")}
    graph.metadata.update(metadata or {})
    graph.ranks = int(graph.metadata.pop("ranks", "1"))
    sources = dict(provenance or {})
    for tensor in model.graph.initializer:
        if tensor.name not in constants:
            constants[tensor.name] = _literal(tensor)
            sources.setdefault(tensor.name, stored_provenance(tensor))
    for info in model.graph.input:
        if info.name not in constants:
            graph._add_input(Value(info.name, type_from_proto(info.type, info.name)))
    for name, expr in constants.items():
        _add_constant(graph, name, expr, sources.get(name))
    known = {i.name: i.type for i in (*model.graph.value_info, *model.graph.output) if i.type.tensor_type.elem_type}
    read = {name for proto in model.graph.node for name in proto.input}
    renamed: dict[str, str] = {}  # outputs that to_onnx named by an Identity
    for proto in model.graph.node:
        if proto.name == f"{OUTPUT_PREFIX}{proto.output[0]}" and proto.output[0] not in read:
            renamed[proto.output[0]] = proto.input[0]
        else:
            _import_node(graph, proto, known, sources)
    for info in model.graph.output:
        name = renamed.get(info.name, info.name)
        if name not in graph.values:
            raise UserError(f"{graph.name}: nothing computes the output {info.name!r}")
        graph._set_output(info.name, graph.values[name])
    for value in graph.constants():
        if not value.uses and not graph.is_output(value):
            graph._remove_value(value)
    return graph


def _add_constant(graph: Graph, name: str, expr: TensorExpr, provenance: Provenance | None) -> None:
    value = Value(name, expr.type, expr)
    value.provenance = provenance or Provenance()
    graph._add_value(value)


def _literal(tensor: onnx.TensorProto) -> Literal:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise UserError(f"weight {tensor.name!r} is stored outside the model, and no file was given for it")
    return Literal(np.array(numpy_helper.to_array(tensor)))


def _import_node(
    graph: Graph,
    proto: onnx.NodeProto,
    known: Mapping[str, onnx.TypeProto],
    sources: Mapping[str, Provenance],
) -> None:
    label = proto.output[0] if proto.output else proto.name
    attributes = {a.name: _attribute(a, label) for a in proto.attribute}
    if proto.op_type == "Constant" and not proto.domain:
        found = sources.get(proto.output[0]) or stored_provenance(proto)
        _add_constant(graph, proto.output[0], _constant(attributes, label), found)
        return
    inputs: list[Value | None] = []
    for name in proto.input:
        if name and name not in graph.values:
            raise UserError(f"node {proto.name or label!r} ({proto.op_type}) uses {name!r} before anything defines it")
        inputs.append(graph.values[name] if name else None)
    while inputs and inputs[-1] is None:
        inputs.pop()
    origin = next((sources[o] for o in proto.output if o in sources), None) or stored_provenance(proto)
    node = Node(proto.op_type, inputs, attributes, domain=_domain(proto.domain), name=proto.name, provenance=origin)
    names = list(proto.output)
    while len(names) > 1 and not names[-1]:
        names.pop()
    results = _types(graph, node, names, known)
    values = [Value(n or graph.fresh_name(f"{label}_unused"), r.type) for n, r in zip(names, results, strict=True)]
    for value, result in zip(values, results, strict=True):
        value.elements = result.elements
    graph._add_node(node, values)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _types(graph: Graph, node: Node, names: list[str], known: Mapping[str, onnx.TypeProto]) -> list[Result]:
    declared = [type_from_proto(known[n], n) if n in known else None for n in names]
    try:
        found = infer(node.op, node.inputs, node.attributes, len(names), opset=graph.opset, label=names[0])
    except InferenceError:
        if any(d is None for d in declared):
            raise
        return [Result(d) for d in declared if d is not None]
    return [Result(refine(r.type, d), r.elements) for r, d in zip(found, declared, strict=True)]


def refine(inferred: TensorType, declared: TensorType | None) -> TensorType:
    """The inferred type with dimensions that only the declaration knows."""
    if declared is None or declared.shape is None:
        return inferred
    if inferred.shape is None or len(inferred.shape) != len(declared.shape):
        return TensorType(inferred.dtype, declared.shape)
    dims = tuple(d if _opaque(i) else i for i, d in zip(inferred.shape, declared.shape, strict=True))
    return TensorType(inferred.dtype, dims)


def _opaque(dim: Dim) -> bool:
    return not isinstance(dim, int) and "." in str(dim)


def _attribute(proto: onnx.AttributeProto, label: str) -> Any:
    if proto.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
        raise UserError(f"node {label!r} holds a subgraph (If, Loop or Scan), which is not supported")
    value = helper.get_attribute_value(proto)
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(v.decode() if isinstance(v, bytes) else v for v in value)
    return value


def _constant(attributes: Mapping[str, Any], label: str) -> Literal:
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64),
                        ("value_ints", np.int64)):  # fmt: skip
        if name in attributes:
            return Literal(np.asarray(attributes[name], dtype))
    if "value" in attributes:
        return Literal(np.array(attributes["value"]))
    raise UserError(f"constant {label!r} has none of the supported forms")


def stored_provenance(proto: onnx.NodeProto | onnx.TensorProto) -> Provenance:
    """What :func:`to_onnx` wrote of a node or an initializer; empty when a model is not ours."""
    for prop in proto.metadata_props:
        if prop.key == PROVENANCE_KEY:
            return provenance_from_json(prop.value)
    return Provenance()


def provenance_to_json(provenance: Provenance) -> str:
    """One line of JSON: origins as [module, source, op] lists, then passes."""
    return json.dumps([[[o.module, o.source, o.op] for o in provenance.origins], list(provenance.passes)])


def provenance_from_json(text: str) -> Provenance:
    """Read :func:`provenance_to_json` back."""
    origins, passes = json.loads(text)
    return Provenance(tuple(Origin(*o) for o in origins), tuple(passes))


# Graph -> ONNX


def to_onnx(
    graph: Graph, external: External | None = None, *, provenance: bool = True, rank: int = 0
) -> onnx.ModelProto:
    """The graph as a model; output values take their interface names.

    Args:
        graph: any graph; collectives are written as bare ``Vastai`` nodes.
        external: where a large constant lies, as (location, offset, length); without it such constants appear only
            as typed names (a skeleton).
        provenance: write the provenance of nodes and constants, and the formulas of weights, as ``metadata_props``.
        rank: whose weights ``external`` places.
    """
    names = export_names(graph)
    nodes = [_export_node(node, names, provenance) for node in graph.nodes()]
    nodes += [
        helper.make_node("Identity", [names[value]], [name], name=f"{OUTPUT_PREFIX}{name}")
        for name, value in graph.outputs.items()
        if names[value] != name
    ]
    initializers: list[onnx.TensorProto] = []
    infos: list[onnx.ValueInfoProto] = []
    for value in graph.constants():
        if isinstance(value.const, Literal) and value.const.array.size <= INLINE_ELEMENTS:
            initializers.append(numpy_helper.from_array(value.const.array, names[value]))
        elif external is not None:
            initializers.append(_external_tensor(names[value], value.type, external(value)))
        else:
            infos.append(_info(names[value], value.type))
            continue
        if provenance:
            _describe(initializers[-1], value, rank)
    outputs = [_info(name, value.type) for name, value in graph.outputs.items()]
    proto = helper.make_graph(
        nodes,
        graph.name,
        [_info(v.name, v.type) for v in graph.inputs],
        outputs,
        initializer=initializers,
        value_info=infos,
    )
    used = sorted({n.domain for n in graph.nodes()})
    imports = [helper.make_opsetid("", graph.opset)] + [helper.make_opsetid(d, 1) for d in used if d]
    functions = [
        op.function(graph.opset) for op in ops.OPS.values() if not op.is_collective and graph.by_op(op.name, ops.DOMAIN)
    ]
    if functions and ops.DOMAIN not in used:
        imports.append(helper.make_opsetid(ops.DOMAIN, 1))
    model = helper.make_model(proto, opset_imports=imports, functions=functions, ir_version=IR_VERSION)
    model.producer_name = "vacc-opt"
    metadata = dict(graph.metadata, **({"ranks": str(graph.ranks)} if graph.ranks > 1 else {}))
    helper.set_model_props(model, dict(sorted(metadata.items())))
    return model


def export_names(graph: Graph) -> dict[Value, str]:
    """The ONNX name of every value: a computed output takes its interface name, the rest keep theirs unless taken."""
    names = {value: value.name for value in graph.inputs}
    taken = {value.name for value in graph.inputs} | set(graph.outputs)
    for name, value in graph.outputs.items():
        if value.producer is not None and value not in names:
            names[value] = name
    for value in graph.values.values():
        if value in names:
            continue
        name = value.name
        while name in taken:
            name += "_"
        taken.add(name)
        names[value] = name
    return names


def _export_node(node: Node, names: Mapping[Value, str], provenance: bool) -> onnx.NodeProto:
    proto = helper.make_node(
        node.op_type,
        ["" if v is None else names[v] for v in node.inputs],
        [names[v] for v in node.outputs],
        name=node.name,
        domain=node.domain or None,
    )
    proto.attribute.extend(make_attribute(k, v) for k, v in sorted(node.attributes.items()))
    if provenance and node.provenance != Provenance():
        proto.metadata_props.add(key=PROVENANCE_KEY, value=provenance_to_json(node.provenance))
    return proto


def _describe(tensor: onnx.TensorProto, value: Value, rank: int) -> None:
    assert value.const is not None
    if value.provenance != Provenance():
        tensor.metadata_props.add(key=PROVENANCE_KEY, value=provenance_to_json(value.provenance))
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        tensor.metadata_props.add(key=FORMULA_KEY, value=formula(value.const.rank(rank)))


def _info(name: str, type: TensorType) -> onnx.ValueInfoProto:
    return helper.make_value_info(name, type_proto(type))


def _external_tensor(name: str, type: TensorType, place: tuple[str, int, int]) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=DType(type.dtype.value).onnx, dims=type.static_shape or ())
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in zip(("location", "offset", "length"), place, strict=True):
        tensor.external_data.add(key=key, value=str(value))
    return tensor

"""Graphs to ONNX models; weights go by reference, calls of local functions with the bodies that they need."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import onnx
from onnx import helper, numpy_helper

from vacc_opt.ir import ops
from vacc_opt.ir.attributes import make_node, nodes_within, subgraphs
from vacc_opt.ir.functions import called_functions, free_name, split_op
from vacc_opt.ir.graph import Absent, Graph, Node, Value
from vacc_opt.ir.infer import RULES, type_proto
from vacc_opt.ir.provenance import Origin, Provenance
from vacc_opt.ir.tensor import Literal
from vacc_opt.ir.types import DType, TensorType
from vacc_opt.ir.weights import formula

IR_VERSION = 10
INLINE_ELEMENTS = 16  # literals up to this size stand inside the model, larger constants go by reference
PROVENANCE_KEY, FORMULA_KEY = "vacc_opt.provenance", "vacc_opt.formula"  # in metadata_props of nodes and weights
OUTPUT_PREFIX = "output/"  # names of Identity nodes that stand for a second name of a value
External = Callable[[Value], tuple[str, int, int]]


def to_onnx(
    graph: Graph,
    external: External | None = None,
    *,
    provenance: bool = True,
    rank: int = 0,
    embed: Callable[[Value], bool] = lambda value: True,
) -> onnx.ModelProto:
    """The graph as a model; output values take their interface names.

    Args:
        graph: any graph; collectives are written as bare ``Vastai`` nodes.
        external: where a large constant lies, as (location, offset, length); without it such constants appear only
            as typed names (a skeleton).
        provenance: write the provenance of nodes and constants, and the formulas of weights, as ``metadata_props``.
        rank: whose weights ``external`` places.
        embed: which constants of function bodies are written, there only as data; the others appear nowhere.
    """
    names = export_names(graph)
    initializers: list[onnx.TensorProto] = []
    infos = [_info(names[value], value.type) for value in _untold(graph)]
    for value in graph.constants():
        if is_inline(value):
            assert value.const is not None
            initializers.append(numpy_helper.from_array(value.const.read(), names[value]))
        elif external is not None:
            initializers.append(_external_tensor(names[value], value.type, external(value)))
        else:
            infos.append(_info(names[value], value.type))
            continue
        if provenance:
            _describe(initializers[-1], value, rank)
    proto = helper.make_graph(
        _nodes(graph, names, graph.outputs, provenance),
        graph.name,
        [_info(v.name, v.type) for v in graph.inputs],
        [_info(name, value.type) for name, value in graph.outputs.items()],
        initializer=initializers,
        value_info=infos,
    )
    bodies = called_functions(graph)
    functions = [_function(op, body, provenance, embed) for op, body in bodies.items()]
    own = list(_own_functions(graph, bodies.values()))
    imports = _imports(graph)
    if own and all(i.domain != ops.DOMAIN for i in imports):
        imports.append(helper.make_opsetid(ops.DOMAIN, 1))
    model = helper.make_model(proto, opset_imports=imports, functions=[*functions, *own], ir_version=IR_VERSION)
    model.producer_name = "vacc-opt"
    metadata = dict(graph.metadata, **({"ranks": str(graph.ranks)} if graph.ranks > 1 else {}))
    helper.set_model_props(model, dict(sorted(metadata.items())))
    return model


def _own_functions(graph: Graph, bodies: Collection[Graph]) -> Iterator[onnx.FunctionProto]:
    """The bodies of our own operators, an overload for each combination of facets in use."""
    for op in ops.OPS.values():
        calls = [node for one in (graph, *bodies) for node in one.by_op(op.name, ops.DOMAIN)]
        if not op.is_collective:
            yield from (op.function(graph.opset, facets) for facets in sorted({op.facets(node) for node in calls}))


def is_inline(value: Value) -> bool:
    """True for constants that stand inside a model: small literals, and strings, which have no form outside."""
    small = isinstance(value.const, Literal) and value.const.array.size <= INLINE_ELEMENTS
    return small or value.type.dtype is DType.STRING


def _imports(graph: Graph) -> list[onnx.OperatorSetIdProto]:
    used = {split_op(op)[0] for op in graph.op_counts()}
    used |= {inner.domain for node in graph.nodes() for inner in nodes_within(node)}
    versions = [("", graph.opset)] + [(d, graph.domains.get(d, 1)) for d in sorted(used) if d]
    return [helper.make_opsetid(domain, version) for domain, version in versions]


def _nodes(
    graph: Graph, names: Mapping[Value, str], outputs: Mapping[str, Value], provenance: bool
) -> list[onnx.NodeProto]:
    taken = {name for value, name in names.items() if not isinstance(value, Absent)} | set(outputs)
    nodes = [_export_node(node, names, taken, provenance) for node in graph.nodes()]
    nodes += [
        helper.make_node("Identity", [names[value]], [name], name=f"{OUTPUT_PREFIX}{name}")
        for name, value in outputs.items()
        if names[value] != name
    ]
    _name_apart(nodes)
    return nodes


def _name_apart(nodes: Sequence[onnx.NodeProto]) -> None:
    """Give nodes of one name another each: a node keeps its name when its value is renamed, and onnxruntime refuses it
    beside a new node that took the value's old one."""
    taken = {node.name for node in nodes}
    seen: set[str] = set()
    for node in nodes:
        if node.name in seen and node.name:
            node.name = free_name(node.name, taken)
            taken.add(node.name)
        seen.add(node.name)


def _export_node(node: Node, names: Mapping[Value, str], taken: Collection[str], provenance: bool) -> onnx.NodeProto:
    inputs = ["" if v is None else names[v] for v in node.inputs]
    outputs = ["" if isinstance(v, Absent) else names[v] for v in node.outputs]
    proto = make_node((node.domain, node.op_type), inputs, outputs, node.attributes, taken)
    if node.name:
        proto.name = node.name
    if facets := ops.facets_of(node):
        proto.overload = ops.overload(facets)
    if provenance and node.provenance != Provenance():
        proto.metadata_props.add(key=PROVENANCE_KEY, value=provenance_to_json(node.provenance))
    return proto


def _untold(graph: Graph) -> Iterator[Value]:
    """Values whose type a reader could not infer: results of foreign operators and of subgraphs."""
    for node in graph.nodes():
        op = node.op
        foreign = "::" in op and op not in RULES and op not in graph.functions
        if foreign or subgraphs(node.attributes):
            yield from (v for v in node.outputs if not isinstance(v, Absent) and not graph.is_output(v))


def _function(op: str, body: Graph, provenance: bool, embed: Callable[[Value], bool]) -> onnx.FunctionProto:
    """A body as a function, with the types of its inputs and with constants as ``Constant`` nodes."""
    names = export_names(body)
    constants: list[onnx.NodeProto] = []
    for value in body.constants():
        if value.const is not None and embed(value):
            tensor = numpy_helper.from_array(value.const.read())
            constants.append(helper.make_node("Constant", [], [names[value]], value=tensor))
            if provenance and value.provenance != Provenance():
                prop = provenance_to_json(value.provenance)
                constants[-1].metadata_props.add(key=PROVENANCE_KEY, value=prop)
    inputs = [value.name for value in body.inputs]
    # onnxruntime wants an output that is an input to have another name
    outputs = {free_name(name, inputs): value for name, value in body.outputs.items()}
    nodes = constants + _nodes(body, names, outputs, provenance)
    function = helper.make_function(*split_op(op), inputs, list(outputs), nodes, _imports(body))
    typed = [*body.inputs, *_untold(body)]
    function.value_info.extend(_info(names[value], value.type) for value in typed)
    return function


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


def provenance_to_json(provenance: Provenance) -> str:
    """One line of JSON: origins as [module, source, op] lists, then passes."""
    return json.dumps([[[o.module, o.source, o.op] for o in provenance.origins], list(provenance.passes)])


def provenance_from_json(text: str) -> Provenance:
    """Read :func:`provenance_to_json` back."""
    origins, passes = json.loads(text)
    return Provenance(tuple(Origin(*o) for o in origins), tuple(passes))

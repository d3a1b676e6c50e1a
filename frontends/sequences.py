"""SplitToSequence and SequenceAt, as torch exports ``split`` and ``chunk``, become Split: our graphs hold tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Ints = npt.NDArray[np.int64]


def resolve_sequences(model: onnx.ModelProto) -> None:
    """Rewrite, in place, every split whose sizes are known and whose sequence is only read by constant indices."""
    graph = model.graph
    splits = {node.output[0]: node for node in graph.node if node.op_type == "SplitToSequence"}
    if not splits:
        return
    constants = dict(_constants(graph))
    readers: dict[str, list[onnx.NodeProto]] = {name: [] for name in splits}
    for node in graph.node:
        for name in node.input:
            if name in readers:
                readers[name].append(node)
    widths = _widths(graph)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    dropped: set[str] = set()
    for name, node in splits.items():
        sizes = _sizes(node, constants, widths)
        indices = [_index(reader, constants) for reader in readers[name]]
        known = [i for i in indices if i is not None]
        if sizes is not None and len(known) == len(indices) and all(-len(sizes) <= i < len(sizes) for i in known):
            replaced[name] = list(_split(node, sizes, zip(readers[name], known, strict=True), graph))
            dropped |= {reader.output[0] for reader in readers[name]}
    nodes = [
        new for node in graph.node for new in replaced.get(node.output[0], [node]) if node.output[0] not in dropped
    ]
    del graph.node[:]
    graph.node.extend(nodes)


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, Ints]]:
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT64 and tensor.data_location != onnx.TensorProto.EXTERNAL:
            yield tensor.name, numpy_helper.to_array(tensor)
    for node in graph.node:
        if node.op_type == "Constant":
            value = helper.get_attribute_value(node.attribute[0])
            array = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
            if array.dtype == np.int64:
                yield node.output[0], array


def _widths(graph: onnx.GraphProto) -> Mapping[str, list[int | None]]:
    infos = (*graph.value_info, *graph.input)
    return {i.name: [d.dim_value or None for d in i.type.tensor_type.shape.dim] for i in infos}


def _axis(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 0)


def _sizes(
    node: onnx.NodeProto, constants: Mapping[str, Ints], widths: Mapping[str, list[int | None]]
) -> list[int] | None:
    """The sizes of the parts; one number is the size of each part but the last."""
    given = constants.get(node.input[1]) if len(node.input) > 1 else None
    if given is None or given.ndim:
        return None if given is None else [int(n) for n in given]
    shape, axis = widths.get(node.input[0], []), _axis(node)
    whole = shape[axis] if -len(shape) <= axis < len(shape) else None
    return None if whole is None else [min(int(given), whole - at) for at in range(0, whole, int(given))]


def _index(node: onnx.NodeProto, constants: Mapping[str, Ints]) -> int | None:
    index = constants.get(node.input[1]) if node.op_type == "SequenceAt" else None
    return None if index is None or index.size != 1 else int(index.reshape(-1)[0])


def _split(
    node: onnx.NodeProto, sizes: list[int], readers: Iterator[tuple[onnx.NodeProto, int]], graph: onnx.GraphProto
) -> Iterator[onnx.NodeProto]:
    """The Split, its outputs named as the readers named them; a second reader of a part becomes an Identity."""
    outputs = [f"{node.output[0]}.{i}" for i in range(len(sizes))]
    again: list[onnx.NodeProto] = []
    named: set[int] = set()
    for reader, index in readers:
        if index % len(sizes) in named:
            again.append(helper.make_node("Identity", [outputs[index]], list(reader.output), name=reader.name))
        else:
            outputs[index] = reader.output[0]
            named.add(index % len(sizes))
    tensor = f"{node.output[0]}.sizes"
    graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), tensor))
    yield helper.make_node("Split", [node.input[0], tensor], outputs, name=node.name, axis=_axis(node))
    yield from again

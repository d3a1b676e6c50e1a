"""Type inference of one node: symbolic shapes by our own rules, anything else by ONNX's shape inference.

ONNX's inference gives up on ``past + seq``; ours keeps such dimensions as polynomials, and also the *elements* of small
integer tensors, so that ``Reshape(x, Concat(Shape(..), [-1], [64]))`` has a known shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TypeProto, helper, numpy_helper

from vacc_opt.ir.attributes import make_node, subgraphs
from vacc_opt.ir.errors import CheckError, first_line
from vacc_opt.ir.graph import Value, attribute_key
from vacc_opt.ir.tensor import Literal
from vacc_opt.ir.types import Dim, DType, OpaqueType, Shape, SymbolicDim, TensorType

MAX_ELEMENTS = 64  # integer tensors up to this size have their elements followed
RULES_OPSET = 18  # the oldest whose operators our rules and passes mean; a graph of an older opset is left to ONNX
MAX_KNOWN = 1 << 14  # results that are kept
Elements = tuple[Dim, ...]
_WITH_ELEMENTS = (DType.INT64, DType.INT32, DType.BOOL)


class InferenceError(CheckError):
    """The inputs of a node do not fit its operator."""


@dataclass(frozen=True)
class Result:
    """What is inferred of one output."""

    type: TensorType
    elements: Elements | None = None


@dataclass(frozen=True)
class Context:
    """The node under inference, as a rule sees it."""

    op: str
    inputs: Sequence[Value | None]
    attributes: Mapping[str, Any]
    opset: int
    label: str
    outputs: int = 1

    def type(self, index: int) -> TensorType:
        """Type of an input; raises InferenceError when it is absent."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise InferenceError(f"{self.label}: input {index} of {self.op} is missing")
        return value.type

    def has(self, index: int) -> bool:
        """True when the optional input is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def dtype(self, index: int = 0) -> DType:
        """Element type of an input."""
        return self.type(index).dtype

    def shape(self, index: int = 0) -> Shape | None:
        """Shape of an input, None when the rank is unknown."""
        return self.type(index).shape

    def elements(self, index: int) -> Elements | None:
        """Elements of a small integer input, None when unknown or absent."""
        value = self.inputs[index] if index < len(self.inputs) else None
        return None if value is None else elements_of(value)

    def ints(self, index: int) -> tuple[int, ...] | None:
        """Elements of an integer input when all of them are numbers."""
        elements = self.elements(index)
        if elements is None:
            return None
        numbers = tuple(e for e in elements if isinstance(e, int))
        return numbers if len(numbers) == len(elements) else None

    def unknown(self, axis: int, *, of: int = 0) -> Dim:
        """A fresh opaque dimension of the output number ``of``."""
        stem = self.label if not of else f"{self.label}.{of}"
        return SymbolicDim.parse(f"{stem}.{axis}".replace(" ", "_").replace("-", "_"))

    def error(self, message: str) -> InferenceError:
        """An error that names the node."""
        return InferenceError(f"{self.label}: {self.op}: {message}")


Rule = Callable[[Context], Result | Sequence[Result]]
RULES: dict[str, Rule] = {}
_KNOWN: dict[Hashable, list[Result]] = {}
_TYPES: dict[TensorType, TensorType] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators (``Vastai::`` ones with their domain)."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[op] = function
        return function

    return register


def elements_of(value: Value) -> Elements | None:
    """Entries of a small integer tensor, row-major, as numbers or symbolic dimensions."""
    if value.elements is not None:
        return value.elements
    small = value.const is not None and math.prod(value.const.shape) <= MAX_ELEMENTS
    if small and isinstance(value.const, Literal) and value.const.dtype in _WITH_ELEMENTS:
        return tuple(int(x) for x in value.const.array.reshape(-1))
    return None


def broadcast(ctx: Context, *shapes: Shape | None) -> Shape | None:
    """The shape that numpy's broadcasting gives; a mismatch of two numbers is an error."""
    known = [s for s in shapes if s is not None]
    if len(known) != len(shapes):
        return None
    rank = max(len(s) for s in known)
    padded: list[Shape] = [(1,) * (rank - len(s)) + s for s in known]
    result: list[Dim] = []
    for axis in range(rank):
        dims = [s[axis] for s in padded if s[axis] != 1]
        numbers = {d for d in dims if isinstance(d, int)}
        if len(numbers) > 1:
            raise ctx.error(f"shapes {' and '.join(map(shape_text, known))} do not broadcast")
        symbols = dict.fromkeys(d for d in dims if not isinstance(d, int))
        if numbers:
            result.append(numbers.pop())
        elif not symbols:
            result.append(1)
        else:
            # different names must be equal at run time, or 1, which our exports rule out: keep the first
            result.append(next(iter(symbols)))
    return tuple(result)


def shape_text(shape: Shape | None) -> str:
    """``[batch,4]``."""
    return "[?]" if shape is None else f"[{','.join(map(str, shape))}]"


def infer(
    op: str, inputs: Sequence[Value | None], attributes: Mapping[str, Any], outputs: int, *, opset: int, label: str
) -> list[Result]:
    """Types of the outputs of a node that is about to be made; raises InferenceError when its inputs do not fit."""
    key = inference_key(op, inputs, attributes, outputs, opset)
    known = _KNOWN.get(key) if key is not None else None
    if known is not None:
        return known
    results = _infer(Context(op, inputs, attributes, opset, label, outputs), outputs)
    if key is not None and not any(_names_its_node(result) for result in results):
        if len(_KNOWN) >= MAX_KNOWN:
            _KNOWN.clear()
            _TYPES.clear()
        # equal types are one object, so that those who compare them mostly need not
        results = [Result(_TYPES.setdefault(r.type, r.type), r.elements) for r in results]
        _KNOWN[key] = results
    return results


def inference_key(
    op: str, inputs: Sequence[Value | None], attributes: Mapping[str, Any], outputs: int, opset: int
) -> Hashable | None:
    """What the result depends on, when that is only types and attributes: no elements and no data of a constant."""
    if op not in RULES or opset < RULES_OPSET:
        return None
    key: list[Hashable] = [op, opset, outputs, attribute_key(attributes) if attributes else ()]
    for value in inputs:
        if value is None:
            key.append(None)
        elif value.elements is not None or (value.const is not None and value.type.dtype in _WITH_ELEMENTS):
            return None
        else:
            key.append(value.type)
    return tuple(key)


def _names_its_node(result: Result) -> bool:
    """A dimension, or an element, that could only be named after the node."""
    dims = (*(result.type.shape or ()), *(result.elements or ()))
    return any(not isinstance(dim, int) and "." in str(dim) for dim in dims)


def _infer(ctx: Context, outputs: int) -> list[Result]:
    op, opset, label = ctx.op, ctx.opset, ctx.label
    if op in RULES and (opset >= RULES_OPSET or "::" in op):
        try:
            found = RULES[op](ctx)
        except (IndexError, KeyError) as error:  # a rule that looked for an axis or attribute that is not there
            types = ", ".join("absent" if v is None else str(v.type) for v in ctx.inputs)
            raise ctx.error(f"operands ({types}) do not fit") from error
        results = [found] if isinstance(found, Result) else list(found)
        if len(results) >= outputs:
            return [_representable(result) for result in results[:outputs]]
    if "::" in op:
        raise InferenceError(f"{label}: no type rule for {op}")
    return _infer_by_onnx(ctx, outputs)


def _representable(result: Result) -> Result:
    """Without elements that the type cannot hold: the computation wraps around, numbers of Python do not."""
    dtype = result.type.dtype
    if result.elements is None or dtype not in _LIMITS:
        return result
    low, high = _LIMITS[dtype]
    fits = all(low <= e <= high for e in result.elements if isinstance(e, int))
    return result if fits else Result(result.type)


_LIMITS = {DType.INT32: (-(1 << 31), (1 << 31) - 1), DType.INT64: (-(1 << 63), (1 << 63) - 1)}
_REFUSED = (
    onnx.shape_inference.InferenceError,
    onnx.checker.ValidationError,
    onnx.defs.SchemaError,
    RuntimeError,
)


def _infer_by_onnx(ctx: Context, outputs: int) -> list[Result]:
    names = [f"i{n}" if v is not None else "" for n, v in enumerate(ctx.inputs)]
    node = make_node(("", ctx.op), names, [f"o{n}" for n in range(outputs)], ctx.attributes, names)
    types: dict[str, TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for name, value in zip(names, ctx.inputs, strict=True):
        if value is None:
            continue
        types[name] = type_proto(value.type)
        if isinstance(value.const, Literal) and value.const.array.size <= MAX_ELEMENTS:
            data[name] = numpy_helper.from_array(value.const.array, name)
    try:
        found = (_infer_with_subgraphs if subgraphs(ctx.attributes) else _infer_plain)(ctx, node, types, data)
    except _REFUSED as error:
        raise ctx.error(first_line(error)) from error
    results: list[Result] = []
    for n in range(outputs):
        proto = found.get(f"o{n}")
        if proto is None or not has_type(proto):
            raise ctx.error(f"the type of output {n} cannot be inferred")
        results.append(Result(type_from_proto(proto, f"{ctx.label}.{n}")))
    return results


def _infer_plain(
    ctx: Context, node: onnx.NodeProto, types: dict[str, TypeProto], data: dict[str, onnx.TensorProto]
) -> dict[str, TypeProto]:
    schema = onnx.defs.get_schema(ctx.op, ctx.opset)
    imports = [helper.make_opsetid("", ctx.opset)]
    found: dict[str, TypeProto] = onnx.shape_inference.infer_node_outputs(
        schema, node, types, data, opset_imports=imports, ir_version=10
    )
    return found


def _infer_with_subgraphs(
    ctx: Context, node: onnx.NodeProto, types: dict[str, TypeProto], data: dict[str, onnx.TensorProto]
) -> dict[str, TypeProto]:
    """As a model of this one node: ONNX knows the types of captured values only there."""
    inputs = [helper.make_value_info(name, type) for name, type in types.items()]
    graph = helper.make_graph([node], "node", inputs, [], initializer=data.values())
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ctx.opset)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model)
    return {info.name: info.type for info in inferred.graph.output}


def type_proto(type: TensorType) -> TypeProto:
    """ONNX's form of a type; symbolic dimensions become ``dim_param`` text."""
    if isinstance(type, OpaqueType):
        return TypeProto.FromString(type.proto)
    shape = None if type.shape is None else [d if isinstance(d, int) else str(d) for d in type.shape]
    return helper.make_tensor_type_proto(type.dtype.onnx, shape)


def has_type(proto: TypeProto) -> bool:
    """False for a declaration that leaves the type, or the element type of a tensor, open."""
    kind = proto.WhichOneof("value")
    return kind is not None and (kind != "tensor_type" or bool(proto.tensor_type.elem_type))


def type_from_proto(proto: TypeProto, stem: str) -> TensorType:
    """Our form of an ONNX type; a dimension without value or name becomes an opaque one named from ``stem``."""
    tensor = proto.tensor_type
    if not proto.HasField("tensor_type"):
        return OpaqueType.of(proto)
    dtype = DType.from_onnx(tensor.elem_type)
    if not tensor.HasField("shape"):
        return TensorType(dtype)
    dims: list[Dim] = []
    for axis, dim in enumerate(tensor.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value >= 0:  # some exporters write -1 for what they do not know
            dims.append(dim.dim_value)
        else:
            dims.append(SymbolicDim.parse(dim.dim_param or f"{stem}.{axis}".replace("-", "_")))
    return TensorType(dtype, tuple(dims))

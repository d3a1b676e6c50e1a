"""Text form: ONNX's own syntax, with what it cannot say in ``#`` lines that its parser skips.

``# dim``, ``# const``, ``# from``, ``# attr`` and ``# meta`` lines carry symbolic dimensions, weight expressions,
provenance, attributes without an exact text and metadata, so that graph -> text -> graph -> text is exact, and the same
text is valid for ``onnx.parser``. A line inside a function names it: ``# from "y" in "domain::name" = ..``.
"""

from __future__ import annotations

import base64
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import onnx

from vacc_opt.ir import ops
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.ir.functions import called_functions
from vacc_opt.ir.graph import Absent, Graph, Value
from vacc_opt.ir.onnx_export import (
    IR_VERSION,
    export_names,
    is_inline,
    provenance_from_json,
    provenance_to_json,
    to_onnx,
)
from vacc_opt.ir.onnx_import import Extras, from_onnx
from vacc_opt.ir.provenance import Provenance
from vacc_opt.ir.subgraph import plain
from vacc_opt.ir.tensor import Literal, TensorExpr, parse_expr
from vacc_opt.ir.types import DType

_QUOTED = r'"(?:[^"\\]|\\.)*"'
_COMMENTS = re.compile(r"(?:\s|#[^\n]*\n)*")  # before the graph
KINDS = ("dim", "const", "from", "attr", "meta")
_SPELLED = re.compile(rf"^# (\w+) (?:{_QUOTED}|\S+)(?: in {_QUOTED})? = ", re.MULTILINE)
_LINE = re.compile(rf"^# ({'|'.join(KINDS)}) ({_QUOTED}|\S+)(?: in ({_QUOTED}))? = (.*)$", re.MULTILINE)
_Lines = dict[str, dict[str, str]]  # kind -> name -> rest
# ONNX text has an exact form for literals of these element types only, the others become `# const` lines
_EXACT = frozenset({DType.FLOAT, DType.DOUBLE, DType.INT8, DType.UINT8, DType.INT16, DType.UINT16, DType.INT32,
                    DType.UINT32, DType.INT64})  # fmt: skip
_SAFE = (onnx.AttributeProto.INT, onnx.AttributeProto.FLOAT, onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS)


def to_text(graph: Graph) -> str:
    """The graph as text, weights as expressions; the same graph gives the same bytes."""
    model = to_onnx(graph, provenance=False, embed=_inline)
    bodies = called_functions(graph)
    functions = [f for f in model.functions if f"{f.domain}::{f.name}" in bodies]
    for node in (*model.graph.node, *(node for function in functions for node in function.node)):
        if node.domain == ops.DOMAIN:
            node.ClearField("overload")  # follows from the node
    del model.functions[:]
    del model.metadata_props[:]
    model.producer_name = ""
    lines = [f"# meta {_word(key)} = {_rest(value)}" for key, value in sorted(graph.metadata.items())]
    if graph.ranks > 1:
        lines.append(f"# meta ranks = {graph.ranks}")
    _drop_initializers(model, graph)
    infos = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    infos += [info for function in functions for info in function.value_info]
    lines += [f"# dim {alias} = {name}" for alias, name in _alias_dims(infos).items()]
    lines += _scope_lines(graph, "") + _attribute_lines(model.graph.node, "")
    for (op, body), function in zip(bodies.items(), functions, strict=True):
        inside = f" in {_quoted(op)}"
        lines += _scope_lines(body, inside) + _attribute_lines(function.node, inside)
    texts = [onnx.printer.to_text(model).rstrip(), *map(_function_text, functions)]
    return "\n".join([*texts, *lines]) + "\n"


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _word(name: str) -> str:
    return name if re.fullmatch(r'[^\s"#]+', name) else _quoted(name)


def _rest(text: str) -> str:
    """What stands behind the sign of a line: itself where it ends with the line, else quoted."""
    return text if text.isprintable() and text == text.strip() and not text.startswith('"') else _quoted(text)


def _inline(value: Value) -> bool:
    return is_inline(value) and value.type.dtype in _EXACT and not _has_odd_nan(value.const)


def _has_odd_nan(const: TensorExpr | None) -> bool:
    """ONNX text has one NaN only: others have a sign or a payload that it does not say."""
    if not isinstance(const, Literal) or not const.dtype.is_float:
        return False
    odd = const.array[np.isnan(const.array)]
    return odd.tobytes() != np.full_like(odd, np.nan).tobytes()


def _drop_initializers(model: onnx.ModelProto, graph: Graph) -> None:
    """Let constants that become ``# const`` lines be typed names only."""
    names = export_names(graph)
    gone = {names[value] for value in graph.constants() if not _inline(value)}
    kept = [t for t in model.graph.initializer if t.name not in gone]
    for tensor in model.graph.initializer:
        if tensor.name in gone:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            model.graph.value_info.append(info)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _scope_lines(graph: Graph, inside: str) -> list[str]:
    """Weights and provenance of one graph."""
    names = export_names(graph)
    constants = graph.constants()
    lines = [f"# const {_quoted(names[v])}{inside} = {v.const}" for v in constants if not _inline(v)]
    nodes = [(next(v for v in n.outputs if not isinstance(v, Absent)), n.provenance) for n in graph.nodes()]
    sources = nodes + [(value, value.provenance) for value in constants]
    lines += [
        f"# from {_quoted(names[value])}{inside} = {provenance_to_json(provenance)}"
        for value, provenance in sources
        if provenance != Provenance()
    ]
    return lines


def _attribute_lines(nodes: Sequence[onnx.NodeProto], inside: str) -> list[str]:
    """Take attributes that text would not give back as they are out of the nodes, into lines."""
    lines: list[str] = []
    for node in nodes:
        lost = [a for a in node.attribute if a.type not in _SAFE and not _is_exact(a)]
        for attribute in lost:
            data = base64.b64encode(attribute.SerializeToString(deterministic=True)).decode()
            lines.append(f"# attr {_quoted(_label(node))}{inside} = {attribute.name} {data}")
            node.attribute.remove(attribute)
    return lines


def _label(node: onnx.NodeProto) -> str:
    return next((o for o in node.output if o), "")


def _is_exact(attribute: onnx.AttributeProto) -> bool:
    node = onnx.helper.make_node("A", [], ["a"])
    node.attribute.append(attribute)
    try:
        again = onnx.parser.parse_node(onnx.printer.to_text(node))
    except onnx.parser.ParseError:
        return False
    return len(again.attribute) == 1 and _message(again) == _message(node)


def _message(node: onnx.NodeProto) -> bytes:
    found: bytes = plain(onnx.GraphProto(node=[node])).SerializeToString(deterministic=True)
    return found


def _function_text(function: onnx.FunctionProto) -> str:
    """The printer's text with the types of the inputs, which it leaves out and the parser reads."""
    text: str = onnx.printer.to_text(function)
    infos: str = onnx.printer.to_text(onnx.helper.make_graph([], "g", [], [], value_info=function.value_info))
    types = infos.partition("\n")[2].rpartition("\n{")[0]
    return text.rstrip().replace("\n{\n", f"\n{types}\n{{\n", 1) if types else text.rstrip()


def _alias_dims(infos: Sequence[onnx.ValueInfoProto]) -> dict[str, str]:
    """Give dimensions such as ``past + seq`` an identifier; ``alias -> dimension``."""
    aliases: dict[str, str] = {}
    plain_names = {dim.dim_param for info in infos for dim in _dims(info.type)}
    for info in infos:
        for dim in _dims(info.type):
            name = dim.dim_param
            if name and not name.isidentifier():
                stem = re.sub(r"\W+", "_", name.replace("+", "plus").replace("-", "minus")).strip("_")
                alias = next(a for a in _numbered(stem) if a not in plain_names and aliases.get(a, name) == name)
                aliases[alias] = name
                dim.dim_param = alias
    return dict(sorted(aliases.items()))


def _dims(type: onnx.TypeProto) -> Iterator[onnx.TensorShapeProto.Dimension]:
    """The dimensions of a tensor, or of the tensors inside a sequence, optional or map."""
    match type.WhichOneof("value"):
        case "tensor_type":
            yield from type.tensor_type.shape.dim
        case "sparse_tensor_type":
            yield from type.sparse_tensor_type.shape.dim
        case "sequence_type":
            yield from _dims(type.sequence_type.elem_type)
        case "optional_type":
            yield from _dims(type.optional_type.elem_type)
        case "map_type":
            yield from _dims(type.map_type.value_type)


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}_{n}" for n in count(1))


def from_text(text: str) -> Graph:
    """Read :func:`to_text` back, or plain ONNX text of a model, or of a graph alone (then opset 24 and Vastai).

    A weight without a ``# const`` line is refused.

    Raises:
        UserError: the text does not parse, with the parser's line and column.
    """
    _refuse_unknown_lines(text)
    scopes: dict[str, _Lines] = {}
    for kind, name, inside, rest in _LINE.findall(text):
        lines = scopes.setdefault(_unquoted(inside), {})
        of_kind = lines.setdefault(kind, {})
        before = of_kind.get(_unquoted(name), "") if kind == "attr" else ""  # a node may have several
        of_kind[_unquoted(name)] = f"{before} {rest}" if before else rest
    body = (
        text
        if _COMMENTS.sub("", text, count=1).startswith("<")
        else (f'<ir_version: {IR_VERSION}, opset_import: ["" : 24, "Vastai" : 1]> {text}')
    )
    try:
        model = onnx.parser.parse_model(body)
    except onnx.parser.ParseError as error:
        message = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
        raise UserError(f"not a graph in text form: {' '.join(message.split())}") from error
    outer = scopes.pop("", {})
    infos = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    infos += [info for function in model.functions for info in function.value_info]
    aliases = outer.get("dim", {})
    for dim in (dim for info in infos for dim in _dims(info.type) if dim.dim_param in aliases):
        dim.dim_param = aliases[dim.dim_param]
    _add_attributes(model.graph.node, outer)
    for function in model.functions:
        _add_attributes(function.node, scopes.get(f"{function.domain}::{function.name}", {}))
    constants, sources = _extras(outer)
    metadata = {key: _unquoted_rest(value) for key, value in outer.get("meta", {}).items()}
    return from_onnx(model, constants, sources, metadata, {op: _extras(lines) for op, lines in scopes.items()})


def _unquoted(name: str) -> str:
    return str(json.loads(name)) if name.startswith('"') else name


def _unquoted_rest(rest: str) -> str:
    return _unquoted(rest) if re.fullmatch(_QUOTED, rest) else rest


def _extras(lines: _Lines) -> Extras:
    constants = {name: parse_expr(expr) for name, expr in lines.get("const", {}).items()}
    return constants, {name: _provenance(name, line) for name, line in lines.get("from", {}).items()}


def _provenance(name: str, line: str) -> Provenance:
    try:
        return provenance_from_json(line)
    except (ValueError, TypeError) as error:
        message = f"not a graph in text form: the `# from` line of {name!r} is damaged or cut off: {error}"
        raise UserError(message, "it holds [[[module, source line, operator], ...], [passes]]") from error


def _refuse_unknown_lines(text: str) -> None:
    """A misspelt ``#`` line would be taken for a comment, and what it says would be lost."""
    for word in dict.fromkeys(_SPELLED.findall(text)):
        if word not in KINDS and difflib.get_close_matches(word, KINDS, n=1, cutoff=0.6):
            raise UserError(f"not a graph in text form: a line begins with `# {word}`", did_you_mean(word, KINDS))


def _add_attributes(nodes: Sequence[onnx.NodeProto], lines: _Lines) -> None:
    if "attr" not in lines:
        return
    for node in nodes:
        for data in lines["attr"].get(_label(node), "").split()[1::2]:
            node.attribute.append(onnx.AttributeProto.FromString(base64.b64decode(data)))

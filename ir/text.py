"""Text form: ONNX's own syntax, with what it cannot say in ``#`` lines that its parser skips.

``# dim``, ``# const``, ``# from`` and ``# meta`` lines carry symbolic dimensions, weight expressions, provenance and
metadata, so that graph -> text -> graph -> text is exact, and the same text is valid for ``onnx.parser``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count

import onnx

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Graph
from vacc_opt.ir.onnx_proto import (
    INLINE_ELEMENTS,
    IR_VERSION,
    export_names,
    from_onnx,
    provenance_from_json,
    provenance_to_json,
    to_onnx,
)
from vacc_opt.ir.provenance import Provenance
from vacc_opt.ir.tensor import Literal, TensorExpr, parse_expr
from vacc_opt.ir.types import DType

_LINE = re.compile(r'^# (dim|const|from|meta) ("[^"]*"|\S+) = (.*)$', re.MULTILINE)
# ONNX text has no exact form for these element types, so their literals become `# const` lines
_NOT_INLINE = (DType.FLOAT16, DType.BFLOAT16, DType.BOOL, DType.STRING, DType.UINT64)


def to_text(graph: Graph) -> str:
    """The graph as text, weights as expressions; the same graph gives the same bytes."""
    names = export_names(graph)
    model = to_onnx(graph, provenance=False)
    del model.functions[:]
    del model.metadata_props[:]
    model.producer_name = ""
    lines = [f"# meta {key} = {value}" for key, value in sorted(graph.metadata.items())]
    if graph.ranks > 1:
        lines.append(f"# meta ranks = {graph.ranks}")
    lines += [f"# dim {alias} = {name}" for alias, name in _alias_dims(model).items()]
    for value in graph.constants():
        assert value.const is not None
        if not _inline(value.const):
            lines.append(f'# const "{names[value]}" = {value.const}')
            _drop_initializer(model, names[value])
    sources = [(node.output, node.provenance) for node in graph.nodes()]
    sources += [(value, value.provenance) for value in graph.constants()]
    lines += [
        f'# from "{names[value]}" = {provenance_to_json(provenance)}'
        for value, provenance in sources
        if provenance != Provenance()
    ]
    body: str = onnx.printer.to_text(model)
    return body.rstrip() + "\n" + "".join(line + "\n" for line in lines)


def _inline(expr: TensorExpr) -> bool:
    return isinstance(expr, Literal) and expr.array.size <= INLINE_ELEMENTS and expr.dtype not in _NOT_INLINE


def _drop_initializer(model: onnx.ModelProto, name: str) -> None:
    for index, tensor in enumerate(model.graph.initializer):
        if tensor.name == name:
            del model.graph.initializer[index]
            model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
            return


def _alias_dims(model: onnx.ModelProto) -> dict[str, str]:
    """Give dimensions such as ``past + seq`` an identifier; ``alias -> dimension``."""
    aliases: dict[str, str] = {}
    infos = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    plain = {dim.dim_param for info in infos for dim in info.type.tensor_type.shape.dim}
    for info in infos:
        for dim in info.type.tensor_type.shape.dim:
            name = dim.dim_param
            if name and not name.isidentifier():
                stem = re.sub(r"\W+", "_", name.replace("+", "plus").replace("-", "minus")).strip("_")
                alias = next(a for a in _numbered(stem) if a not in plain and aliases.get(a, name) == name)
                aliases[alias] = name
                dim.dim_param = alias
    return dict(sorted(aliases.items()))


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}_{n}" for n in count(1))


def from_text(text: str) -> Graph:
    """Read :func:`to_text` back, or plain ONNX text of a model, or of a graph alone (then opset 24 and Vastai).

    A weight without a ``# const`` line is refused.

    Raises:
        UserError: the text does not parse, with the parser's line and column.
    """
    extras: dict[str, dict[str, str]] = {"dim": {}, "const": {}, "from": {}, "meta": {}}
    for kind, name, rest in _LINE.findall(text):
        extras[kind][name.strip('"')] = rest
    body = (
        text
        if text.lstrip().startswith("<")
        else (f'<ir_version: {IR_VERSION}, opset_import: ["" : 24, "Vastai" : 1]> {text}')
    )
    try:
        model = onnx.parser.parse_model(body)
    except onnx.parser.ParseError as error:
        message = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
        raise UserError(f"not a graph in text form: {' '.join(message.split())}") from error
    for info in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param in extras["dim"]:
                dim.dim_param = extras["dim"][dim.dim_param]
    constants = {name: parse_expr(expr) for name, expr in extras["const"].items()}
    sources = {name: provenance_from_json(line) for name, line in extras["from"].items()}
    return from_onnx(model, constants, sources, extras["meta"])

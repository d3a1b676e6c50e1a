"""Read an .onnx file as a graph whose weights stay in their files."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import onnx
import onnx.inliner
import onnx.numpy_helper
import onnx.version_converter
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from vacc_opt.frontends.sequences import resolve_sequences
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.ir.graph import Graph
from vacc_opt.ir.infer import RULES_OPSET
from vacc_opt.ir.onnx_proto import FORMULA_KEY, from_onnx, stored_provenance
from vacc_opt.ir.ops import DOMAIN
from vacc_opt.ir.origins import name_origins
from vacc_opt.ir.provenance import Provenance
from vacc_opt.ir.subgraph import inner_graphs, nodes_inside
from vacc_opt.ir.tensor import Source, TensorExpr
from vacc_opt.ir.types import DType

_INLINE_BYTES = 4096  # initializers up to this size become values
_STANDARD = ("", "ai.onnx")


def load_onnx(path: str | os.PathLike[str], *, keep_functions: bool = False) -> Graph:
    """The graph of an .onnx file; external data and large initializers become file references and are not read.

    See :func:`import_model` for functions and opsets. Where the file does not say where a node or weight comes from,
    its name does. Raises UserError for a missing, damaged or truncated file, and for external data that is missing, too
    short, or outside the model's directory.
    """
    file = _existing(Path(path))
    model = _parse(file)
    _embed(model, file)
    resolve_sequences(model)
    constants = _constants(model, file)
    origins = {t.name: stored_provenance(t) for t in model.graph.initializer if t.name in constants}
    for tensor in [t for t in model.graph.initializer if t.name in constants]:
        model.graph.initializer.remove(tensor)
    declared = {info.name for info in model.graph.input}
    for name, expr in constants.items():
        if name not in declared:
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, expr.dtype.onnx, expr.shape))
    return import_model(model, constants, origins, keep_functions=keep_functions)


def import_model(
    model: onnx.ModelProto,
    constants: Mapping[str, TensorExpr] | None = None,
    origins: Mapping[str, Provenance] | None = None,
    *,
    keep_functions: bool = False,
) -> Graph:
    """The graph of a model in memory, ``constants`` being the expressions of inputs that stand for weights.

    Opsets below 18 are raised; a model that ONNX cannot raise keeps its opset, and passes leave its operators alone.
    Functions of other domains than ``Vastai`` are inlined, or with ``keep_functions`` become ``graph.functions``.

    Raises:
        UserError: the model is not valid, or holds something that the intermediate representation has no form for.
    """
    graph = from_onnx(_raise_opset(_inline(model, keep_functions)), constants, origins)
    for one in (graph, *graph.functions.values()):
        name_origins(one)
    return graph


def _existing(path: Path) -> Path:
    if path.is_file():
        return path.parent.resolve() / path.name  # a link keeps its name: caches of model hubs link to nameless files
    if path.is_dir():
        models = sorted(p.name for p in path.glob("*.onnx"))
        hint = did_you_mean("model.onnx", models) if models else None
        raise UserError(f"{path}: a directory, not an .onnx file", hint)
    beside = sorted(p.name for p in path.parent.glob("*.onnx"))
    hint = did_you_mean(path.name, beside) if beside else f"no .onnx file in {path.parent}"
    raise UserError(f"{path}: no such file", hint)


def _parse(file: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(file, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise UserError(f"{file}: not an ONNX model, or truncated", "write or download the file again") from error
    if not model.graph.node and not model.graph.output:
        raise UserError(f"{file}: holds no ONNX graph", "write or download the file again")
    return model


def external_files(path: Path) -> set[Path]:
    """The files beside an .onnx file that hold its weights; raises UserError for one that is damaged."""
    model = _parse(path)
    tensors = (tensor for tensor in (*model.graph.initializer, *_inside_nodes(model)) if _is_external(tensor))
    return {path.parent / entry.value for one in tensors for entry in one.external_data if entry.key == "location"}


def _embed(model: onnx.ModelProto, file: Path) -> None:
    """Read external data into those tensors that are carried inside a node."""
    for tensor in filter(_is_external, _inside_nodes(model)):
        array = _external(tensor, file).read()
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def _inside_nodes(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Tensors that nodes carry: in attributes, and as initializers of inner graphs."""
    pending = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while pending:
        node = pending.pop()
        yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))
        for graph in inner_graphs(node):
            yield from graph.initializer
            pending += graph.node


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _constants(model: onnx.ModelProto, file: Path) -> dict[str, TensorExpr]:
    """A file reference for each external and each large initializer; the small ones stay in the model."""
    found: dict[str, TensorExpr] = {}
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for tensor in model.graph.initializer:
            if _is_external(tensor):
                found[tensor.name] = _external(tensor, file)
            elif len(tensor.raw_data) > _INLINE_BYTES:
                # equal bytes are an equal weight, so the first place that holds them is as good as the tensor's own
                at = content.find(tensor.raw_data)
                found[tensor.name] = Source(str(file), at, *_type(tensor, file), _formula(tensor))
    return found


def _formula(tensor: onnx.TensorProto) -> str:
    """What a tensor is called: what we once wrote that it was made of, else its name."""
    return next((str(p.value) for p in tensor.metadata_props if p.key == FORMULA_KEY), str(tensor.name))


def _type(tensor: onnx.TensorProto, file: Path) -> tuple[str, tuple[int, ...]]:
    try:
        return DType.from_onnx(tensor.data_type).value, tuple(tensor.dims)
    except KeyError:
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        raise UserError(f"{file}: weight {tensor.name} has the unsupported type {name}") from None


def _external(tensor: onnx.TensorProto, file: Path) -> Source:
    entry = {e.key: e.value for e in tensor.external_data}
    location = PurePosixPath(entry.get("location", ""))
    data = (file.parent / location).resolve()
    # the files of a link lie beside it, or are links to files beside the one that it leads to
    inside = data.is_relative_to(file.parent) or data.is_relative_to(file.resolve().parent)
    if location.is_absolute() or ".." in location.parts or not inside:
        raise UserError(
            f"{file}: weight {tensor.name} lies at `{location}`, outside the model's directory",
            "external data is read from beside the model only",
        )
    if not data.is_file():
        raise UserError(f"{file}: external data file {location} is missing", "copy it beside the model")
    dtype, dims = _type(tensor, file)
    needed = Source("", 0, dtype, dims).nbytes
    try:
        offset, length = int(entry.get("offset", 0)), int(entry.get("length", needed))
    except ValueError:
        raise UserError(f"{file}: weight {tensor.name} has a damaged external-data entry") from None
    if length != needed or offset < 0:
        raise UserError(f"{file}: weight {tensor.name} has {length} bytes, its shape needs {needed}")
    size = data.stat().st_size
    if offset + length > size:
        raise UserError(
            f"{data}: truncated: weight {tensor.name} ends at byte {offset + length}, the file has {size}",
            "write or download the file again",
        )
    return Source(str(data), offset, dtype, dims, _formula(tensor))


def _inline(model: onnx.ModelProto, keep: bool) -> onnx.ModelProto:
    """Without local functions, except the bodies of our own operators and those that are to be or must be kept."""
    kept = [(f.domain, f.name) for f in model.functions if f.domain == DOMAIN or _stays(f, model, keep)]
    if len(kept) == len(model.functions):
        return model
    inlined: onnx.ModelProto = onnx.inliner.inline_selected_functions(model, kept, exclude=True)
    return inlined


def _stays(function: onnx.FunctionProto, model: onnx.ModelProto, keep: bool) -> bool:
    """ONNX inlines nothing that is written for other versions; we keep no redefinition of a standard operator."""
    versions = {o.domain: o.version for o in model.opset_import}
    if any(versions.get(o.domain, o.version) != o.version for o in function.opset_import):
        return True
    return keep and function.domain not in _STANDARD and _opset(function.opset_import) >= RULES_OPSET


def _opset(imports: Iterable[onnx.OperatorSetIdProto]) -> int:
    return next((o.version for o in imports if o.domain in _STANDARD), RULES_OPSET)


def _raise_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    opset = _opset(model.opset_import)
    if opset >= RULES_OPSET or _is_misread(model, opset):
        return model
    try:
        raised: onnx.ModelProto = onnx.version_converter.convert_version(model, RULES_OPSET)
    except Exception:  # the converter has no exception type of its own
        return model
    raised.functions.extend(model.functions)  # the converter leaves them out
    return raised


def _is_misread(model: onnx.ModelProto, opset: int) -> bool:
    """The converter passes over two changes of meaning: Scan's batch axis (to 8), PRelu's slope per channel (to 6)."""
    changed = {op for op, last in (("Scan", 8), ("PRelu", 6)) if opset <= last}
    return any(node.op_type in changed for node in nodes_inside(model.graph))

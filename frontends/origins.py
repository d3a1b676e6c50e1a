"""Where exported values come from: module path, source line and ATen operator, out of the exporter's node metadata."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import onnx

from vacc_opt.ir.provenance import Origin

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_ATEN = re.compile(r"aten\.([\w.]+)|<built-in function (\w+)>")


class OriginReader:
    """Reads the origins of one exported module, whose exported names begin with ``prefix``."""

    def __init__(self, module: Any, prefix: str) -> None:
        self._prefix = prefix
        self._modules = dict(module.named_modules())
        self._lines: dict[str, str] = {}

    def read(self, graph: Any) -> dict[str, Origin]:
        """The origin of every node output of an ``onnx_ir`` graph, by value name."""
        origins: dict[str, Origin] = {}
        for node in graph:
            origin = self._origin(node.metadata_props)
            origins.update((output.name, origin) for output in node.outputs if output.name)
        return origins

    def _origin(self, metadata: Mapping[str, str]) -> Origin:
        scopes = _list(metadata.get("pkg.torch.onnx.name_scopes", ""))
        classes = _list(metadata.get("pkg.torch.onnx.class_hierarchy", ""))
        module = scopes[-2] if len(scopes) > 1 else ""
        path = module.removeprefix(self._prefix) if module.startswith(self._prefix) else ""
        operator = _ATEN.fullmatch(classes[-1]) if classes else None
        op = (f"aten.{operator[1]}" if operator[1] else str(operator[2])) if operator else ""
        return Origin(path, self._source(path, metadata.get("pkg.torch.onnx.stack_trace", "")), op)

    def _source(self, module: str, trace: str) -> str:
        """The innermost line of the model's own code; where the trace has none, the line of the module's forward."""
        for file, line in reversed(_FRAME.findall(trace)):
            parts = PurePath(file).parts
            if "transformers" in parts:
                return f"{parts[-1]}:{line}"
        if module not in self._lines:
            self._lines[module] = _forward_line(self._modules.get(module, self._modules[""]))
        return self._lines[module]


def _forward_line(module: Any) -> str:
    forward = inspect.unwrap(type(module).forward)
    return f"{PurePath(inspect.getsourcefile(forward) or '').name}:{inspect.getsourcelines(forward)[1]}"


def _list(text: str) -> list[str]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in value]


def complete_origins(model: onnx.ModelProto, known: Mapping[str, Origin]) -> dict[str, Origin]:
    """An origin for every node output: its own, else that of the value's first reader, else that of what it reads.

    Simplifiers keep the names of values that they keep, so only the values that they made are looked for this way.
    """
    origins = {o: known[o] for node in model.graph.node for o in node.output if o in known}
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).extend(o for o in node.output if o)
    for node in reversed(model.graph.node):
        for name in node.output:
            found = next((origins[r] for r in readers.get(name, ()) if r in origins), None)
            if name and name not in origins and found:
                origins[name] = found
    for node in model.graph.node:
        found = next((origins[i] for i in node.input if i in origins), None)
        for name in node.output:
            if name and name not in origins:
                origins[name] = found or Origin(op=node.op_type)
    return origins


def origins_to_json(origins: Mapping[str, Origin]) -> str:
    """A JSON object of value name to [module, source, op]."""
    return json.dumps({name: [o.module, o.source, o.op] for name, o in origins.items()})


def origins_from_json(text: str) -> dict[str, Origin]:
    """The inverse of :func:`origins_to_json`."""
    return {name: Origin(*parts) for name, parts in json.loads(text).items()}

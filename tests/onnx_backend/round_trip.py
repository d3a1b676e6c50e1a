"""One ONNX test case there and back: import, simplify, text, export, and the same outputs as the model itself."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from vacc_opt.frontends.onnx_file import import_model
from vacc_opt.ir import Graph
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.onnx_proto import to_onnx
from vacc_opt.ir.ort_values import run_session
from vacc_opt.ir.subgraph import nodes_inside
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.simplify.fold_constants import RANDOM

Feeds = dict[str, Any]
Engine = Callable[[onnx.ModelProto, Feeds], dict[str, Any]]
NEWEST_IR = 13  # that onnxruntime 1.31 reads


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the inputs that it comes with."""

    name: str
    model: onnx.ModelProto
    inputs: Sequence[Sequence[Any]]  # a list for each set of data


@dataclasses.dataclass
class Tally:
    """How the cases went, by reason."""

    tried: int = 0
    onnxruntime: int = 0
    reference: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> int:
        """Cases with the same outputs on either engine."""
        return self.onnxruntime + self.reference.total()

    def __str__(self) -> str:
        lines = [
            f"tried {self.tried}, passed {self.passed}: {self.onnxruntime} on onnxruntime, "
            f"{self.reference.total()} on ONNX's reference; skipped {self.skipped.total()}, "
            f"refused {len(self.refused)}, failed {len(self.failed)}"
        ]
        for title, reasons in (("on the reference", self.reference), ("skipped", self.skipped)):
            lines += [f"  {title}, {count}: {reason}" for reason, count in reasons.most_common()]
        for title, names in (("refused", self.refused), ("failed", self.failed)):
            lines += [f"  {title} {name}: {reason}" for name, reason in names.items()]
        return "\n".join(lines)


def run_all(cases: Iterable[Case]) -> Tally:
    """Send every case there and back."""
    tally = Tally()
    for case in cases:
        tally.tried += 1
        try:
            _run(case, tally)
        except AssertionError as error:
            tally.failed[case.name] = str(error).splitlines()[0]
        except Exception as error:
            tally.failed[case.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return tally


def _run(case: Case, tally: Tally) -> None:
    try:
        graph = import_model(case.model)
    except UserError as error:
        tally.refused[case.name] = error.message
        return
    run_pipeline(graph, "simplify")
    text = to_text(graph)
    assert to_text(from_text(text)) == text, "its text does not come back as it is"
    model = embedded(graph)
    if any(node.op_type in RANDOM and not _has_seed(node) for node in nodes_inside(case.model.graph)):
        tally.skipped["random, and no seed is given"] += 1
        return
    feeds = [dict(zip((i.name for i in case.model.graph.input), map(_value, row), strict=False)) for row in case.inputs]
    kept = {value.name for value in graph.inputs}
    try:
        expected = [on_onnxruntime(case.model, row) for row in feeds]
    except Exception as error:
        _on_reference(case, model, feeds, kept, _reason(error), tally)
        return
    found = [on_onnxruntime(model, {n: v for n, v in row.items() if n in kept}) for row in feeds]
    if not _same(found, expected) and _has_halves(case.model):
        # a chain of fp16 nodes is computed in fp32 and rounded only where it ends or a Cast stands
        _on_reference(case, model, feeds, kept, "onnxruntime rounds fp16 elsewhere when a Cast goes", tally)
        return
    assert _same(found, expected), "onnxruntime gives other outputs"
    tally.onnxruntime += 1


def _on_reference(
    case: Case, model: onnx.ModelProto, feeds: list[Feeds], kept: set[str], why: str, tally: Tally
) -> None:
    try:
        expected = [on_reference(case.model, row) for row in feeds]
    except Exception as error:
        tally.skipped[f"{why}; nor does ONNX's reference: {str(error).splitlines()[0][:60]}"] += 1
        return
    found = [on_reference(model, {n: v for n, v in row.items() if n in kept}) for row in feeds]
    assert _same(found, expected), "ONNX's reference gives other outputs"
    tally.reference[why] += 1


def embedded(graph: Graph) -> onnx.ModelProto:
    """The graph as one valid model with all its constants inside."""
    model = to_onnx(graph, lambda value: (value.name, 0, 0))
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            const = graph.values[tensor.external_data[0].value].const
            assert const is not None
            tensor.CopyFrom(numpy_helper.from_array(const.read(), tensor.name))
    onnx.checker.check_model(model)
    return model


def on_onnxruntime(model: onnx.ModelProto, feeds: Feeds) -> dict[str, Any]:
    """Outputs on onnxruntime, every node computed as it stands."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return run_session(ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]), feeds)


def on_reference(model: onnx.ModelProto, feeds: Feeds) -> dict[str, Any]:
    """Outputs on the evaluator that comes with ONNX."""
    names = [output.name for output in model.graph.output]
    return dict(zip(names, ReferenceEvaluator(model).run(names, feeds), strict=True))


def _value(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return np.array(numpy_helper.to_array(value))
    if isinstance(value, list):
        return [np.asarray(item) for item in value]
    return None if value is None else np.asarray(value)


def _same(found: Any, expected: Any) -> bool:
    """Equal to the bit, in lists and mappings too."""
    if isinstance(expected, Mapping):
        return list(found) == list(expected) and all(_same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(_same, found, expected))
    if expected is None:
        return found is None
    a, b = np.asarray(found), np.asarray(expected)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(np.array_equal(a, b)) if a.dtype.kind in "OU" else a.tobytes() == b.tobytes()


def _has_seed(node: onnx.NodeProto) -> bool:
    return any(attribute.name == "seed" for attribute in node.attribute)


def _has_halves(model: onnx.ModelProto) -> bool:
    infos = (*model.graph.input, *model.graph.output)
    return any(info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 for info in infos)


_REFUSALS = (  # of onnxruntime: part of its message, and what it means
    ("Unsupported model IR version", "an opset newer than onnxruntime reads"),
    ("under development", "an opset newer than onnxruntime reads"),
    ("is till opset", "an opset newer than onnxruntime reads"),
    ("support for models stamped with opset version 7 or above", "an opset older than onnxruntime reads"),
    ("No Op registered", "no such operator in onnxruntime"),
    ("is not a registered function/op", "no such operator in onnxruntime"),
    ("Could not find an implementation", "no kernel in onnxruntime for the operator and type"),
    ("Failed to find kernel", "no kernel in onnxruntime for the operator and type"),
    ("Unrecognized attribute", "an attribute that onnxruntime does not know"),
    ("Failed to construct locale", "a locale that is not installed"),
    ("are not supported", "an option that onnxruntime does not support"),
    ("not supported", "an option that onnxruntime does not support"),
)


def _reason(error: Exception) -> str:
    message = " ".join(str(error).split())
    found = next((meaning for part, meaning in _REFUSALS if part in message), None)
    return found or f"onnxruntime fails: {message[-90:]}"

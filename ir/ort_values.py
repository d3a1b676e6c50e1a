"""Values at the border to onnxruntime, whose Python has no arrays for bfloat16, 8-bit floats and packed elements."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from vacc_opt.ir.types import DType

Array = npt.NDArray[Any]


def to_ort(array: Array) -> Any:
    """An OrtValue over the memory of ``array``; elements below a byte are copied into ONNX's packed form."""
    import onnxruntime as ort

    if array.dtype.isbuiltin == 1:
        return ort.OrtValue.ortvalue_from_numpy(array)
    dtype = DType.from_numpy(array.dtype)
    if dtype.bits >= 8:
        raw = array.view(np.uint8 if dtype.bits == 8 else np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, dtype.onnx)
    packed = numpy_helper.from_array(array).raw_data
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), dtype.onnx)
    ctypes.memmove(value.data_ptr(), packed, len(packed))
    return value


def from_ort(value: Any) -> Array:
    """The array of an OrtValue that holds a tensor."""
    dtype = DType.from_onnx(value.element_type())
    if dtype is DType.STRING or dtype.numpy.isbuiltin == 1:
        return np.asarray(value.numpy())
    shape = list(value.shape())
    raw = ctypes.string_at(value.data_ptr(), (int(np.prod(shape)) * dtype.bits + 7) // 8)
    return np.asarray(numpy_helper.to_array(onnx.TensorProto(data_type=dtype.onnx, dims=shape, raw_data=raw)))


def embed_packed(model: onnx.ModelProto, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Put those external initializers into the model that onnxruntime does not take by reference; gives the others."""
    left = dict(weights)
    for tensor in model.graph.initializer:
        dtype = DType.from_onnx(tensor.data_type)
        copied = dtype.bits < 8 or dtype in (DType.COMPLEX64, DType.COMPLEX128)
        if copied and tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(left.pop(tensor.name), tensor.name))
    return left


def run_session(session: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs of a session by name: arrays, or lists and the like for what is no tensor."""
    names = [output.name for output in session.get_outputs()]
    ends = [*session.get_inputs(), *session.get_outputs()]
    if all(e.type.startswith("tensor(") for e in ends) and all(i.type != "tensor(string)" for i in ends[: len(feeds)]):
        values = {name: to_ort(np.asarray(array, order="C")) for name, array in feeds.items()}
        return dict(zip(names, map(from_ort, session.run_with_ort_values(names, values)), strict=True))
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))

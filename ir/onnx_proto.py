"""Graph to ONNX and back; weights go by reference, so neither direction touches weight data."""

from vacc_opt.ir.onnx_export import (
    FORMULA_KEY,
    INLINE_ELEMENTS,
    IR_VERSION,
    OUTPUT_PREFIX,
    PROVENANCE_KEY,
    export_names,
    is_inline,
    provenance_from_json,
    provenance_to_json,
    to_onnx,
)
from vacc_opt.ir.onnx_import import from_onnx, stored_provenance

__all__ = [
    "FORMULA_KEY",
    "INLINE_ELEMENTS",
    "IR_VERSION",
    "OUTPUT_PREFIX",
    "PROVENANCE_KEY",
    "export_names",
    "from_onnx",
    "is_inline",
    "provenance_from_json",
    "provenance_to_json",
    "stored_provenance",
    "to_onnx",
]

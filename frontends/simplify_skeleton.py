"""Clean an ONNX skeleton with onnxsim (shape folding, identities) and onnx-graphsurgeon; our passes do the fusing."""

from __future__ import annotations

from functools import cache

import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxsim
from onnxsim import onnxsim_cpp2py_export

# onnxsim 0.8 fuses norms, rotaries and attentions by itself at opset 23; those are our passes' work, with remarks and
# provenance. Only rewrites that remove a node or fold shape arithmetic are wanted from it.
_WANTED = frozenset(
    {
        "eliminate_common_subexpression",
        "eliminate_deadend",
        "eliminate_identity",
        "eliminate_nop_cast",
        "eliminate_nop_concat",
        "eliminate_nop_dropout",
        "eliminate_nop_expand",
        "eliminate_nop_pad",
        "eliminate_nop_reshape",
        "eliminate_nop_split",
        "eliminate_nop_transpose",
        "eliminate_shape_op",
        "eliminate_slice_after_shape",
    }
)


_ONE_NODE = '<ir_version: 10, opset_import: ["" : 23]> g (float[1] x) => (float[1] y) { y = Identity(x) }'


@cache
def _unwanted() -> tuple[str, ...]:
    """Every onnxsim rewrite that is not wanted; its own ones are in its list only after a first run."""
    onnxsim.simplify(onnx.parser.parse_model(_ONE_NODE))
    known = {*onnxsim_cpp2py_export._list_optimizers(), *onnxsim_cpp2py_export._list_other_optimizers()}
    return tuple(sorted(known - _WANTED))


def simplify_skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """An equivalent model with shape arithmetic folded, dead nodes removed and nodes in topological order.

    Interface, opset and the names of surviving values are kept; inputs stay even where nothing reads them.
    """
    simplified, _ = onnxsim.simplify(model, skipped_optimizers=list(_unwanted()))
    del simplified.metadata_props[:]
    graph = gs.import_onnx(simplified)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    cleaned: onnx.ModelProto = gs.export_onnx(graph)
    cleaned.ir_version = simplified.ir_version
    return cleaned

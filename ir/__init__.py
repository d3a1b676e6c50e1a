"""The intermediate representation: typed SSA graphs in networkx, lazy weights, and the tools every room shares."""

from vacc_opt.ir.coded import Coded
from vacc_opt.ir.errors import CheckError, UserError, VaccError
from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.onnx_proto import from_onnx, to_onnx
from vacc_opt.ir.provenance import Origin, Provenance
from vacc_opt.ir.seeded import Seeded
from vacc_opt.ir.tensor import Literal, PerRank, Source, TensorExpr
from vacc_opt.ir.tensor_math import ColumnsMultiplied, Multiplied, RowNormalized, Shifted, Stacked
from vacc_opt.ir.types import Dim, DType, Shape, SymbolicDim, TensorType

__all__ = [
    "CheckError",
    "Coded",
    "ColumnsMultiplied",
    "DType",
    "Dim",
    "Graph",
    "Literal",
    "Multiplied",
    "Node",
    "Origin",
    "PerRank",
    "Provenance",
    "RowNormalized",
    "Seeded",
    "Shape",
    "Shifted",
    "Source",
    "Stacked",
    "SymbolicDim",
    "TensorExpr",
    "TensorType",
    "UserError",
    "VaccError",
    "Value",
    "from_onnx",
    "to_onnx",
]

"""Bytes of a compiled graph over all its ranks, next to what the same numbers take in fp16."""

from __future__ import annotations

from collections import Counter
from math import prod

from vacc_opt.ir.graph import Graph
from vacc_opt.ir.storage import stored_tensors
from vacc_opt.ir.tensor import Casted, Concatenated, Padded, Taken, TensorExpr, Transposed
from vacc_opt.ir.types import DType
from vacc_opt.runtime.report import Bytes

_HALF = DType.FLOAT16.itemsize


def weight_bytes(graph: Graph) -> tuple[Bytes, Bytes]:
    """Bytes of the quantized linears (codes and scales; fp16 needs no scales), and of every other stored constant."""
    scales = {n.inputs[2].name for n in graph.by_op("QuantizedLinearPerChannel", "Vastai") if n.inputs[2] is not None}
    linear = linear_half = other_half = 0
    others: Counter[str] = Counter()
    for rank in range(graph.ranks):
        for name, expr in stored_tensors(graph, rank).items():
            half = prod(expr.shape) * _HALF
            if name in scales:
                linear += expr.nbytes
            elif expr.dtype is DType.INT8:
                linear += expr.nbytes
                linear_half += half
            else:
                others[expr.dtype.value] += expr.nbytes
                other_half += half
    most = max(others, key=lambda name: (others[name], name), default="none")
    return Bytes("int8", linear, linear_half), Bytes(most, others.total(), other_half)


def cache_bytes(graph: Graph) -> Bytes:
    """Bytes of the KV buffers of a graph with static shapes."""
    caches = [v for v in graph.inputs if v.name.startswith("past_key_values.")]
    elements = sum(prod(v.type.static_shape or ()) for v in caches) * graph.ranks
    dtype = caches[0].type.dtype if caches else DType.FLOAT16
    return Bytes(dtype.value, elements * dtype.itemsize, elements * _HALF)


def padded_elements(expr: TensorExpr) -> int:
    """How many elements of a weight are zeros that a split put there, told from the expression alone.

    >>> from vacc_opt.ir.seeded import Seeded
    >>> padded_elements(Transposed(Taken(Seeded("w", "float", (4, 3)), (2, 3, -1, -1)), (1, 0)))
    6
    """
    if isinstance(expr, Taken):
        return sum(row < 0 for row in expr.rows) * prod(expr.shape[1:])
    if isinstance(expr, Padded):
        return prod(expr.shape) - prod(expr.base.shape)
    if isinstance(expr, Transposed | Casted):
        return padded_elements(expr.base)
    if isinstance(expr, Concatenated):
        return sum(map(padded_elements, expr.parts))
    return 0

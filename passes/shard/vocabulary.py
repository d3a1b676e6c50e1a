"""The embedding and lm_head by rows of the vocabulary, tied or not."""

from __future__ import annotations

import numpy as np

from vacc_opt.ir import DType, Graph, Literal, Node, PerRank, Value
from vacc_opt.ir.infer import elements_of
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Remark, where
from vacc_opt.passes.infra.model.linear import Linear, as_linear
from vacc_opt.passes.infra.model.slices import even_shares
from vacc_opt.passes.shard.constants import SplitConstants

VOCABULARY_MULTIPLE = 16  # rows of the vocabulary a rank, as the accelerator's sequence lengths


def split_vocabulary(graph: Graph, split: SplitConstants, logits: str, by: str) -> list[Remark]:
    """Split what makes the output ``logits`` and every embedding; the pass ``by`` says what it did."""
    rw, tp, remarks = split.rw, split.tp, []
    sizes: dict[Value, int] = {}
    head = _lm_head(graph, logits)
    if head is not None:
        size = sizes[head.weight] = head.out_features
        shares = even_shares(size, tp, VOCABULARY_MULTIPLE)
        split.outputs(head, shares)
        with rw.on_behalf_of(head.node):
            rw.insert_after(head.node.output, lambda v: _gather_logits(rw, v, tp, size, len(shares[0])))
        remarks.append(Remark("passed", by, f"{len(shares[0])} rows of logits a rank", where(head.node)))
    for node in graph.by_op("Gather"):
        table, ids = node.inputs[:2]
        if table is None or table.const is None or len(table.const.shape) != 2 or node.attributes.get("axis", 0):
            continue
        if ids is None or not table.type.dtype.is_float:
            continue  # a mask or positions: no parts of it are added up
        if any(isinstance(row, int) and row < 0 for row in elements_of(ids) or ()):
            continue  # rows from the end, which no rank would know as its own
        if table not in split.done and any(user.op != "Gather" for user in table.users()):
            continue  # no embedding, or one with other readers: every rank keeps all of it
        rows = sizes.setdefault(table, table.const.shape[0])
        shares = even_shares(rows, tp, VOCABULARY_MULTIPLE)
        split.along(table, 0, shares)
        width = len(shares[0])
        firsts = PerRank(tuple(Literal(np.array(r * width, np.int64)) for r in range(tp)))
        remarks.append(Remark("passed", by, f"{width} rows of the embedding a rank", where(node)))
        with rw.on_behalf_of(node):
            rank_first = rw.const(firsts, f"{table.name}.first")
            wide = ids if ids.type.dtype is DType.INT64 else rw.op.Cast(ids, to=DType.INT64.onnx)
            part = rw.vastai.EmbeddingShard(table, wide, rank_first)
            split.readers.update(rw.made[-1:])
            rw.replace(node.output, rw.vastai.AllReduce(part, ranks=tp))
    return remarks


def _gather_logits(rw: Rewriter, part: Value, tp: int, size: int, share: int) -> Value:
    joined = rw.vastai.AllGather(part, ranks=tp, axis=-1)
    if share * tp == size:
        return joined
    return rw.op.Slice(joined, rw.ints(0), rw.ints(size), rw.ints(-1))


def _lm_head(graph: Graph, logits: str) -> Linear | None:
    value = graph.outputs.get(logits)
    node: Node | None = value.producer if value is not None else None
    while node is not None and as_linear(node) is None:
        node = node.inputs[0].producer if node.inputs and node.inputs[0] is not None else None
    return as_linear(node) if node is not None else None

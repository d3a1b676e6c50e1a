"""EmbeddingShard: the rows of a vocabulary-parallel embedding that this rank owns, zeros for the others."""

from __future__ import annotations

from vacc_opt.ir.infer import Context, Result
from vacc_opt.ir.ops.base import OpDef, define
from vacc_opt.ir.types import DType, TensorType


def _infer(ctx: Context) -> Result:
    table, ids = ctx.shape(0), ctx.shape(1)
    if table is None or ids is None or len(table) != 2:
        raise ctx.error(f"table {ctx.type(0)} is no [V, H] matrix")
    if not ctx.dtype(0).is_float:
        raise ctx.error(f"table is {ctx.type(0)}, float is expected")
    for index, name in ((1, "ids"), (2, "first")):
        if ctx.dtype(index) is not DType.INT64:
            raise ctx.error(f"{name} is {ctx.type(index)}, int64 is expected")
    return Result(TensorType(ctx.dtype(0), (*ids, table[1])))


EMBEDDING_SHARD = define(
    OpDef(
        name="EmbeddingShard",
        doc="y[..., :] = table[ids - first] where 0 <= ids - first < V, else 0; table [V, H], ids and first int64. "
        "The sum over ranks is the embedding, of ids from 0 on: Gather counts a negative one from the end.",
        inputs=("table", "ids", "first"),
        outputs=("y",),
        infer=_infer,
        body="""
            zero = Constant <value_int = 0> ()
            one = Constant <value_int = 1> ()
            last = Constant <value_ints = [-1]> ()
            rows = Shape <start = 0, end = 1> (table)
            local = Sub (ids, first)
            above = GreaterOrEqual (local, zero)
            below = Less (local, rows)
            mine = And (above, below)
            safe = Where (mine, local, zero)
            found = Gather <axis = 0> (table, safe)
            factor = CastLike (mine, table)
            column = Unsqueeze (factor, last)
            y = Mul (found, column)""",
    )
)

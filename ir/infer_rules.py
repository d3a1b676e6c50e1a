"""Symbolic type rules of the standard operators that exported transformers are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from vacc_opt.ir.infer import MAX_ELEMENTS, Context, Elements, Result, broadcast, rule, shape_text
from vacc_opt.ir.types import Dim, DType, Shape, TensorType, divide, least

INT_MAX = 2**31 - 1


def _same(ctx: Context) -> Result:
    return Result(ctx.type(0))


_SAME_TYPE = (
    "Identity Neg Sqrt Reciprocal Exp Log Cos Sin Tanh Erf Sigmoid Softmax LogSoftmax Relu Gelu Abs Floor Ceil Round "
    "RMSNormalization LayerNormalization Clip Trilu TensorScatter CumSum Not Swish HardSwish"
)
for _op in _SAME_TYPE.split():
    rule(_op)(_same)


@rule("Identity")
def _identity(ctx: Context) -> Result:
    return Result(ctx.type(0), ctx.elements(0))


def _arith(name: str) -> Callable[[Dim, Dim], Dim | None] | None:
    table: dict[str, Callable[[Dim, Dim], Dim | None]] = {
        "Add": lambda a, b: a + b,
        "Sub": lambda a, b: a - b,
        "Mul": lambda a, b: a * b,
        "Div": lambda a, b: divide(a, b),
        "Max": lambda a, b: max(a, b) if isinstance(a, int) and isinstance(b, int) else (a if a == b else None),
        "Min": lambda a, b: min(a, b) if isinstance(a, int) and isinstance(b, int) else (a if a == b else None),
        "Mod": lambda a, b: a % b if isinstance(a, int) and isinstance(b, int) and a >= 0 and b > 0 else None,
        "Equal": lambda a, b: int(a == b) if a == b or (isinstance(a, int) and isinstance(b, int)) else None,
    }
    return table.get(name)


@rule("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mod", "PRelu")
def _binary(ctx: Context) -> Result:
    dtypes = {ctx.dtype(i) for i in range(len(ctx.inputs))}
    if len(dtypes) > 1 and ctx.op != "Pow":
        raise ctx.error(f"operands have types {' and '.join(str(ctx.type(i)) for i in range(len(ctx.inputs)))}")
    shape = broadcast(ctx, *(ctx.shape(i) for i in range(len(ctx.inputs))))
    return Result(TensorType(ctx.dtype(0), shape), _fold(ctx, shape))


@rule("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor")
def _compare(ctx: Context) -> Result:
    shape = broadcast(ctx, ctx.shape(0), ctx.shape(1))
    return Result(TensorType(DType.BOOL, shape), _fold(ctx, shape))


def _fold(ctx: Context, shape: Shape | None) -> Elements | None:
    function = _arith(ctx.op)
    if function is None or shape is None or len(shape) > 1 or len(ctx.inputs) != 2 or not _is_index(ctx.dtype(0)):
        return None
    left, right = ctx.elements(0), ctx.elements(1)
    if left is None or right is None or not left or not right:
        return None
    size = max(len(left), len(right))
    pairs = zip(left * (size // len(left)), right * (size // len(right)), strict=True)
    results = [function(a, b) for a, b in pairs]
    known = [r for r in results if r is not None]
    return tuple(known) if len(known) == len(results) else None


def _is_index(dtype: DType) -> bool:
    return dtype in (DType.INT64, DType.INT32, DType.BOOL)


@rule("Where")
def _where(ctx: Context) -> Result:
    shape = broadcast(ctx, ctx.shape(0), ctx.shape(1), ctx.shape(2))
    if ctx.dtype(1) is not ctx.dtype(2):
        raise ctx.error(f"operands have types {ctx.type(1)} and {ctx.type(2)}")
    condition, yes, no = ctx.ints(0), ctx.elements(1), ctx.elements(2)
    elements: Elements | None = None
    if condition is not None and yes is not None and no is not None and len(condition) == len(yes) == len(no):
        elements = tuple(y if c else n for c, y, n in zip(condition, yes, no, strict=True))
    return Result(TensorType(ctx.dtype(1), shape), elements)


@rule("Cast")
def _cast(ctx: Context) -> Result:
    to = DType.from_onnx(int(ctx.attributes["to"]))
    keep = ctx.elements(0) if _is_index(to) and to is not DType.BOOL else None
    return Result(TensorType(to, ctx.shape(0)), keep)


@rule("CastLike")
def _cast_like(ctx: Context) -> Result:
    keep = ctx.elements(0) if _is_index(ctx.dtype(1)) and ctx.dtype(1) is not DType.BOOL else None
    return Result(TensorType(ctx.dtype(1), ctx.shape(0)), keep)


@rule("Shape")
def _shape(ctx: Context) -> Result:
    shape = ctx.shape(0)
    if shape is None:
        return Result(TensorType(DType.INT64, (ctx.unknown(0),)))
    start, stop = ctx.attributes.get("start", 0), ctx.attributes.get("end", len(shape))
    kept = shape[slice(start, stop)]
    return Result(TensorType(DType.INT64, (len(kept),)), kept)


@rule("Size")
def _size(ctx: Context) -> Result:
    shape = ctx.shape(0)
    return Result(TensorType(DType.INT64, ()), None if shape is None else (_product(shape),))


def _product(dims: Sequence[Dim]) -> Dim:
    result: Dim = 1
    for dim in dims:
        result = result * dim
    return result


def _place(ctx: Context, axis: int, rank: int, what: str = "axis") -> int:
    """The axis counted from the front; one that is not there is an error."""
    if not -rank <= axis < rank:
        raise ctx.error(f"{what} {axis} is not in -{rank} to {rank - 1}")
    return axis % rank


def _places(ctx: Context, axes: Sequence[int], rank: int) -> set[int]:
    places = {_place(ctx, axis, rank) for axis in axes}
    if len(places) != len(axes):
        raise ctx.error(f"axes {list(axes)} name one twice")
    return places


@rule("Gather")
def _gather(ctx: Context) -> Result:
    data, indices = ctx.shape(0), ctx.shape(1)
    axis = ctx.attributes.get("axis", 0)
    elements: Elements | None = None
    known, wanted = ctx.elements(0), ctx.ints(1)
    if known is not None and wanted is not None and data is not None and len(data) == 1:
        elements = tuple(known[_place(ctx, i, len(known), "index")] for i in wanted)
    if data is None or indices is None:
        return Result(TensorType(ctx.dtype(0)), elements)
    axis = _place(ctx, axis, len(data))
    size = data[axis]
    if isinstance(size, int):
        for index in wanted or ():
            _place(ctx, index, size, "index")
    return Result(TensorType(ctx.dtype(0), (*data[:axis], *indices, *data[axis + 1 :])), elements)


@rule("GatherND")
def _gather_nd(ctx: Context) -> Result:
    data, indices = ctx.shape(0), ctx.shape(1)
    if data is None or indices is None or not isinstance(indices[-1], int):
        return Result(TensorType(ctx.dtype(0)))
    batch = ctx.attributes.get("batch_dims", 0)
    return Result(TensorType(ctx.dtype(0), (*indices[:-1], *data[batch + indices[-1] :])))


@rule("Concat")
def _concat(ctx: Context) -> Result:
    shapes = [ctx.shape(i) for i in range(len(ctx.inputs))]
    parts = [ctx.elements(i) for i in range(len(ctx.inputs))]
    known = [p for p in parts if p is not None]
    ranked = [s for s in shapes if s is not None]
    if len({ctx.dtype(i) for i in range(len(ctx.inputs))}) > 1:
        raise ctx.error(f"operands have types {' and '.join(str(ctx.type(i)) for i in range(len(ctx.inputs)))}")
    # entries are row-major: they follow each other only when vectors are joined
    flat = len(known) == len(parts) and all(len(s) == 1 for s in ranked)
    elements = tuple(e for p in known for e in p) if flat else None
    if len(ranked) != len(shapes):
        return Result(TensorType(ctx.dtype(0)), elements)
    axis = _place(ctx, int(ctx.attributes["axis"]), len(ranked[0]))
    for other in ranked[1:]:
        if len(other) != len(ranked[0]):
            raise ctx.error(f"shapes {shape_text(ranked[0])} and {shape_text(other)} differ in rank")
        for at, (a, b) in enumerate(zip(ranked[0], other, strict=True)):
            if at != axis and isinstance(a, int) and isinstance(b, int) and a != b:
                raise ctx.error(f"shapes {shape_text(ranked[0])} and {shape_text(other)} differ beside axis {axis}")
    total: Dim = 0
    for shape in ranked:
        total = total + shape[axis]
    first = ranked[0]
    return Result(TensorType(ctx.dtype(0), (*first[:axis], total, *first[axis + 1 :])), elements)


@rule("Unsqueeze")
def _unsqueeze(ctx: Context) -> Result:
    shape, axes = ctx.shape(0), ctx.ints(1)
    if shape is None or axes is None:
        return Result(TensorType(ctx.dtype(0)), ctx.elements(0))
    rank = len(shape) + len(axes)
    places = _places(ctx, axes, rank)
    rest = iter(shape)
    return Result(
        TensorType(ctx.dtype(0), tuple(1 if i in places else next(rest) for i in range(rank))), ctx.elements(0)
    )


@rule("Squeeze")
def _squeeze(ctx: Context) -> Result:
    shape, axes = ctx.shape(0), ctx.ints(1)
    if shape is None or (ctx.has(1) and axes is None):
        return Result(TensorType(ctx.dtype(0)), ctx.elements(0))
    places = _places(ctx, axes, len(shape)) if axes is not None else {i for i, d in enumerate(shape) if d == 1}
    if any(isinstance(shape[i], int) and shape[i] != 1 for i in places):
        raise ctx.error(f"axes {sorted(places)} of {shape_text(shape)} are not all of size 1")
    return Result(TensorType(ctx.dtype(0), tuple(d for i, d in enumerate(shape) if i not in places)), ctx.elements(0))


@rule("Reshape")
def _reshape(ctx: Context) -> Result:
    source, wanted, target_type = ctx.shape(0), ctx.elements(1), ctx.shape(1)
    if wanted is None:
        rank = target_type[0] if target_type is not None else None
        shape = tuple(ctx.unknown(i) for i in range(rank)) if isinstance(rank, int) else None
        return Result(TensorType(ctx.dtype(0), shape), ctx.elements(0))
    dims: list[Dim] = list(wanted)
    if not ctx.attributes.get("allowzero", 0):
        same = [ctx.unknown(i) for i in range(len(dims))] if source is None else source
        dims = [same[i] if d == 0 and i < len(same) else d for i, d in enumerate(dims)]
    if -1 in dims:
        at = dims.index(-1)
        missing = None if source is None else divide(_product(source), _product([d for d in dims if d != -1]))
        if source is not None and missing is None and all(isinstance(d, int) for d in (*source, *dims)):
            raise ctx.error(f"{shape_text(source)} does not divide into {shape_text(tuple(wanted))}")
        dims[at] = ctx.unknown(at) if missing is None else missing
    elif source is not None:
        total, new = _product(source), _product(dims)
        if _differ(total, new):
            raise ctx.error(f"{shape_text(source)} has {total} elements, {shape_text(tuple(dims))} has {new}")
    return Result(TensorType(ctx.dtype(0), tuple(dims)), ctx.elements(0))


def _differ(a: Dim, b: Dim) -> bool:
    """True when two counts cannot be equal: other numbers, or other multiples of the same sizes."""
    if isinstance(a, int) and isinstance(b, int):
        return a != b
    if isinstance(a, int) or isinstance(b, int):
        return False
    return a != b and a * b.terms[0][1] == b * a.terms[0][1]


@rule("Expand")
def _expand(ctx: Context) -> Result:
    wanted = ctx.elements(1)
    if wanted is None:
        count = ctx.shape(1)
        rank = count[0] if count is not None else None
        own = ctx.shape(0)
        if not isinstance(rank, int) or own is None:
            return Result(TensorType(ctx.dtype(0)))
        return Result(TensorType(ctx.dtype(0), tuple(ctx.unknown(i) for i in range(max(rank, len(own))))))
    return Result(TensorType(ctx.dtype(0), broadcast(ctx, ctx.shape(0), wanted)))


@rule("Transpose")
def _transpose(ctx: Context) -> Result:
    shape = ctx.shape(0)
    if shape is None:
        return Result(ctx.type(0))
    perm = ctx.attributes.get("perm", tuple(reversed(range(len(shape)))))
    if sorted(perm) != list(range(len(shape))):
        raise ctx.error(f"perm {list(perm)} does not fit {shape_text(shape)}")
    return Result(TensorType(ctx.dtype(0), tuple(shape[p] for p in perm)))


@rule("MatMul")
def _matmul(ctx: Context) -> Result:
    a, b = ctx.shape(0), ctx.shape(1)
    if ctx.dtype(0) != ctx.dtype(1):
        raise ctx.error(f"operands have types {ctx.type(0)} and {ctx.type(1)}")
    if a is None or b is None:
        return Result(TensorType(ctx.dtype(0)))
    if not a or not b:
        raise ctx.error("an operand is a scalar")
    inner = b[-2] if len(b) > 1 else b[-1]
    if isinstance(a[-1], int) and isinstance(inner, int) and a[-1] != inner:
        raise ctx.error(f"{shape_text(a)} and {shape_text(b)} do not multiply: {a[-1]} is not {inner}")
    lead = broadcast(ctx, a[:-2], b[:-2]) or ()
    rows = (a[-2],) if len(a) > 1 else ()
    columns = (b[-1],) if len(b) > 1 else ()
    return Result(TensorType(ctx.dtype(0), (*lead, *rows, *columns)))


@rule("Slice")
def _slice(ctx: Context) -> Result:
    shape, starts, stops = ctx.shape(0), ctx.elements(1), ctx.elements(2)
    if shape is None:
        return Result(ctx.type(0))
    count = len(starts) if starts is not None else len(stops) if stops is not None else None
    axes = ctx.ints(3) if ctx.has(3) else None if count is None else tuple(range(count))
    steps = ctx.ints(4) if ctx.has(4) else None if count is None else (1,) * count
    if axes is None:
        return Result(TensorType(ctx.dtype(0), tuple(ctx.unknown(i) for i in range(len(shape)))))
    if len({len(given) for given in (starts, stops, axes, steps) if given is not None}) > 1 or (steps and 0 in steps):
        raise ctx.error("starts, ends, axes and steps are not as many, or a step is 0")
    dims = list(shape)
    picked: list[tuple[int, int]] = []
    for n, axis in enumerate(axes):
        at = _place(ctx, axis, len(shape))
        box = None
        if starts is not None and stops is not None and steps is not None:
            box = slice_bounds(shape[at], starts[n], stops[n], steps[n])
        dims[at] = ctx.unknown(at) if box is None else box[2]
        if box is not None and isinstance(box[0], int) and isinstance(box[1], int) and steps and steps[n] == 1:
            picked.append((box[0], box[1]))
    elements = ctx.elements(0)
    if elements is not None and len(shape) == 1 and len(picked) == len(axes) == 1:
        elements = elements[picked[0][0] : picked[0][1]]
    else:
        elements = None
    return Result(TensorType(ctx.dtype(0), tuple(dims)), elements)


def slice_bounds(size: Dim, start: Dim, stop: Dim, step: int) -> tuple[Dim, Dim, Dim] | None:
    """Normalized (start, stop, length) of one sliced axis, or None when it cannot be told symbolically."""
    if isinstance(start, int) and isinstance(stop, int) and isinstance(size, int):
        first, end, stride = slice(start, stop, step).indices(size)
        return first, end, len(range(first, end, stride))
    if step != 1:
        return None
    low = start + size if isinstance(start, int) and start < 0 else start
    high = stop + size if isinstance(stop, int) and stop < 0 else stop
    if isinstance(stop, int) and stop >= INT_MAX:
        high = size
    # a bound beyond an end is moved to it, which no polynomial says
    if any(least(part) < 0 for part in (low, high - low, size - high)):
        return None
    return low, high, high - low


@rule("Range")
def _range(ctx: Context) -> Result:
    start, limit, step = ctx.elements(0), ctx.elements(1), ctx.elements(2)
    if not start or not limit or not step or not isinstance(step[0], int):
        return Result(TensorType(ctx.dtype(0), (ctx.unknown(0),)))
    if step[0] == 0:
        raise ctx.error("the step is 0")
    length = divide(limit[0] - start[0], step[0])
    if length is None or isinstance(length, int):
        first, last = start[0], limit[0]
        if not isinstance(first, int) or not isinstance(last, int):
            return Result(TensorType(ctx.dtype(0), (ctx.unknown(0) if length is None else length,)))
        entries = range(first, last, step[0])
        elements = tuple(entries) if len(entries) <= MAX_ELEMENTS else None
        return Result(TensorType(ctx.dtype(0), (len(entries),)), elements)
    return Result(TensorType(ctx.dtype(0), (length,)))


@rule("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2", "ReduceSumSquare")
def _reduce(ctx: Context) -> Result:
    shape = ctx.shape(0)
    if shape is None:
        return Result(ctx.type(0))
    axes = ctx.ints(1) if ctx.has(1) else ctx.attributes.get("axes")
    if axes is None and ctx.has(1):
        return Result(TensorType(ctx.dtype(0)))
    if not axes:
        axes = () if ctx.attributes.get("noop_with_empty_axes", 0) else tuple(range(len(shape)))
    places = {_place(ctx, a, len(shape)) for a in axes}
    keep = ctx.attributes.get("keepdims", 1)
    dims = tuple(1 if i in places else d for i, d in enumerate(shape) if keep or i not in places)
    return Result(TensorType(ctx.dtype(0), dims))


@rule("ConstantOfShape")
def _constant_of_shape(ctx: Context) -> Result:
    value = np.asarray(ctx.attributes.get("value", np.zeros(1, np.float32)))
    dtype = DType.from_numpy(value.dtype)
    wanted = ctx.elements(0)
    if wanted is None:
        return Result(TensorType(dtype))
    elements: Elements | None = None
    size = _product(wanted)
    if len(wanted) <= 1 and isinstance(size, int) and size <= MAX_ELEMENTS and _is_index(dtype):
        elements = (int(value.reshape(-1)[0]),) * size
    return Result(TensorType(dtype, wanted), elements)


@rule("Split")
def _split(ctx: Context) -> Sequence[Result]:
    shape, sizes, count = ctx.shape(0), ctx.ints(1), ctx.outputs
    if shape is None:
        return [Result(ctx.type(0))] * count
    axis = _place(ctx, ctx.attributes.get("axis", 0), len(shape))
    parts: Sequence[Dim] = sizes if sizes is not None else [ctx.unknown(axis, of=n) for n in range(count)]
    if len(parts) != count or ctx.attributes.get("num_outputs", count) != count:
        raise ctx.error(f"{count} outputs, but {ctx.attributes.get('num_outputs', len(parts))} parts")
    whole = shape[axis]
    if not ctx.has(1) and isinstance(whole, int):
        chunk = math.ceil(whole / count)
        parts = [min(chunk, whole - i * chunk) for i in range(count)]
    elif not ctx.has(1):
        even = divide(whole, count)
        parts = parts if even is None else [even] * count
    return [Result(TensorType(ctx.dtype(0), (*shape[:axis], s, *shape[axis + 1 :]))) for s in parts]


@rule("Gemm")
def _gemm(ctx: Context) -> Result:
    a, b = ctx.shape(0), ctx.shape(1)
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        raise ctx.error(f"operands {ctx.type(0)} and {ctx.type(1)} are not matrices")
    rows = a[1] if ctx.attributes.get("transA", 0) else a[0]
    columns = b[0] if ctx.attributes.get("transB", 0) else b[1]
    left, right = a[0] if ctx.attributes.get("transA", 0) else a[1], b[1] if ctx.attributes.get("transB", 0) else b[0]
    if isinstance(left, int) and isinstance(right, int) and left != right:
        raise ctx.error(f"{shape_text(a)} and {shape_text(b)} do not multiply: {left} is not {right}")
    return Result(TensorType(ctx.dtype(0), (rows, columns)))


def _alike(ctx: Context, what: str, *sizes: Dim) -> None:
    if len({size for size in sizes if isinstance(size, int)}) > 1:
        raise ctx.error(f"the numbers of {what} differ: {', '.join(map(str, sizes))}")


@rule("RotaryEmbedding")
def _rotary(ctx: Context) -> Result:
    x, cos, sin = ctx.shape(0), ctx.shape(1), ctx.shape(2)
    if x is None or cos is None or sin is None or len(x) != 4:
        return Result(ctx.type(0))
    rotated = ctx.attributes.get("rotary_embedding_dim", 0) or x[3]
    _alike(ctx, "rotated channels", rotated, cos[-1] * 2, sin[-1] * 2)
    if not ctx.has(3):  # the tables are of these rows and positions
        _alike(ctx, "rows", x[0], cos[0], sin[0])
        _alike(ctx, "positions", x[2], cos[1], sin[1])
    return Result(ctx.type(0))


@rule("Attention")
def _attention(ctx: Context) -> Sequence[Result]:
    q, k, v = ctx.shape(0), ctx.shape(1), ctx.shape(2)
    if q is None or k is None or v is None:
        return [Result(TensorType(ctx.dtype(0))) for _ in range(4)]
    if len(q) == 4:
        if isinstance(q[1], int) and isinstance(k[1], int) and q[1] % k[1]:
            raise ctx.error(f"{q[1]} query heads are no multiple of {k[1]} KV heads")
        out: Shape = (q[0], q[1], q[2], v[3])
        heads, length, depth, value_depth = k[1], k[2], k[3], v[3]
        _alike(ctx, "rows", q[0], k[0], v[0])
        _alike(ctx, "KV heads", k[1], v[1])
        _alike(ctx, "keys and values", k[2], v[2])
        _alike(ctx, "channels", q[3], k[3])
    else:
        q_heads, heads = int(ctx.attributes["q_num_heads"]), int(ctx.attributes["kv_num_heads"])
        split = divide(v[2], heads), divide(k[2], heads)
        if split[0] is None or split[1] is None:
            raise ctx.error(f"width {v[2]} does not divide into {heads} heads")
        value_depth, depth, length = split[0], split[1], k[1]
        out = (q[0], q[1], value_depth * q_heads)
    past = ctx.shape(4) if ctx.has(4) else None
    total = length if past is None else past[2] + length
    present = TensorType(ctx.dtype(1), (q[0], heads, total, depth))
    value = TensorType(ctx.dtype(2), (q[0], heads, total, value_depth))
    scores = TensorType(ctx.dtype(0), (q[0], q[1] if len(q) == 4 else int(ctx.attributes["q_num_heads"]), q[-2], total))
    return [Result(TensorType(ctx.dtype(0), out)), Result(present), Result(value), Result(scores)]

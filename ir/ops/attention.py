"""Attention: what ONNX's Attention-24 does over a cache, and what models add to its scores.

A query row i of a call with S rows stands at position p(i) = length - S + i of its sequence; key j is at position j.
Everything that depends on positions (causality, the window, ALiBi's slopes) is written with these two.
"""

from __future__ import annotations

from vacc_opt.ir.graph import Node
from vacc_opt.ir.infer import Context, Result, broadcast, shape_text
from vacc_opt.ir.ops.base import Facets, OpDef, define
from vacc_opt.ir.types import Dim, DType, TensorType

Q, K, V, MASK, LENGTH, SLOPES = range(6)
_OPTIONAL_INPUTS = {"length": LENGTH, "slopes": SLOPES}
_SWITCHES = ("is_causal", "window", "clamp", "softcap")


def _infer(ctx: Context) -> Result:
    result = TensorType(ctx.dtype(Q))
    _check_attributes(ctx)
    if len({ctx.dtype(i) for i in (Q, K, V)}) > 1:
        raise ctx.error(f"q {ctx.type(Q)}, k {ctx.type(K)} and v {ctx.type(V)} differ in element type")
    q, k, v = ctx.shape(Q), ctx.shape(K), ctx.shape(V)
    if q is None or k is None or v is None:
        return Result(result)
    shapes = f"q {shape_text(q)}, k {shape_text(k)} and v {shape_text(v)}"
    if {len(q), len(k), len(v)} != {4}:
        raise ctx.error(f"{shapes} do not all have rank 4")
    if any(map(_differ, (q[0], q[0], *k[1:3], q[3]), (k[0], v[0], *v[1:3], k[3]))):
        raise ctx.error(f"{shapes} do not fit")
    if isinstance(q[1], int) and isinstance(k[1], int) and q[1] % k[1]:
        raise ctx.error(f"{q[1]} query heads are no multiple of {k[1]} KV heads")
    _check_optional(ctx, (q[0], q[1], q[2], k[2]))
    return Result(TensorType(result.dtype, (q[0], q[1], q[2], v[3])))


def _check_attributes(ctx: Context) -> None:
    if "scale" not in ctx.attributes:
        raise ctx.error("the attribute 'scale' is missing")
    for name in ("window", "clamp", "softcap"):
        if ctx.attributes.get(name, 0) < 0:
            raise ctx.error(f"{name} is {ctx.attributes[name]}, below 0")


def _check_optional(ctx: Context, scores: tuple[Dim, Dim, Dim, Dim]) -> None:
    if ctx.has(MASK):
        mask, dtype = ctx.shape(MASK), ctx.dtype(MASK)
        if not (dtype is DType.BOOL or dtype.is_float):
            raise ctx.error(f"mask is {ctx.type(MASK)}, bool or float is expected")
        joint = None if mask is None else broadcast(ctx, mask, scores)
        if joint is not None and (len(joint) > 4 or len(mask or ()) < 2 or any(map(_differ, joint, scores))):
            raise ctx.error(f"mask {shape_text(mask)} does not fit scores {shape_text(scores)}")
    vectors = ((LENGTH, "length", DType.INT64, scores[0]), (SLOPES, "slopes", ctx.dtype(Q), scores[1]))
    for index, name, dtype, size in vectors:
        if ctx.has(index):
            shape = ctx.shape(index)
            if ctx.dtype(index) is not dtype or (shape is not None and (len(shape) != 1 or _differ(shape[0], size))):
                raise ctx.error(f"{name} is {ctx.type(index)}, {dtype.value}[{size}] is expected")


def _differ(a: Dim, b: Dim) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a != b


def _facets(node: Node) -> Facets:
    """``mask`` or ``bias`` for a bool or float mask, then the other inputs given and the attributes that are not 0."""
    given = dict(enumerate(node.inputs))
    found: list[str] = []
    mask = given.get(MASK)
    if mask is not None:
        found.append("mask" if mask.type.dtype is DType.BOOL else "bias")
    found += [name for name, index in _OPTIONAL_INPUTS.items() if given.get(index) is not None]
    found += [name.removeprefix("is_") for name in _SWITCHES if node.attributes.get(name, 0)]
    return tuple(found)


_PRODUCT = """
    zero = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    q_size = Shape (q)
    heads = Shape <start = 1, end = 2> (q)
    groups = Shape <start = 1, end = 2> (k)
    depth = Shape <start = 3, end = 4> (q)
    value_depth = Shape <start = 3, end = 4> (v)
    rows = Shape <start = 2, end = 3> (q)
    keys = Shape <start = 2, end = 3> (k)
    q_rows = Concat <axis = 0> (zero, groups, rest, depth)
    score_shape = Concat <axis = 0> (zero, heads, rows, keys)
    group_shape = Concat <axis = 0> (zero, groups, rest, keys)
    y_shape = Concat <axis = 0> (zero, heads, rows, value_depth)
    wide_q = Cast <to = 1> (q)
    wide_k = Cast <to = 1> (k)
    wide_v = Cast <to = 1> (v)
    grouped = Reshape (wide_q, q_rows)
    columns = Transpose <perm = [0, 1, 3, 2]> (wide_k)
    factor = Constant <value_float : float = @scale> ()
    scaled = Mul (grouped, factor)
    products = MatMul (scaled, columns)
    scores = Reshape (products, score_shape)"""

_POSITIONAL = frozenset(["length", "slopes", "causal", "window"])
# each adds a limit to what is called `scores` so far
_LIMITS = {
    "clamp": """
    clamp_high = Constant <value_float : float = @clamp> ()
    clamp_low = Neg (clamp_high)
    clamped = Clip (scores, clamp_low, clamp_high)""",
    "softcap": """
    cap = Constant <value_float : float = @softcap> ()
    cap_ratio = Div (scores, cap)
    cap_part = Tanh (cap_ratio)
    capped = Mul (cap_part, cap)""",
}

_POSITIONS = """
    nought = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    row_axes = Constant <value_ints = [1, 3]> ()
    rows_scalar = Squeeze (rows)
    keys_scalar = Squeeze (keys)
    row_numbers = Range (nought, rows_scalar, one)
    key_positions = Range (nought, keys_scalar, one)
    before = Sub ({length}, rows)
    last_axis = Constant <value_ints = [-1]> ()
    before_column = Unsqueeze (before, last_axis)
    row_positions = Add (before_column, row_numbers)
    query_positions = Unsqueeze (row_positions, row_axes)"""

# each defines what it adds to the scores
_ADDED = {
    "slopes": """
    distance = Sub (key_positions, query_positions)
    wide_distance = Cast <to = 1> (distance)
    wide_slopes = Cast <to = 1> (slopes)
    slope_axes = Constant <value_ints = [1, 2]> ()
    slope_columns = Unsqueeze (wide_slopes, slope_axes)
    slopes_added = Mul (wide_distance, slope_columns)""",
    "bias": """
    bias_added = Cast <to = 1> (mask)""",
}

# each defines the keys that it lets a query see
_SEEN = {
    "mask": """
    mask_seen = Identity (mask)""",
    "bias": """
    bias_hidden = IsInf <detect_positive = 0> (bias_added)
    bias_seen = Not (bias_hidden)""",
    "length": """
    length_axes = Constant <value_ints = [1, 2, 3]> ()
    length_columns = Unsqueeze (length, length_axes)
    length_seen = Less (key_positions, length_columns)""",
    "causal": """
    causal_seen = LessOrEqual (key_positions, query_positions)""",
    "window": """
    window_size = Constant <value_int : int = @window> ()
    window_start = Sub (query_positions, window_size)
    window_seen = Greater (key_positions, window_start)""",
}


def _body(facets: Facets) -> str:
    parts, scores = [_PRODUCT], "scores"
    for name, result in (("clamp", "clamped"), ("softcap", "capped")):
        if name in facets:
            parts.append(_LIMITS[name].replace("scores", scores))
            scores = result
    if not _POSITIONAL.isdisjoint(facets):
        parts.append(_POSITIONS.format(length="length" if "length" in facets else "keys"))
    for name in (name for name in _ADDED if name in facets):
        parts.append(f"{_ADDED[name]}\n    with_{name} = Add ({scores}, {name}_added)")
        scores = f"with_{name}"
    seen = [name for name in _SEEN if name in facets and (name != "length" or "causal" not in facets)]
    parts += [_SEEN[name] for name in seen]
    return "\n".join([*parts, _softmax(scores, [f"{name}_seen" for name in seen])])


def _softmax(scores: str, seen: list[str]) -> str:
    """Softmax over the keys seen, times the values; a query that sees none gets zeros, where softmax gives NaN."""
    lines = ["    unlikely = Constant <value = float {-inf}> ()", "    nothing = Constant <value_float = 0.0> ()"]
    for number, name in enumerate(seen[1:]):
        lines.append(f"    seen_{number} = And ({seen[0] if not number else f'seen_{number - 1}'}, {name})")
    if seen:
        keep = seen[0] if len(seen) == 1 else f"seen_{len(seen) - 2}"
        lines += [
            f"    hidden = Where ({keep}, {scores}, unlikely)",
            "    odds = Softmax <axis = -1> (hidden)",
            f"    weights = Where ({keep}, odds, nothing)",
        ]
    else:
        lines.append(f"    weights = Softmax <axis = -1> ({scores})")
    return (
        "\n".join(lines)
        + """
    grouped_weights = Reshape (weights, group_shape)
    mixed = MatMul (grouped_weights, wide_v)
    by_head = Reshape (mixed, y_shape)
    y = CastLike (by_head, q)"""
    )


ATTENTION = define(
    OpDef(
        name="Attention",
        doc="y = softmax(f(scale * q k^T) + bias) v over the keys that are seen, in fp32: Attention-24 of ONNX without "
        "past and present, with ALiBi (Press et al. 2022, eq. 1), a window (Beltagy et al. 2020) and a clamp. "
        "q [B, Hq, S, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv], y [B, Hq, S, Dv]; Hq / Hkv query heads in a row share a "
        "KV head. Query i stands at p = length - S + i. mask, broadcast to [B, Hq, S, T]: bool, true is seen, or "
        "float, added (-inf hides a key). length int64 [B]: keys in use up to and including this call's, else T. "
        "slopes [Hq]: slopes[h] * (j - p) is added to the score of key j. A query that sees no key gets zeros.",
        inputs=("q", "k", "v", "mask", "length", "slopes"),
        outputs=("y",),
        optional=3,
        attributes=(
            ("scale", "factor of the scores; required"),
            ("is_causal", "1: query i sees keys j <= p; 0: all below length"),
            ("window", "query i sees keys j > p - window only; 0: no such limit"),
            ("clamp", "scaled scores are limited to -clamp .. clamp before anything is added; 0: they are not"),
            ("softcap", "scaled (and clamped) scores x become softcap * tanh(x / softcap); 0: they do not"),
        ),
        infer=_infer,
        facets=_facets,
        body=_body,
    )
)

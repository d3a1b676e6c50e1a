"""The parts of a matched attention: its operands as heads, its scale, and its mask as something to add."""

from __future__ import annotations

import math
from collections.abc import Iterator

from vacc_opt.ir import Dim, Graph, Node, Value
from vacc_opt.ir.infer import shape_text
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.types import divide
from vacc_opt.passes.infra.model.heads import ROWS_LAST, TRANSPOSED, Heads, as_heads
from vacc_opt.passes.infra.model.masks import BLOCKED
from vacc_opt.passes.infra.model.views import joins_turned
from vacc_opt.passes.infra.patterns.match import Match, Reason
from vacc_opt.passes.infra.patterns.values import scalar


def attentions(graph: Graph) -> list[Node]:
    """The fused attentions, ONNX's and ours, in order of the graph."""
    return [node for node in graph.nodes() if node.op in ("Attention", "Vastai::Attention")]


def operands(m: Match) -> tuple[Heads | None, Heads | None, Heads | None]:
    """``q``, ``k`` and ``v``; k is the right operand of a product unless the match is a fused operator (``sdpa``)."""
    order = ROWS_LAST if m.get("sdpa") is not None else TRANSPOSED
    return as_heads(m.q), as_heads(m.k, order), as_heads(m.v)


def is_plain(value: Value | None) -> bool:
    """True for keys or values that are read where they are made: not repeated, and not turned after a join."""
    heads = as_heads(value) if value is not None else None
    if heads is None or heads.base is value:
        return True
    return heads.group == 1 and not joins_turned(heads.base)


def why_not_grouped(m: Match, q: Heads, k: Heads, v: Heads) -> Iterator[Reason]:
    """What speaks against query head h reading KV head h // group."""
    heads = q.sizes[1]
    if q.group != 1:
        yield m.reason("the heads of q are repeated: {x}", x=m.q)
    if not isinstance(heads, int):
        yield m.reason("q has {heads} heads, a number is expected", heads=heads)
    fused = m.get("sdpa") is not None  # whose KV heads may be fewer as they are
    for name, kv in (("k", k), ("v", v)):
        own = kv.sizes[1] * kv.group
        if own not in (heads, 1) and not (fused and divide(heads, own) is not None):
            what = "{name}: {own} heads serve {heads} query heads without a repetition"
            yield m.reason(what, name=name, own=own, heads=heads)
    if k.sizes[1] != v.sizes[1]:
        yield m.reason("k has {k} heads, v has {v}", k=k.sizes[1], v=v.sizes[1])
    if m.root.output.rank != 4 or (m.root.output.shape or ())[:3] != q.sizes[:3]:
        yield m.reason("the result is {y}, [B,H,S,D] of q's heads is expected", y=m.root.output.type)
    alike = (("q", q, "k", k, 0), ("q", q, "v", v, 0), ("k", k, "v", v, 2), ("q", q, "k", k, 3))
    for one, a, other, b, axis in alike:
        if _differ(a.sizes[axis], b.sizes[axis]):
            what = "{one} is {a}, {other} is {b}: one is broadcast"
            yield m.reason(what, one=one, a=shape_text(a.sizes), other=other, b=shape_text(b.sizes))


def _differ(a: Dim, b: Dim) -> bool:
    """True for sizes of which one is a number; two names of an exporter may mean the same."""
    return a != b and (isinstance(a, int) or isinstance(b, int))


def why_not_masked(m: Match, q: Heads, k: Heads) -> Iterator[Reason]:
    """What speaks against the ``mask`` that is added, or the ``fill`` of hidden scores."""
    mask, fill, softmax = m.get("mask"), m.get("fill"), m.get("softmax")
    one = mask if mask is not None else m.get("hidden")
    if one is not None and not _is_mask(one, q, k):
        yield m.reason("{mask} is no mask of {s} queries by {t} keys", mask=one, s=q.sizes[2], t=k.sizes[2])
    masked = mask is not None or fill is not None
    if softmax is not None and masked and (softmax.output.shape or ())[:-2] != q.sizes[:2]:
        yield m.reason("{x} is masked, [B,H,S,T] is expected", x=softmax.output.type)
    if fill is not None and m.number("blocked") > BLOCKED:
        yield m.reason("masked scores become {number:g}, which hides no key", number=m.number("blocked"))


def _is_mask(value: Value, q: Heads, k: Heads) -> bool:
    """True for [S,T], [H,S,T] or [B,H,S,T] where B and H may be 1: onnxruntime does not broadcast the last two."""
    shape, sizes = value.shape, (q.sizes[0], q.sizes[1], q.sizes[2], k.sizes[2])
    if shape is None or not 2 <= len(shape) <= 4:
        return False
    lead, last = shape[:-2], shape[-2:]
    fits = all(d == 1 or not _differ(d, size) for d, size in zip(lead, sizes[2 - len(lead) : 2], strict=True))
    return fits and not any(_differ(d, size) for d, size in zip(last, sizes[2:], strict=True))


def why_not_scaled(m: Match) -> Iterator[Reason]:
    """What speaks against the scale: Attention takes the root of it."""
    scale = total_scale(m)
    if not 0 < scale < math.inf:
        yield m.reason("the scale is {scale:g}, a positive number is expected", scale=scale)


def why_not_limited(m: Match) -> Iterator[Reason]:
    """What speaks against the limits of the scores: bounds around 0, and a soft cap that undoes its own division."""
    if m.get("low") is not None and (m.number("low") != -m.number("high") or m.number("high") <= 0):
        yield m.reason("scores are clipped to {low:g} .. {high:g}", low=m.number("low"), high=m.number("high"))
    if m.get("cap") is not None and not (m.number("cap") == m.number("back") > 0):
        yield m.reason("tanh of scores / {cap:g} is times {back:g}", cap=m.number("cap"), back=m.number("back"))
    sdpa: Node | None = m.get("sdpa")
    for name in ("qk_matmul_output_mode", "softmax_precision"):
        if sdpa is not None and sdpa.attributes.get(name):
            yield m.reason("{name} is {value}", name=name, value=sdpa.attributes[name])


def attributes(m: Match) -> dict[str, object]:
    """The attributes of the one node, those at their defaults left out."""
    sdpa: Node | None = m.get("sdpa")
    found: dict[str, object] = {"is_causal": 0}
    if sdpa is None:
        found |= {"scale": total_scale(m)}
        return found | ({"softcap": m.number("cap")} if m.get("cap") is not None else {})
    kept = {k: v for k, v in sdpa.attributes.items() if k in ("scale", "is_causal") or (k == "softcap" and v)}
    return found | kept


def total_scale(m: Match) -> float:
    """The product of the scales of q, k and the scores."""
    result = 1.0
    for name in ("scale", "q_scale", "k_scale", "coefficient"):
        result *= m.number(name) if m.get(name) is not None else 1.0
    divisor = m.number("divisor") if m.get("divisor") is not None else 1.0
    return result / divisor if divisor else math.inf


def added_mask(m: Match, rw: Rewriter) -> Value | None:
    """What is added to the scores; layers that hide the same keys share it."""
    if m.get("fill") is None:
        given: Value | None = m.get("mask")
        return given
    hidden: Value = m.hidden
    for user in hidden.users():
        if user.op == "Where" and user.inputs[:2] == (hidden, m.blocked) and scalar(user.inputs[2]) == 0:
            return user.output
    with rw.on_behalf_of(m.fill):
        return rw.op.Where(hidden, m.blocked, rw.const(0, "shown", m.blocked.type.dtype.numpy))

"""The parts of a matched attention: its operands as heads, its scale, and its mask as something to add."""

from __future__ import annotations

from collections.abc import Iterator

from vacc_opt.ir import Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.heads import ROWS_LAST, TRANSPOSED, Heads, as_heads
from vacc_opt.passes.infra.masks import BLOCKED
from vacc_opt.passes.infra.match import Match, Reason
from vacc_opt.passes.infra.values import scalar


def operands(m: Match) -> tuple[Heads | None, Heads | None, Heads | None]:
    """``q``, ``k`` and ``v``; k is the right operand of a product unless the match is a fused operator (``sdpa``)."""
    order = ROWS_LAST if m.get("sdpa") is not None else TRANSPOSED
    return as_heads(m.q), as_heads(m.k, order), as_heads(m.v)


def is_plain(value: Value | None) -> bool:
    """True for keys or values that are read where they are made: not repeated, and not turned after a join."""
    heads = as_heads(value) if value is not None else None
    if heads is None or heads.base is value:
        return True
    return heads.group == 1 and (heads.base.producer is None or heads.base.producer.op != "Concat")


def why_not_grouped(m: Match, q: Heads, k: Heads, v: Heads) -> Iterator[Reason]:
    """What speaks against query head h reading KV head h // group."""
    heads = q.sizes[1]
    if not isinstance(heads, int) or q.group != 1:
        yield m.reason("q has {heads} heads, a number is expected", heads=heads)
    for name, kv in (("k", k), ("v", v)):
        own = kv.sizes[1] * kv.group
        if own not in (heads, 1):
            what = "{name}: {own} heads serve {heads} query heads without a repetition"
            yield m.reason(what, name=name, own=own, heads=heads)
    if k.sizes[1] != v.sizes[1]:
        yield m.reason("k has {k} heads, v has {v}", k=k.sizes[1], v=v.sizes[1])
    if m.root.output.rank != 4 or (m.root.output.shape or ())[:2] != q.sizes[:2]:
        yield m.reason("the result is {y}, [B,H,S,D] of q's heads is expected", y=m.root.output.type)


def why_not_masked(m: Match, q: Heads) -> Iterator[Reason]:
    """What speaks against the ``mask`` that is added, or the ``fill`` of hidden scores."""
    mask, fill, softmax = m.get("mask"), m.get("fill"), m.get("softmax")
    if mask is not None and (mask.rank is None or mask.rank > 4):
        yield m.reason("the mask is {mask}", mask=mask.type)
    masked = mask is not None or fill is not None
    if softmax is not None and masked and (softmax.output.shape or ())[:-2] != q.sizes[:2]:
        yield m.reason("{x} is masked, [B,H,S,T] is expected", x=softmax.output.type)
    if fill is not None and m.number("blocked") > BLOCKED:
        yield m.reason("masked scores become {number:g}, which hides no key", number=m.number("blocked"))


def total_scale(m: Match) -> float:
    """The product of the scales of q, k and the scores."""
    result = 1.0
    for name in ("scale", "q_scale", "k_scale"):
        result *= m.number(name) if m.get(name) is not None else 1.0
    return result / m.number("divisor") if m.get("divisor") is not None else result


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

"""A pass with a planted mistake, for the tests of what finds mistakes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.passes.api import Capture, Kind, Match, Pattern, PatternPass, Rewriter, Scalar, Value, register


@register
@dataclass(frozen=True)
class ForgetScale(PatternPass):
    """Drop a factor, and say that nothing changes."""

    name: ClassVar[str] = "forget-scale"
    kind: ClassVar[Kind] = Kind.EXACT

    def pattern(self, x: Capture, scale: Scalar) -> Pattern:
        return x * scale

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        value: Value = m.x
        return value

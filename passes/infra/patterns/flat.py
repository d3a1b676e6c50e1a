"""Patterns of one node over variables and numbers: they are matched without goals, scores or a search.

Only success is told here; why a root does not match is for the matcher to find out.
"""

from __future__ import annotations

from collections.abc import Sequence

from vacc_opt.ir import Node, Value
from vacc_opt.passes.infra.patterns.pattern import COMMUTATIVE, Number, Op, Pattern, Var
from vacc_opt.passes.infra.patterns.scores import admits
from vacc_opt.passes.infra.patterns.values import is_number

Orders = tuple[tuple[int, ...], ...]
_Operand = tuple[str, float, Var | None]  # a variable's name, else a number; and the variable if it is a narrow one


class Flat:
    """A pattern of one node, ready to be held against roots."""

    def __init__(self, pattern: Op) -> None:
        self._op = pattern.op
        commutes = pattern.op in COMMUTATIVE and len(pattern.operands) == 2
        operands = pattern.by_structure if commutes else pattern.operands
        self._operands: Sequence[_Operand] = [_operand(operand) for operand in operands]
        self._orders: Orders = ((0, 1), (1, 0)) if commutes else (tuple(range(len(pattern.operands))),)

    @staticmethod
    def of(patterns: Sequence[Pattern]) -> Flat | None:
        """The pattern in this form, None when there is more to it."""
        pattern = patterns[0]
        if len(patterns) > 1 or not isinstance(pattern, Op) or pattern.attributes or pattern.capture:
            return None
        return Flat(pattern) if all(isinstance(o, Var | Number) for o in pattern.operands) else None

    def captures(self, root: Node) -> dict[str, Value] | None:
        """What the variables stand for at a root that matches, else None."""
        inputs = root.inputs
        if root.op != self._op or len(inputs) != len(self._operands):
            return None
        for order in self._orders:
            found: dict[str, Value] = {}
            for (name, number, narrow), position in zip(self._operands, order, strict=True):
                value = inputs[position]
                if value is None:
                    break
                if not name:
                    if value.const is None or not is_number(value, number):
                        break
                elif found.setdefault(name, value) is not value or (narrow is not None and not admits(narrow, value)):
                    break
            else:
                return found
        return None


def _operand(pattern: Pattern) -> _Operand:
    if isinstance(pattern, Number):
        return "", pattern.value, None
    assert isinstance(pattern, Var)
    return pattern.name, 0.0, None if pattern.kind == "any" else pattern

"""Further roots of a pattern: they are looked for among the users of what the roots before them captured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vacc_opt.ir import Node, Value
from vacc_opt.ir.errors import UserError
from vacc_opt.passes.infra.patterns.pattern import Either, Op, Output, Pattern, Through, Var, Where


@dataclass(frozen=True)
class _Up:
    """One step from an operand to the nodes that read it; ``again`` for any number of steps, none included."""

    ops: frozenset[str]
    again: bool = False


@dataclass(frozen=True)
class Climb:
    """A leaf of a root's pattern, and the ways from it up to the root."""

    leaf: Var | Op
    paths: tuple[tuple[_Up, ...], ...]

    def start(self, captures: Mapping[str, Any], bound: Mapping[Op, Node]) -> Sequence[Value]:
        """The values that the leaf stands for, none when it is not bound."""
        if isinstance(self.leaf, Op):
            node = bound.get(self.leaf)
            return node.outputs if node is not None else ()
        value = captures.get(self.leaf.name)
        return (value,) if isinstance(value, Value) else ()

    def tops(self, start: Sequence[Value]) -> list[Value]:
        """The values that can be the root, in order of use."""
        found: dict[Value, None] = {}
        for path in self.paths:
            level = dict.fromkeys(start)
            for step in path:
                level = _users(level, step)
            found.update(level)
        return list(found)


def _users(level: dict[Value, None], step: _Up) -> dict[Value, None]:
    found = dict(level) if step.again else {}
    pending = list(level)
    while pending:
        above = [v for user in pending.pop(0).users() if user.op in step.ops for v in user.outputs]
        fresh = [v for v in above if v not in found]
        found.update(dict.fromkeys(fresh))
        pending += fresh if step.again else ()
    return found


def climbs(pattern: Pattern, shared: frozenset[Op]) -> list[Climb]:
    """The leaves of a further root through which it is found; raises UserError when it shares nothing."""
    found: dict[Var | Op, dict[tuple[_Up, ...], None]] = {}
    names: dict[str, Var] = {}
    for leaf, path in _leaves(pattern, (), shared):
        key = names.setdefault(leaf.name, leaf) if isinstance(leaf, Var) else leaf
        found.setdefault(key, {})[path] = None
    if not found:
        raise UserError(f"a pattern has the root {pattern}, which shares nothing with the others", "capture a value")
    return [Climb(leaf, tuple(paths)) for leaf, paths in found.items()]


def _leaves(
    pattern: Pattern, path: tuple[_Up, ...], shared: frozenset[Op]
) -> Iterator[tuple[Var | Op, tuple[_Up, ...]]]:
    if isinstance(pattern, Var):
        yield pattern, path
    elif isinstance(pattern, Either):
        for choice in pattern.choices:
            yield from _leaves(choice, path, shared)
    elif isinstance(pattern, Where):
        yield from _leaves(pattern.inner, path, shared)
    elif isinstance(pattern, Through):
        yield from _leaves(pattern.inner, (_Up(pattern.ops, again=True), *path), shared)
    elif isinstance(pattern, Op | Output):
        node = pattern.node if isinstance(pattern, Output) else pattern
        if node in shared:
            yield node, path
        for operand in node.operands:
            yield from _leaves(operand, (_Up(frozenset({node.op})), *path), shared)


def shared_ops(patterns: Sequence[Pattern]) -> frozenset[Op]:
    """The node patterns that stand in more than one place: each must be one node everywhere."""
    counts: Counter[Pattern] = Counter()
    for pattern in _below(patterns):
        counts[pattern] += 1
    return frozenset(p for p, n in counts.items() if n > 1 and isinstance(p, Op))


def _below(patterns: Sequence[Pattern]) -> Iterator[Pattern]:
    """Every pattern under these, twice where it stands in several places, but never more often."""
    seen: Counter[Pattern] = Counter()
    pending = list(patterns)
    while pending:
        pattern = pending.pop()
        seen[pattern] += 1
        if seen[pattern] > 2:
            continue
        yield pattern
        if isinstance(pattern, Op):
            pending += pattern.operands
        elif isinstance(pattern, Either):
            pending += pattern.choices
        elif isinstance(pattern, Output):
            pending.append(pattern.node)
        elif isinstance(pattern, Where | Through):
            pending.append(pattern.inner)

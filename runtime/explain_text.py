"""An explanation as text: one screen, from the call down to the tensors of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vacc_opt.ir.provenance import Origin
from vacc_opt.runtime.explain import CallFact, Explanation, NodeFact, WeightFact

_WIDTH = 9  # of labels
_LISTED = 24  # lines of a list before it ends in `and N more`
_OPERATORS = 5  # named of one line of source


def explanation_text(found: Explanation) -> str:
    """The chain call > node > passes > origins > weights; a module path gives a table of its nodes."""
    return "\n".join(line.rstrip() for line in _lines(found)) + "\n"


def _lines(found: Explanation) -> Iterator[str]:
    what = {"call": f"{found.calls[0].kernel} of" if found.calls else "", "module": "part of"}
    yield f"{found.subject}: {what.get(found.kind, f'{found.kind} of')} {found.model}"
    if found.kind == "module":
        yield from _module(found)
    elif found.kind == "input":
        yield from _some(_labeled("read by", [f"{node.name}  {node.op}" for node in found.nodes]), 8)
    elif found.kind == "weight":
        for weight in found.weights:
            yield from _weight(weight, readers=True)
    else:
        first, *others = found.nodes
        yield from _node(first, calls=found.kind == "node")
        for node in others:
            yield _label("with", f"{node.name}  {node.op}  {_passes(node.passes)}")
            yield from (_label("", f"  {line}") for line in _origins(node.origins, 1))
            yield from (_label("", f"  {one.name}  {one.type} = {one.formula}") for one in node.weights)


def _label(label: str, text: str) -> str:
    return f"  {label:<{_WIDTH}} {text}"


def _labeled(label: str, lines: Sequence[str]) -> Iterator[str]:
    for index, line in enumerate(lines):
        yield _label("" if index else label, line)


def _some(lines: Iterator[str] | Sequence[str], most: int = _LISTED) -> Iterator[str]:
    listed = list(lines)
    yield from listed[:most]
    if len(listed) > most:
        yield _label("", f"and {len(listed) - most} more; --json lists all")


def _node(node: NodeFact, *, calls: bool) -> Iterator[str]:
    if calls and node.calls:
        verb = "call" if node.becomes == "computed" else "inside"
        yield from _some(_labeled(verb, [f"{call.index}  {call.kernel}" for call in node.calls]), 4)
    elif calls and node.becomes:
        yield _label("call", f"none: {node.becomes}")
    yield _label("node", f"{node.name}  {node.op}  {node.type}")
    yield _label("passes", _passes(node.passes))
    yield from _labeled("from", _origins(node.origins))
    for weight in node.weights:
        yield _label("weight", f"{weight.name}  {weight.type}")
        yield from (f"  {line}" for line in _weight(weight, readers=False))


def _weight(weight: WeightFact, *, readers: bool) -> Iterator[str]:
    if readers:
        yield _label("weight", f"{weight.name}  {weight.type}")
    yield _label("is", weight.formula)
    yield _label("passes", _passes(weight.passes))
    yield from _labeled("from", _origins(weight.origins))
    if readers:
        yield from _some(_labeled("read by", weight.readers), 4)


def _passes(passes: Sequence[str]) -> str:
    return " > ".join(passes) or "none: as it was exported"


def _origins(origins: Sequence[Origin], most: int = 8) -> list[str]:
    """A line for each module and line of source, with the operators that stand there."""
    places: dict[tuple[str, str], list[str]] = {}
    for origin in origins:
        places.setdefault((origin.module, origin.source), []).append(origin.op)
    lines = [
        "  ".join(part for part in (module, source, _operators(ops)) if part)
        for (module, source), ops in places.items()
    ]
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more; --json lists all"]


def _operators(names: Sequence[str]) -> str:
    """Without overloads: ``aten.mul.Tensor`` is ``aten.mul``."""
    short = list(dict.fromkeys(".".join(n.split(".")[:2]) if n.startswith("aten.") else n for n in names))
    return ", ".join(short[:_OPERATORS]) + (f" and {len(short) - _OPERATORS} more" if len(short) > _OPERATORS else "")


def _main_call(node: NodeFact) -> CallFact | None:
    """The call that computes a node, else the first that does it inside."""
    computed = (call for call in node.calls if call.nodes[0] == node.name)
    return next(computed, node.calls[0] if node.calls else None)


def _module(found: Explanation) -> Iterator[str]:
    yield f"  {len(found.nodes)} nodes, {len(found.calls)} calls, {len(found.weights)} weights"
    rows = [_row(node) for node in sorted(found.nodes, key=_first_call)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)] if rows else []
    cells = [(*(f"{cell:<{width}}" for cell, width in zip(row[:4], widths, strict=True)), row[4]) for row in rows]
    yield from _some([f"  {'  '.join(row)}" for row in cells])
    yield from _some([_label("weight", f"{one.name}  {one.type} = {one.formula}") for one in found.weights], 8)


def _first_call(node: NodeFact) -> tuple[bool, int, bool]:
    """Nodes in the order of their calls, what a call computes before what it does inside, then those without one."""
    call = _main_call(node)
    return call is None, call.index if call else 0, call is not None and call.nodes[0] != node.name


def _row(node: NodeFact) -> tuple[str, str, str, str, str]:
    """Call, kernel (indented: the operator that it does inside), node, line of source, passes."""
    call = _main_call(node)
    computed = call is not None and call.nodes[0] == node.name
    kernel = call.kernel if call is not None and computed else f"  {node.op}"
    source = node.origins[0].source if node.origins else ""
    return f"#{call.index}" if call is not None else "", kernel, node.name, source, _passes(node.passes)

"""Numbers, names, bounds and loop heads of a schedule as C text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from vacc_opt.backends.vacc.schedule import Affine, Kernel, Loop, Op, ScheduleError, Statement, Violation

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
Variable = Callable[[str, str], str]  # ("v" value, "n" tile size or "c" count, loop variable) -> C


def error(kernel: Kernel, kind: str, message: str) -> ScheduleError:
    """What is wrong with a kernel as a schedule."""
    return ScheduleError([Violation(kind, kernel.name, None, message)])


def check_name(kernel: Kernel, name: str) -> None:
    """Raises ScheduleError for a name that cannot be part of a C name."""
    if not _NAME.fullmatch(name):
        raise error(kernel, "name", f"`{name}` is no name in C: letters, digits and underscores")


def affine_text(value: Affine, variable: Variable) -> str:
    """The C expression of a sum; `|m|` is the size of a tile."""
    text = ""
    for name, coefficient in value.terms:
        short = name.strip("|")
        one = variable("n" if short != name else "v", short)
        sign = "-" if coefficient < 0 else "+" if text else ""
        text += f" {sign} " if text else sign
        text += one if abs(coefficient) == 1 else f"{abs(coefficient)} * {one}"
    if not text:
        return str(value.constant)
    return f"{text} {'-' if value.constant < 0 else '+'} {abs(value.constant)}" if value.constant else text


def number_text(value: float) -> str:
    """A float exactly, in C."""
    if value != value:
        return "NAN"
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "-INFINITY"
    return f"(float){value.hex()}"


def comment_text(text: str) -> str:
    """Text that cannot end a comment."""
    return re.sub(r"[^ -~]|[*\\](?=/)|/(?=\*)", "?", text)


def loop_head(loop: Loop, indent: str, variable: Variable) -> Iterator[str]:
    """The head of a loop with its tile size; iteration i of a parallel loop is for core `i % cores`."""
    value, size, count = (variable(kind, loop.var) for kind in "vnc")
    start, stop = affine_text(loop.start, variable), affine_text(loop.stop, variable)
    if loop.clipped:
        start = f"most(0, {start})"
    counted = (f", {count} = 0", f", {count}++") if loop.parallel else ("", "")
    yield f"{indent}for ({value} = {start}{counted[0]}; {value} < {stop}; {value} += {loop.step}{counted[1]}) {{"
    if loop.parallel:
        yield f"{indent}    if ({count} % r->cores != r->core) continue;"
    yield f"{indent}    {size} = least({loop.step}, {stop} - ({value}));"


def loop_variables(tree: tuple[Statement, ...]) -> Iterator[str]:
    """Names of the loops of a tree, one for each loop."""
    for one in tree:
        if isinstance(one, Loop):
            yield one.var
        if not isinstance(one, Op):
            yield from loop_variables(one.body)

"""Checks what a kernel computes: each box that it stores holds what the definition of its family puts there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vacc_opt.backends.vacc.binding import Lanes
from vacc_opt.backends.vacc.definition_attention import attention_problem
from vacc_opt.backends.vacc.definitions import Definition, Wanted, definition, family
from vacc_opt.backends.vacc.expressions import Expressions, Node
from vacc_opt.backends.vacc.follow import Stored, stores
from vacc_opt.backends.vacc.schedule import Kernel
from vacc_opt.backends.vacc.text import print_op

Problem = tuple[str, str]  # (kind, message)


_ATTENTION = {"attention", "attention_i8"}


def defined(kernel: Kernel) -> bool:
    """Whether the family of a kernel has a definition."""
    return family(kernel.name) in _ATTENTION or definition(kernel.name) is not None


def meaning_problems(kernel: Kernel, lanes: Lanes, scalars: Mapping[str, int]) -> Iterator[Problem]:
    """Stores that write something else than the definition of the kernel's family; none for an unknown family."""
    if not defined(kernel):
        return
    told = definition(kernel.name)
    make = Expressions()
    for one in stores(kernel, lanes, make):
        box = tuple(zip(one.box.start, one.box.stop, strict=True))
        wanted = Wanted(kernel, scalars, make, one.box.ref, box)
        problem = _problem(wanted, one, told)
        if problem:
            kind, message = problem
            yield kind, f"`{print_op(one.step.op)}` writes {one.box}: {message}"


def _problem(wanted: Wanted, one: Stored, told: Definition | None) -> Problem | None:
    try:
        if told is None:
            return attention_problem(wanted, one.node)
        due = told(wanted)
    except KeyError as error:
        return "name", f"no parameter or scalar {error} of a {family(wanted.kernel.name)}"
    except (IndexError, ValueError):
        return "shape", f"parameters are not those of a {family(wanted.kernel.name)}, or have other axes"
    return None if due is one.node else difference(due, one.node)


def difference(due: Node, found: Node) -> Problem:
    """The first place where an expression departs from the one that is due."""
    if due.kind == found.kind and due.data == found.data and len(due.parts) == len(found.parts):
        for one, other in zip(due.parts, found.parts, strict=True):
            if one is not other:
                return difference(one, other)
    return _other(due, found)


def _other(due: Node, found: Node) -> Problem:
    if found.kind == "plus":
        return "coverage", f"parts of k of {short(found)} do not continue each other"
    if found.kind == "unknown":
        return "coverage", f"what is there in place of {short(due)} cannot be followed"
    if "round" in (due.kind, found.kind):
        return "dtype", f"{short(found)} in place of {short(due)}"
    if due.kind == found.kind == "in" and due.data[0] == found.data[0]:
        lost = all(a <= b for a, b in zip(found.shape, due.shape, strict=False)) and found.shape != due.shape
        return "uncovered" if lost else "coverage", f"{short(found)} in place of {short(due)}"
    return "meaning", f"{short(found)} in place of {short(due)}"


def short(node: Node) -> str:
    """An expression in at most one line."""
    text = str(node)
    return text if len(text) <= 120 else f"{text[:117]}..."

"""Checks of what calls are given: run-time scalars of their own row, keys as keys, the scales of a cache everywhere.

They follow from the names of the interface: `pos`, `valid`, `past_key_values.<layer>.key|value`. Which of two weights
of one shape belongs to a call, and which of two temporaries, only the graph knows; a weight that no call reads is
found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod

from vacc_opt.backends.vacc.ops import PRIMITIVES
from vacc_opt.backends.vacc.schedule import Argument, Call, Program, Violation, affine

_CACHE = re.compile(r"(past_key_values\.\d+)\.(key|value)")
# a cache, then its scale, its zero, and the rows of this call that are appended to it
_TABLES = {"CACHE": ("SCALE", "ZERO", "NEW"), "K": ("KS", "KZ", "KN"), "V": ("VS", "VZ", "VN")}
_APART = {"COS": "SIN", "SIN": "COS"}  # no tensor is both


def wiring_violations(program: Program) -> Iterator[Violation]:
    """Calls that are given another scalar, row, cache or table than their names ask for, and weights left over."""
    for call in program.calls:
        yield from _scalars(program, call)
        yield from _caches(call)
    yield from _tables(program)
    yield from _ranks(program)
    used = {one.tensor for call in program.calls for one in (*call.arguments, *call.scalars)}
    used |= {one.tensor for one in program.outputs}
    for tensor in (*program.of_role("weight"), *program.of_role("cache")):
        if tensor.name not in used:
            yield Violation("uncovered", program.name, None, f"{tensor.role} `{tensor.name}` is used by no call")


def _scalars(program: Program, call: Call) -> Iterator[Violation]:
    """`pos` and `valid` come from the inputs of those names, from the row that the arguments belong to."""
    for scalar in call.scalars:
        known = {"pos", "valid"} & program.tensor.keys()
        if scalar.name in known and scalar.tensor != scalar.name:
            text = f"run-time scalar `{scalar.name}` is read from `{scalar.tensor}`"
            yield Violation("scalar", call.kernel, call.index, text)
        rows = prod(program.tensor[scalar.tensor].shape)
        for one in call.arguments:
            row = _row(program, call, one, rows)
            if row is not None and row != scalar.offset:
                text = f"{one.name} is row {row} of the batch, `{scalar.name}` that of row {scalar.offset}"
                yield Violation("scalar", call.kernel, call.index, text)
                break


def _row(program: Program, call: Call, one: Argument, rows: int) -> int | None:
    """The row of a batch that an argument lies in; None for a weight and for what is not of one row."""
    tensor, param = program.tensor[one.tensor], program.kernel[call.kernel].param[one.name]
    size = prod(tensor.shape) // rows
    if tensor.role == "weight" or rows == 1 or prod(tensor.shape) % rows:
        return None
    row = one.offset // max(size, 1)
    return row if one.offset + param.extent <= (row + 1) * size else None


def _caches(call: Call) -> Iterator[Violation]:
    """Keys are read as keys and values as values, of one layer."""
    found = {one.name: match for one in call.arguments if (match := _CACHE.fullmatch(one.tensor))}
    for name, due in (("K", "key"), ("V", "value")):
        if name in found and found[name][2] != due:
            yield Violation("coverage", call.kernel, call.index, f"{name} is cache `{found[name][0]}`, no {due}")
    if len({match[1] for match in found.values()}) > 1:
        text = f"caches of several layers: {', '.join(match[0] for match in found.values())}"
        yield Violation("coverage", call.kernel, call.index, text)


def _tables(program: Program) -> Iterator[Violation]:
    """A cache is read with the scale, zero and new rows that it is written with; no table is of cosines and sines."""
    tables: dict[tuple[str, int], str] = {}
    turns: dict[str, str] = {}
    for call in program.calls:
        given = {one.name: one.tensor for one in call.arguments}
        for cache, names in _TABLES.items():
            for place, name in enumerate(names):
                if cache in given and name in given:
                    first = tables.setdefault((given[cache], place), given[name])
                    if first != given[name]:
                        text = f"{name} is `{given[name]}`, but cache `{given[cache]}` goes with `{first}`"
                        yield Violation("coverage", call.kernel, call.index, text)
        for name in _APART.keys() & given.keys():
            if turns.setdefault(given[name], name) != name:
                text = f"`{given[name]}` is {_APART[name]} elsewhere and {name} here"
                yield Violation("coverage", call.kernel, call.index, text)


def _ranks(program: Program) -> Iterator[Violation]:
    """Collectives whose parameters have an axis of ranks have as many as the program, and so many shares are added."""
    axes = {"all_gather": ("Y", 1), "reduce_scatter": ("X", 0)}
    for kernel in program.kernels:
        for _, op in kernel.operations():
            if op.kind == "add_share" and (parts := dict(op.attributes)["parts"]) != affine(program.ranks):
                text = f"`add_share` of 1 / {parts} in a program of {program.ranks} ranks"
                yield Violation("collective", kernel.name, None, text)
            if op.kind in axes and PRIMITIVES[op.kind].collective:
                side, axis = axes[op.kind]
                view = op.outs[0] if side == "Y" else op.ins[0]
                if view.ref in kernel.param and kernel.param[view.ref].shape[axis] != program.ranks:
                    ranks = kernel.param[view.ref].shape[axis]
                    text = f"`{op.kind}` of {ranks} ranks in a program of {program.ranks}"
                    yield Violation("collective", kernel.name, None, text)

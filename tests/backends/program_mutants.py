"""Ways to break a program, one call or tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vacc_opt.backends.vacc.memory import lifetimes
from vacc_opt.backends.vacc.schedule import ALIGN, Argument, Call, Program, Tensor
from vacc_opt.tests.backends.mutants import kernel_mutants

_IN_A_PROGRAM = {
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "select_row",
    "kv_append",
    "kv_append_i8",
    "append",
    "rotary",
}


@dataclass(frozen=True)
class Broken:
    """A broken program, the kind of mistake, and where it is."""

    kind: str
    where: str
    program: Program


def program_mutants(program: Program) -> Iterator[Broken]:
    """All mutants of a program, in a fixed order."""
    yield from _calls(program)
    for call in program.calls:
        yield from _arguments(program, call)
        yield from _scalars(program, call)
    yield from _addresses(program)
    yield from _outputs(program)
    yield from _collectives(program)
    yield from _kernels(program)


def _calls(program: Program) -> Iterator[Broken]:
    calls = program.calls
    for index, call in enumerate(calls):
        where = f"call {index} ({call.kernel})"
        yield Broken("drop a call", where, _ordered(program, [*calls[:index], *calls[index + 1 :]]))
        yield Broken("repeat a call", where, _ordered(program, [*calls[: index + 1], *calls[index:]]))
        if index + 1 < len(calls):
            turned = [*calls[:index], calls[index + 1], call, *calls[index + 2 :]]
            yield Broken("swap two calls", where, _ordered(program, turned))


def _arguments(program: Program, call: Call) -> Iterator[Broken]:
    """Another tensor of the same type and size, another place in it, two arguments swapped."""
    params = program.kernel[call.kernel].param
    for one in call.arguments:
        tensor, mode = program.tensor[one.tensor], params[one.name].mode
        where = f"call {call.index} ({call.kernel}): {one.name}"
        for other in _alike(program, tensor, call.index):
            wrong = replace(one, tensor=other.name)
            kind = "write the wrong tensor" if mode != "in" else "read the wrong tensor"
            yield Broken(kind, f"{where} is {other.name}", _with(program, call, wrong))
        for by in (1, -1, params[one.name].strides[0] if params[one.name].strides else 1):
            wrong = replace(one, offset=one.offset + by)
            yield Broken("shift an argument", f"{where} by {by}", _with(program, call, wrong))
    for index, one in enumerate(call.arguments):
        for other in call.arguments[index + 1 :]:
            a, b = params[one.name], params[other.name]
            if (a.dtype, a.shape, a.strides, a.mode) == (b.dtype, b.shape, b.strides, b.mode) and not _symmetric(call):
                swapped = {one.name: other, other.name: one}
                arguments = tuple(
                    replace(swapped[x.name], name=x.name) if x.name in swapped else x for x in call.arguments
                )
                where = f"call {call.index} ({call.kernel}): {one.name} and {other.name}"
                yield Broken("swap two arguments", where, _with_call(program, replace(call, arguments=arguments)))


def _symmetric(call: Call) -> bool:
    return call.kernel.startswith(("add.", "mul.", "add_rms_norm"))


def _scalars(program: Program, call: Call) -> Iterator[Broken]:
    for index, one in enumerate(call.scalars):
        where = f"call {call.index} ({call.kernel}): {one.name}"
        other = "valid" if one.tensor == "pos" else "pos"
        changes = [replace(one, tensor=other)]
        if program.tensor[one.tensor].shape[0] > 1:
            changes.append(replace(one, offset=1 - one.offset))
        for wrong in changes:
            scalars = (*call.scalars[:index], wrong, *call.scalars[index + 1 :])
            text = f"{where} is {wrong.tensor}[{wrong.offset}]"
            yield Broken("wrong run-time scalar", text, _with_call(program, replace(call, scalars=scalars)))


def _addresses(program: Program) -> Iterator[Broken]:
    """A temporary put over another tensor that is alive with it."""
    lives = {one.name: one for one in lifetimes(program)}
    for one in lives.values():
        for tensor in program.tensors:
            other = lives.get(tensor.name)
            if tensor.name != one.name and (tensor.role != "temp" or (other and other.meets(one))):
                moved = _moved(program, one.name, tensor.offset)
                kind = "reuse memory too early" if tensor.role == "temp" else "a temporary over a persistent tensor"
                yield Broken(kind, f"{one.name} over {tensor.name}", moved)
        yield Broken("shift an address", one.name, _moved(program, one.name, program.tensor[one.name].offset - ALIGN))


def _outputs(program: Program) -> Iterator[Broken]:
    for index, one in enumerate(program.outputs):
        changes = [(f"offset {by:+d}", replace(one, offset=one.offset + by)) for by in (1, -1)]
        tensor = program.tensor[one.tensor]
        changes += [(t.name, replace(one, tensor=t.name)) for t in _alike(program, tensor, len(program.calls))]
        for what, wrong in changes:
            outputs = (*program.outputs[:index], wrong, *program.outputs[index + 1 :])
            yield Broken("wrong output", f"{one.name}: {what}", replace(program, outputs=outputs))


def _collectives(program: Program) -> Iterator[Broken]:
    """A collective left out by passing its input on, and ranks that are not there."""
    for call in program.calls:
        if call.kernel.startswith("all_reduce"):
            source, result = (call.argument(name).tensor for name in ("X", "Y"))
            rest = [_renamed(one, result, source) for one in program.calls if one.index != call.index]
            yield Broken("skip a collective", f"call {call.index}", _ordered(program, rest))
    if program.ranks > 1:
        yield Broken("fewer ranks", "ranks - 1", replace(program, ranks=program.ranks - 1))


def _renamed(call: Call, old: str, new: str) -> Call:
    return replace(
        call, arguments=tuple(replace(one, tensor=new) if one.tensor == old else one for one in call.arguments)
    )


def _kernels(program: Program) -> Iterator[Broken]:
    """Mistakes in kernels that touch caches, rows by position, or other ranks."""
    for index, kernel in enumerate(program.kernels):
        if _IN_A_PROGRAM & set(re.split("[+.]", kernel.name)):
            for one in kernel_mutants(kernel):
                if one.kind in {
                    "shift an offset",
                    "lose a tail",
                    "drop an operation",
                    "reverse tiles",
                    "stay at one tile",
                }:
                    kernels = (*program.kernels[:index], one.kernel, *program.kernels[index + 1 :])
                    changed = replace(program, kernels=kernels)
                    yield Broken(f"{one.kind} in a program", f"{kernel.name}: {one.where}", changed)


def _alike(program: Program, tensor: Tensor, index: int) -> Iterator[Tensor]:
    """A few other tensors that could be taken for this one: the nearest before and behind in the list."""
    same = [t for t in program.tensors if (t.dtype, t.shape, t.role) == (tensor.dtype, tensor.shape, tensor.role)]
    if tensor in same:
        at = same.index(tensor)
        yield from same[max(0, at - 1) : at]
        yield from same[at + 1 : at + 2]


def _with(program: Program, call: Call, argument: Argument) -> Program:
    arguments = tuple(argument if one.name == argument.name else one for one in call.arguments)
    return _with_call(program, replace(call, arguments=arguments))


def _with_call(program: Program, call: Call) -> Program:
    return replace(program, calls=tuple(call if one.index == call.index else one for one in program.calls))


def _ordered(program: Program, calls: list[Call]) -> Program:
    return replace(program, calls=tuple(replace(call, index=index) for index, call in enumerate(calls)))


def _moved(program: Program, name: str, offset: int) -> Program:
    changed = tuple(replace(one, offset=max(0, offset)) if one.name == name else one for one in program.tensors)
    return replace(program, tensors=changed)

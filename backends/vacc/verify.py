"""The verifier: a schedule is refused unless every rule that keeps its values right holds (docs/invariants.md).

Kernels, unrolled at four values of their run-time scalars (smallest, largest, one above the smallest, middle):
- names are given once; buffers are aligned, inside SRAM and apart; what the array fills fits its accumulators; buffers
  that share a bank, where the SRAM has banks, are touched by the same engines;
- rings are filled as often as used and cannot deadlock; tiles of operations conform, and their types are ones that the
  engine takes;
- a slot or scratch is read only where it was written, no ring slot is overwritten unread, what the array or the vector
  engine fills is read, and a slot of which a part is read is read whole;
- outputs are written exactly once and have no element at two places, nothing is read and written in one call, inputs
  are read whole (but along axes where a run-time scalar chooses);
- a kernel of a known family computes what its definition says: values are followed from loads through slots and
  operations to each store, and the expression there must be the one that is due (`verify_meaning`, `definitions`);
- of other kernels: products of operands that come unchanged from loads fill M x N x K once for each accumulator buffer,
  and rows and columns follow the result to its store; a product that cannot be followed is refused. Where an operand is
  computed, each pair of tiles multiplied into a slot adds each k of the first tile once. That vector operations are the
  right ones on the right rows is not checked there.

Programs: the target, its cores and dies match; arguments and outputs are windows inside tensors that exist; elements of
temporaries are written before they are read or output, and results are read before they are overwritten or the end;
tensors alive together share no bytes; weights and inputs are never written; windows of one tensor in one call are
disjoint if one is written; calls are given the scalars, caches and tables that their names ask for
(`verify_wiring`). Which of two weights, or of two temporaries, of one shape a call should read is not known here.

Caches [B, H, C, D] of programs with inputs `input_ids` [B, S] and `pos` [B], at four choices of `pos` a row: only
rows pos..pos+S are written, all of them and once; rows from `pos` on are read after they are written; each row before
`pos` is read; a call that reads no row of pos..pos+S also reads a tensor that is appended to that cache. Other caches
are checked for bounds alone.

Hazards have the names of the field: RAW (read before written), WAW (written twice, or what may not be), WAR (slot
reused too early), `uncovered` (a lost tail), `coverage` (the wrong place), `meaning` (another value than is due),
`lost-signal`, `deadlock`, `overlap`, `bank`, `capacity`, `bounds`. The rest name the text: `name`, `shape`, `dtype`,
`mode`, `op`, `call`, `output`, `scalar`, `collective`, `target`, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from vacc_opt.backends.vacc.binding import Unroll, Unrolled, scalar_samples
from vacc_opt.backends.vacc.memory import memory_plan, overlaps
from vacc_opt.backends.vacc.ops import PRIMITIVES
from vacc_opt.backends.vacc.schedule import ALIGN, Call, Program, ScheduleError, Violation
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import round_up
from vacc_opt.backends.vacc.verify_caches import cache_violations
from vacc_opt.backends.vacc.verify_dataflow import dataflow_violations
from vacc_opt.backends.vacc.verify_kernel import kernel_violations
from vacc_opt.backends.vacc.verify_wiring import wiring_violations

Samples = Mapping[str, list[dict[str, int]]]  # kernel -> values of its run-time scalars


def verify(program: Program, target: Target, unroll: Unroll | None = None) -> None:
    """Raise ScheduleError with every violation found; return quietly for a valid schedule.

    `unroll`: keeps what kernels are unrolled to, for whoever times the program next.
    """
    violations = check(program, target, unroll=unroll)
    if violations:
        raise ScheduleError(violations)


def check(
    program: Program, target: Target, samples: Samples | None = None, unroll: Unroll | None = None
) -> list[Violation]:
    """Violations of `program` on `target`; `samples` replaces the scalar values at which kernels are tried."""
    found = [*_machine(program, target), *_calls(program), *_outputs(program)]
    if found:
        return found  # what follows reads tensors through the arguments
    tried = _samples(program) if samples is None else samples
    unroll = unroll or Unrolled()
    kernels = [v for one in program.kernels for v in kernel_violations(one, target, tried.get(one.name, [{}]), unroll)]
    calls = [*_memory(program, target), *dataflow_violations(program)]
    if kernels:
        return kernels + calls  # the rest reads operations, which may lack operands or not be unrolled
    return [*calls, *wiring_violations(program), *cache_violations(program, target, unroll)]


def _samples(program: Program) -> dict[str, list[dict[str, int]]]:
    samples: dict[str, list[dict[str, int]]] = {}
    for call in program.calls:
        tried = samples.setdefault(call.kernel, [])
        tried += [values for values in scalar_samples(program, call) if values not in tried]
    return samples


def _machine(program: Program, target: Target) -> Iterator[Violation]:
    """The program is for this target, its collectives have links to run on, and its ranks a die each.

    A target of one die stands for any number of the same.
    """
    if program.target_sha != target.sha or program.cores != target.die.cores:
        made = f"made for {program.target} {program.target_sha} with {program.cores} cores"
        yield _wrong(program, "target", f"{made}, not for {target.name} {target.sha} with {target.die.cores}")
    kinds = {op.kind for kernel in program.kernels for _, op in kernel.operations()}
    collective = any(PRIMITIVES[kind].collective for kind in kinds & PRIMITIVES.keys())
    if collective and program.ranks > 1 and target.links is None:
        yield _wrong(program, "target", f"{program.ranks} ranks exchange data, but {target.name} has no links")
    if program.ranks > target.dies > 1:
        yield _wrong(program, "target", f"{program.ranks} ranks, a die each, but {target.name} has {target.dies} dies")


def _calls(program: Program) -> Iterator[Violation]:
    """Every call gives each parameter a window inside a tensor of its type that it may use that way."""
    for index, call in enumerate(program.calls):
        kernel = program.kernel.get(call.kernel)
        if kernel is None or call.index != index:
            yield _bad(call, "call", "unknown kernel" if kernel is None else f"stands at place {index}")
            continue
        given = [one.name for one in call.arguments], [one.name for one in call.scalars]
        if sorted(given[0]) != sorted(kernel.param) or sorted(given[1]) != sorted(kernel.scalars):
            yield _bad(call, "call", f"arguments {given[0] + given[1]} do not match the kernel's parameters")
            continue
        for one in (*call.arguments, *call.scalars):
            tensor = program.tensor.get(one.tensor)
            if tensor is None:
                yield _bad(call, "call", f"unknown tensor `{one.tensor}`")
                continue
            param = kernel.param.get(one.name)
            dtype, extent = (param.dtype, param.extent) if param else ("i64", 1)
            size = prod(tensor.shape)
            if dtype != tensor.dtype:
                yield _bad(call, "dtype", f"{one.name} is {dtype}, tensor `{tensor.name}` is {tensor.dtype}")
            if one.offset < 0 or one.offset + extent > size:
                inside = f"elements {one.offset}..{one.offset + extent} of {size} of tensor `{tensor.name}`"
                yield _bad(call, "bounds", f"{one.name} covers {inside}")
            if param and param.mode != "in" and tensor.role in {"weight", "input"}:
                yield _bad(call, "WAW", f"{one.name} writes {tensor.role} `{tensor.name}`")


def _outputs(program: Program) -> Iterator[Violation]:
    """Every output is a window inside a tensor, with strides above zero along its axes."""
    for one in program.outputs:
        tensor = program.tensor.get(one.tensor)
        if tensor is None:
            yield _wrong(program, "output", f"output `{one.name}`: unknown tensor `{one.tensor}`")
            continue
        wide = [(extent, stride) for extent, stride in zip(one.shape, one.strides, strict=False) if extent != 1]
        if len(one.shape) != len(one.strides) or any(extent < 1 or stride < 1 for extent, stride in wide):
            shown = f"shape {list(one.shape)} with strides {list(one.strides)}"
            yield _wrong(program, "output", f"output `{one.name}`: {shown} is not a window")
            continue
        end = one.offset + sum((extent - 1) * stride for extent, stride in wide) + 1
        size = prod(tensor.shape)
        if one.offset < 0 or end > size:
            inside = f"elements {one.offset}..{end} of {size} of tensor `{tensor.name}`"
            yield _wrong(program, "bounds", f"output `{one.name}` covers {inside}")


def _memory(program: Program, target: Target) -> Iterator[Violation]:
    """Tensors alive in the same call have bytes of their own, inside the DDR."""
    plan = memory_plan(program)
    for message in overlaps(plan):
        yield _wrong(program, "overlap", f"DDR: {message}")
    end = max((region.end for region in plan.regions), default=0)
    if program.ddr_bytes != round_up(end, ALIGN) or program.ddr_bytes > target.die.ddr.capacity:
        stated = f"{program.ddr_bytes} stated, {target.die.ddr.capacity} there"
        yield _wrong(program, "capacity", f"DDR: tensors end at byte {end}, {stated}")
    if program.ddr_bound != plan.bound:
        yield _wrong(
            program, "capacity", f"DDR: lower bound {program.ddr_bound} stated, live tensors need {plan.bound}"
        )


def _bad(call: Call, kind: str, message: str) -> Violation:
    return Violation(kind, call.kernel, call.index, message)


def _wrong(program: Program, kind: str, message: str) -> Violation:
    return Violation(kind, program.name, None, message)

"""Where every DDR tensor of a program lies: weights and KV for good, intermediate tensors while they are alive.

Two intermediate tensors may share bytes only when their lifetimes (first writing call to last reading call, both
included) do not meet. The largest sum of bytes alive in one call is a lower bound of any plan; the plan reports it.
Lifetimes are cut at calls, so a tensor that a call reads never shares bytes with one that the call writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vacc_opt.backends.vacc.schedule import ALIGN, Program
from vacc_opt.backends.vacc.tiling import round_up
from vacc_opt.ir.errors import CheckError


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A tensor of `bytes` that is alive from call `first` to call `last`, both included."""

    name: str
    bytes: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether there is a call in which both are alive."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True, slots=True)
class Region:
    """A tensor at a DDR address: bytes [offset, offset + bytes) during calls [first, last]."""

    name: str
    offset: int
    bytes: int
    first: int
    last: int
    persistent: bool

    @property
    def end(self) -> int:
        """First byte after the region."""
        return self.offset + self.bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Regions of a program in DDR: `bytes` is the peak, `bound` what no plan with this alignment can go below."""

    regions: tuple[Region, ...]
    bytes: int
    bound: int
    persistent_bytes: int

    def region(self, name: str) -> Region:
        """The region of tensor `name`; raises KeyError."""
        for region in self.regions:
            if region.name == name:
                return region
        raise KeyError(name)


def plan_ddr(
    persistent: Sequence[tuple[str, int]], lifetimes: Iterable[Lifetime], align: int, calls: int
) -> MemoryPlan:
    """Lay out persistent tensors (name, bytes) from address 0, then intermediates by first fit, largest first.

    Addresses are multiples of `align` bytes; `calls` is the number of calls of the program. The order of placement is
    (size, first call, name), so equal input gives equal addresses.
    """
    regions: list[Region] = []
    base = 0
    for name, size in persistent:
        regions.append(Region(name, base, size, 0, max(calls - 1, 0), True))
        base += round_up(size, align)
    lives = list(lifetimes)
    placed: list[tuple[Lifetime, int]] = []
    for life in sorted(lives, key=lambda one: (-one.bytes, one.first, one.name)):
        offset = _first_fit(life, placed, base, align)
        placed.append((life, offset))
    for life, offset in sorted(placed, key=lambda one: (one[0].first, one[1])):
        regions.append(Region(life.name, offset, life.bytes, life.first, life.last, False))
    peak = max([base, *(round_up(region.end, align) for region in regions)])
    plan = MemoryPlan(tuple(regions), peak, base + live_bytes_bound(lives, align), base)
    problems = overlaps(plan)
    if problems:
        raise CheckError(f"DDR plan: {problems[0]}")
    return plan


def memory_plan(program: Program) -> MemoryPlan:
    """The plan that a program carries in its tensors' addresses, with lifetimes read from its calls.

    A temporary lives from the call that first writes it to the last that reads it, an output to the end.
    """
    last_call = max(len(program.calls) - 1, 0)
    lives = {life.name: life for life in lifetimes(program)}
    regions, persistent = [], 0
    for tensor in program.tensors:
        life = lives.get(tensor.name, Lifetime(tensor.name, tensor.bytes, 0, last_call))
        kept = tensor.role != "temp"
        regions.append(Region(tensor.name, tensor.offset, tensor.bytes, life.first, life.last, kept))
        persistent = max(persistent, round_up(tensor.offset + tensor.bytes, ALIGN) if kept else 0)
    kept_bytes = sum(round_up(region.bytes, ALIGN) for region in regions if region.persistent)
    bound = kept_bytes + live_bytes_bound(list(lives.values()), ALIGN)
    return MemoryPlan(tuple(regions), program.ddr_bytes, bound, persistent)


def lifetimes(program: Program) -> list[Lifetime]:
    """Lifetimes of the temporaries that some call uses, in the order of the tensors."""
    outputs = {one.tensor for one in program.outputs}
    used: dict[str, list[int]] = {}
    for index, call in enumerate(program.calls):
        for one in (*call.arguments, *call.scalars):
            used.setdefault(one.tensor, []).append(index)
    for name in used.keys() & outputs:
        used[name].append(len(program.calls) - 1)
    temps = [one for one in program.of_role("temp") if one.name in used]
    return [Lifetime(one.name, one.bytes, used[one.name][0], used[one.name][-1]) for one in temps]


def live_bytes_bound(lifetimes: Sequence[Lifetime], align: int) -> int:
    """Largest sum over calls of the (aligned) bytes alive in the call."""
    changes: dict[int, int] = {}
    for life in lifetimes:
        size = round_up(life.bytes, align)
        changes[life.first] = changes.get(life.first, 0) + size
        changes[life.last + 1] = changes.get(life.last + 1, 0) - size
    alive = peak = 0
    for _, change in sorted(changes.items()):
        alive += change
        peak = max(peak, alive)
    return peak


def overlaps(plan: MemoryPlan) -> list[str]:
    """One message for each pair of regions that share bytes while both are alive (empty for a valid plan)."""
    problems = []
    ordered = sorted(plan.regions, key=lambda region: (region.offset, region.name))
    active: list[Region] = []
    for region in ordered:
        active = [one for one in active if one.end > region.offset]
        problems += [
            f"`{one.name}` and `{region.name}` share bytes {region.offset}..{min(one.end, region.end)}"
            f" in calls {max(one.first, region.first)}..{min(one.last, region.last)}"
            for one in active
            if one.first <= region.last and region.first <= one.last
        ]
        active.append(region)
    return problems


def _first_fit(life: Lifetime, placed: Sequence[tuple[Lifetime, int]], base: int, align: int) -> int:
    """Lowest aligned offset >= base where `life` meets no placed tensor that it is alive with."""
    busy = sorted((offset, offset + other.bytes) for other, offset in placed if life.meets(other))
    offset = base
    for start, end in busy:
        if offset + life.bytes <= start:
            break
        offset = max(offset, round_up(end, align))
    return offset

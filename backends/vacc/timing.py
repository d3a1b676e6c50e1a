"""What the time simulator reports: cycles of kernels and calls, accounts of engines, bounds and what binds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vacc_opt.backends.vacc.event_state import Record
from vacc_opt.backends.vacc.target import Target


@dataclass(frozen=True, slots=True)
class Bound:
    """Cycles that no schedule on the target goes below: the work of each resource of a die, after a `latency`.

    Of a kernel, `latency` passes before any engine has something to work on. Of a program, whose calls might overlap,
    the resources hold sums over the calls, without the cycles in which an array drains or a hop passes, and `latency`
    is the time that a chain of dependent calls spends waiting; it does not add to the work. `ddr` counts every byte
    once, `capacity` (at least as much) also those that cannot stay on the chip until they are needed again; `port` are
    the DMA ports of the cores.
    """

    compute: int
    vector: int
    ddr: int
    link: int
    latency: int
    chained: bool = False
    capacity: int = 0
    port: int = 0

    @property
    def resources(self) -> Mapping[str, int]:
        """Cycles by resource."""
        return {
            "compute": self.compute,
            "DDR": self.ddr,
            "capacity": self.capacity,
            "port": self.port,
            "vector": self.vector,
            "link": self.link,
        }

    @property
    def cycles(self) -> int:
        """The bound."""
        most = max(self.resources.values())
        return max(most, self.latency) if self.chained else most + self.latency

    @property
    def binds(self) -> str:
        """What sets the bound: the resource with most work, or `latency` where waiting alone takes longer."""
        name = max(self.resources, key=lambda one: self.resources[one])
        return "latency" if self.latency > self.resources[name] else name


@dataclass(frozen=True, slots=True)
class EngineAccount:
    """Where the cycles of one engine of one core went; `cycles` sums to those of the kernel."""

    engine: str
    core: int
    cycles: Mapping[str, int]
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class KernelTiming:
    """One kernel on one die: `bytes` cross the DDR port, `macs` are done on the array.

    `account` gives every cycle to a resource that is busy in it: to the one that binds when it is, else to the first of
    compute, DDR, vector, link that is, else to `latency`. Its values sum to `cycles`.
    """

    name: str
    cycles: int
    bound: Bound
    engines: tuple[EngineAccount, ...]
    account: Mapping[str, int]
    bytes: int
    macs: int
    calls: int

    @property
    def ratio(self) -> float:
        """Cycles over the lower bound (at least 1)."""
        return self.cycles / self.bound.cycles if self.bound.cycles else 1.0

    @property
    def busiest(self) -> EngineAccount:
        """The account of the engine that works longest."""
        return max(self.engines, key=lambda one: one.cycles["busy"])


@dataclass(frozen=True, slots=True)
class CallTiming:
    """One call of a kernel, from cycle `start` to cycle `end`."""

    index: int
    kernel: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Timing:
    """A program on a target: the same for every rank, as ranks run the same schedule.

    `bound` holds under any overlap of calls (a sum a resource); `serial_bound` is the sum of the kernels' bounds, which
    calls that do not overlap cannot beat. `account` sums those of the kernels; its values sum to `cycles`.
    """

    phase: str
    ranks: int
    target: Target
    kernels: Mapping[str, KernelTiming]
    calls: tuple[CallTiming, ...]
    cycles: int
    bound: Bound
    serial_bound: int
    account: Mapping[str, int]

    @property
    def ratio(self) -> float:
        """Cycles over the lower bound that holds under any overlap."""
        return self.cycles / self.bound.cycles if self.bound.cycles else 1.0

    @property
    def milliseconds(self) -> float:
        """Predicted time of one pass of the program."""
        return self.target.seconds(self.cycles) * 1e3

"""Collects the calls of a program: kernels once a signature, tensors, and their place in DDR."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from vacc_opt.backends.vacc.memory import Lifetime, MemoryPlan, plan_ddr
from vacc_opt.backends.vacc.refs import Ref
from vacc_opt.backends.vacc.schedule import (
    ALIGN,
    NAME,
    Argument,
    Call,
    Kernel,
    Output,
    Param,
    Program,
    Tensor,
    itemsize,
    row_major,
)
from vacc_opt.backends.vacc.target import Target
from vacc_opt.ir.errors import UserError

_KEPT = ("weight", "cache", "input")  # roles of tensors that persist, in the order of their addresses


@dataclass(frozen=True, slots=True)
class Operand:
    """A window passed for parameter `name` with `mode` (`in`, `out`, `inout`)."""

    name: str
    mode: str
    ref: Ref

    @property
    def param(self) -> Param:
        """The parameter."""
        return self.ref.param(self.name, self.mode)


class Assembler:
    """Adds tensors and calls in program order; `program` plans memory and returns the result."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._tensors: dict[str, Tensor] = {}
        self._kernels: dict[Hashable, Kernel] = {}
        self._calls: list[Call] = []
        self._lives: dict[str, tuple[int, int]] = {}
        self._temps = 0

    def tensor(self, name: str, dtype: str, shape: tuple[int, ...], role: str) -> Ref:
        """Declare a tensor (once) and return all of it; UserError for a name that the text cannot hold."""
        if not NAME.fullmatch(name):
            raise UserError(f"tensor name `{name}` has a space or one of `,=()[]{{}}`", "rename it in the graph")
        if name not in self._tensors:
            self._tensors[name] = Tensor(name, dtype, shape, role, 0)
        return Ref(name, dtype, shape, row_major(shape))

    def temp(self, dtype: str, shape: Sequence[int]) -> Ref:
        """A new row-major intermediate tensor."""
        self._temps += 1
        return self.tensor(f"t{self._temps}", dtype, tuple(shape), "temp")

    def call(
        self,
        key: Hashable,
        build: Callable[[], Kernel],
        operands: Sequence[Operand],
        scalars: Mapping[str, tuple[str, int]],
        nodes: tuple[str, ...],
    ) -> None:
        """Call the kernel for the operands' parameters and `key`, built at its first use, on behalf of `nodes`."""
        signature = (key, tuple(one.param for one in operands))
        kernel = self._kernels.get(signature)
        if kernel is None:
            built = build()
            kernel = self._kernels[signature] = replace(built, name=f"{built.name}.{len(self._kernels)}")
        index = len(self._calls)
        for one in operands:
            first, _ = self._lives.get(one.ref.tensor, (index, index))
            self._lives[one.ref.tensor] = first, index
        arguments = tuple(Argument(one.name, one.ref.tensor, one.ref.offset) for one in operands)
        bound = tuple(Argument(name, tensor, element) for name, (tensor, element) in scalars.items())
        self._calls.append(Call(index, kernel.name, arguments, bound, nodes))

    def program(self, name: str, phase: str, ranks: int, outputs: Mapping[str, Ref]) -> Program:
        """Plan DDR and return the program."""
        last = len(self._calls) - 1
        for ref in outputs.values():
            if ref.tensor in self._lives:
                self._lives[ref.tensor] = self._lives[ref.tensor][0], last
        plan = self._plan()
        tensors = tuple(replace(one, offset=plan.region(one.name).offset) for one in self._tensors.values())
        listed = tuple(Output(key, r.tensor, r.offset, r.shape, r.strides) for key, r in outputs.items())
        return Program(
            name=name,
            phase=phase,
            ranks=ranks,
            cores=self.target.die.cores,
            target=self.target.name,
            target_sha=self.target.sha,
            tensors=tensors,
            kernels=tuple(self._kernels.values()),
            calls=tuple(self._calls),
            outputs=listed,
            ddr_bytes=plan.bytes,
            ddr_bound=plan.bound,
        )

    def _plan(self) -> MemoryPlan:
        sizes = {one.name: prod(one.shape) * itemsize(one.dtype) for one in self._tensors.values()}
        # inputs differ in size from phase to phase: behind weights and caches, which all phases find at one address
        kept = sorted((_KEPT.index(one.role), one.name) for one in self._tensors.values() if one.role != "temp")
        persistent = [(name, sizes[name]) for _, name in kept]
        lives = [
            Lifetime(one.name, sizes[one.name], *self._lives[one.name])
            for one in self._tensors.values()
            if one.role == "temp"
        ]
        return plan_ddr(persistent, lives, ALIGN, len(self._calls))

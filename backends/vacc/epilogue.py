"""What a linear does with its sums before it stores them: a short list of vector operations and the tables they read.

The order is fixed: the factor of a row (a norm), that of a column (int8 weights), its bias, the product of an activated
gate with the sums of a second weight, the residual stream, the turn of a rotary embedding, the codes of a cache. Sums
stay f32 through all of it and are rounded once, by the store. Instead of being stored, the strips of all ranks may be
added up on the links, each as soon as it is finished: the same bits as a reduction of its own gives, without a way to
DDR and back. Each rank then adds its share of the residual stream, which all of them hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from vacc_opt.backends.vacc.ops import PRIMITIVES
from vacc_opt.backends.vacc.schedule import Param

GATES = {"swiglu": "silu_mul", "geglu": "gelu_mul"}
_FACTORS = {(False, False): "", (True, False): "mul", (False, True): "add", (True, True): "mul_add"}


@dataclass(frozen=True, slots=True)
class Gate:
    """Y is `kind` (`swiglu`, `geglu`) of the sums of W and those of a second `weight` U [N, K], same type as W.

    `scale` SU [N] and `bias` BU [N] belong to U; `tanh` is the form of the GELU.
    """

    kind: str
    weight: Param
    scale: Param | None = None
    bias: Param | None = None
    tanh: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """Rows of `cos` and `sin` [positions, R/2] from run-time scalar `pos` on turn each head."""

    cos: Param
    sin: Param
    interleaved: bool


@dataclass(frozen=True, slots=True)
class Operation:
    """One vector operation on a strip of a tile.

    `ins` and `out` name tables, `acc` and `acc2` (the sums of W and of U), scratch `sum` and `sum2`, or the output `y`.
    """

    kind: str
    ins: tuple[str, ...]
    out: str
    attributes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What is fused into a linear; nothing by default.

    `factor` [M, 1] multiplies the sums of a row, `residual` [M, N] is added to the result. `codes` are scale and zero
    [N] of an int8 result. `head`: Y is [N / head, rows, head], and a tile of columns is one head. `append`: Y is a
    cache, of which the rows from run-time scalar `pos` on are written. `ranks`: of so many the results are added up.
    """

    bias: Param | None = None
    gate: Gate | None = None
    residual: Param | None = None
    factor: Param | None = None
    turn: Turn | None = None
    codes: tuple[Param, Param] | None = None
    append: bool = False
    head: int = 0
    ranks: int = 0

    @property
    def name(self) -> str:
        """What it adds to the name of a kernel."""
        parts = ("row_scale", self.factor), ("bias", self.bias), (self.gate.kind if self.gate else "", self.gate)
        ends = ("residual", self.residual), ("rotary", self.turn), ("append", self.append), ("all_reduce", self.ranks)
        return "".join(f"+{name}" for name, given in (*parts, *ends) if given)

    @property
    def weights(self) -> int:
        """How many weights are multiplied."""
        return 2 if self.gate else 1

    def columns(self, scale: Param | None) -> tuple[Param, ...]:
        """Tables of a number a column, in the order in which they are loaded; `scale` is that of W."""
        gate = (self.gate.scale, self.gate.bias) if self.gate else ()
        return tuple(one for one in (scale, self.bias, *gate, *(self.codes or ())) if one)

    @property
    def rows(self) -> tuple[Param, ...]:
        """Tables of which a tile reads its own rows; those of positions are read from run-time scalar `pos` on."""
        factor = (self.factor,) if self.factor else ()
        return (*factor, *self.positions)

    @property
    def positions(self) -> tuple[Param, ...]:
        """Tables of which a row is a position."""
        return (self.turn.cos, self.turn.sin) if self.turn else ()

    @property
    def whole(self) -> tuple[Param, ...]:
        """Tables of which a tile reads its own rows and columns."""
        return (self.residual,) if self.residual else ()

    @property
    def weavable(self) -> bool:
        """Whether the next rows of X may be loaded between tiles of these: no table tells rows apart."""
        return not (self.head or self.residual or self.factor)

    def operations(self, scaled: bool, rounded: bool) -> tuple[Operation, ...]:
        """The vector operations in order; none for sums that are stored as they are, which `rounded` ones are not."""
        steps: list[Operation] = []
        source = self._factors(steps, "acc", "sum", "s" if scaled else "", self.bias)
        if self.gate:
            scale = "su" if self.gate.scale else ""
            other = self._factors(steps, "acc2", "sum2", scale, self.gate.bias)
            attributes = (("tanh", self.gate.tanh),) if self.gate.kind == "geglu" else ()
            steps.append(Operation(GATES[self.gate.kind], (source, other), "sum", attributes))
            source = "sum"
        if self.residual:
            tables = source, self.residual.name.lower()
            share = Operation("add_share", tables, "sum", (("parts", self.ranks),))
            steps.append(share if self.ranks else Operation("add", tables, "sum"))
            source = "sum"
        if self.turn:
            steps.append(
                Operation("rotary", (source, "cos", "sin"), "sum", (("interleaved", int(self.turn.interleaved)),))
            )
            source = "sum"
        if self.codes:
            steps.append(Operation("quantize", (source, "scale", "zero"), "sum"))
        if not steps:
            return (Operation("cast", ("acc",), "y"),) if rounded or self.ranks else ()
        last = steps.pop()
        return (*steps, Operation(last.kind, last.ins, "y", last.attributes))

    def _factors(self, steps: list[Operation], sums: str, into: str, scale: str, bias: Param | None) -> str:
        """Add the operations on the sums of one weight; gives where they then are."""
        if self.factor:
            steps.append(Operation("mul", (sums, self.factor.name.lower()), into))
            sums = into
        kind = _FACTORS[bool(scale), bias is not None]
        tables = (*((scale,) if scale else ()), *((bias.name.lower(),) if bias else ()))
        if kind:
            steps.append(Operation(kind, (sums, *tables), into))
        return into if kind else sums


PLAIN = Epilogue()


def lane_operations(operations: tuple[Operation, ...]) -> float:
    """Lane operations on an element of the result."""
    return sum(PRIMITIVES[one.kind].cost for one in operations)


def scratches(operations: tuple[Operation, ...]) -> tuple[str, ...]:
    """The f32 strips that operations leave for later ones."""
    return tuple(dict.fromkeys(one.out for one in operations if one.out != "y"))

"""Which file holds a constant of a rank: weights of all phases lie in one, what only one phase has and no checkpoint
holds lies beside it.

Such tables (position ids of a prefill) depend on the lengths that were compiled for; weights then do not, and another
length finds the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vacc_opt.ir.graph import Graph
from vacc_opt.ir.storage import stored_tensors
from vacc_opt.ir.tensor import Literal, TensorExpr
from vacc_opt.ir.weight_files import WeightFile
from vacc_opt.ir.weights import operands


@dataclass(frozen=True)
class PhaseModel:
    """What is stored of a phase: its static graph, its schedule as text, and the constants that the schedule reads."""

    name: str
    graph: Graph
    schedule: str
    schedule_weights: tuple[str, ...]

    def constants(self, rank: int) -> dict[str, TensorExpr]:
        """The constants that graph and schedule read of a file, by name."""
        needed = dict(stored_tensors(self.graph, rank))
        for name in self.schedule_weights:
            const = self.graph.values[name].const
            assert const is not None
            needed[name] = const.rank(rank)
        return needed


def weight_file(rank: int) -> str:
    """The file of the weights of a rank."""
    return f"rank{rank}.safetensors"


def table_file(phase: str, rank: int) -> str:
    """The file of what only one phase has; there is none where that is nothing."""
    return f"{phase}.rank{rank}.safetensors"


@dataclass(frozen=True)
class Stored:
    """The constants of a rank: those of its weight file, tables by phase, and stored names that differ, by phase."""

    rank: int
    weights: dict[str, TensorExpr] = field(default_factory=dict)
    tables: dict[str, dict[str, TensorExpr]] = field(default_factory=dict)
    aliases: dict[str, dict[str, str]] = field(default_factory=dict)

    def files(self, directory: Path) -> list[WeightFile]:
        """What is to be written into ``directory``, the weights first."""
        tables = [WeightFile(directory / table_file(p, self.rank), one) for p, one in self.tables.items() if one]
        return [WeightFile(directory / weight_file(self.rank), self.weights), *tables]

    def places(self, phase: PhaseModel, offsets: Mapping[str, Mapping[str, int]]) -> dict[str, tuple[str, int]]:
        """(file, byte offset) of each constant of a graph; ``offsets`` by file and stored name."""
        found: dict[str, tuple[str, int]] = {}
        for name in stored_tensors(phase.graph, self.rank):
            own = name in self.tables[phase.name]
            file = table_file(phase.name, self.rank) if own else weight_file(self.rank)
            found[name] = (file, offsets[file][name if own else self.aliases[phase.name].get(name, name)])
        return found

    @property
    def expressions(self) -> list[TensorExpr]:
        """All that is stored, in any file."""
        return [expr for held in (self.weights, *self.tables.values()) for expr in held.values()]


def stored_constants(phases: Sequence[PhaseModel], rank: int) -> Stored:
    """What files of a rank hold. A weight whose name another phase uses for other data is stored as ``PHASE.name``."""
    needed = {phase.name: phase.constants(rank) for phase in phases}
    first, *rest = needed.values()
    shared = {
        name for name, expr in first.items() if rest and all(o[name].key == expr.key if name in o else 0 for o in rest)
    }
    stored = Stored(rank)
    for phase, constants in needed.items():
        renamed, tables = stored.aliases.setdefault(phase, {}), stored.tables.setdefault(phase, {})
        for name, expr in sorted(constants.items()):
            if name not in shared and _is_table(expr):
                tables[name] = expr
                continue
            known = stored.weights.get(name)
            if known is not None and known.key != expr.key:
                renamed[name] = _other_name(stored.weights, name, expr) or f"{phase}.{name}"
            stored.weights[renamed.get(name, name)] = expr
    return stored


def _other_name(stored: Mapping[str, TensorExpr], name: str, expr: TensorExpr) -> str | None:
    """Under which name an earlier phase stored the same data, for a name that means several things."""
    return next((n for n, e in stored.items() if n.endswith(f".{name}") and e.key == expr.key), None)


def _is_table(expr: TensorExpr) -> bool:
    """Made of values that the program holds, of no file and of no seed."""
    parts = list(operands(expr))
    return all(map(_is_table, parts)) if parts else isinstance(expr, Literal)

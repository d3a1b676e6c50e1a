"""Where a node comes from: lines of the model, and the passes that made it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Origin:
    """One operation of the source model: module path, ``file:line`` and the operator that was exported."""

    module: str = ""
    source: str = ""
    op: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.module, self.source, self.op) if part)


@dataclass(frozen=True)
class Provenance:
    """The source operations that a node stands for, and the passes that touched it in order."""

    origins: tuple[Origin, ...] = ()
    passes: tuple[str, ...] = ()

    def where(self) -> str:
        """One short place for a message: module and source line of the first origin."""
        return str(self.origins[0]) if self.origins else "(no source)"


def merge(provenances: Iterable[Provenance], by: str = "") -> Provenance:
    """The union of several nodes' provenance, with ``by`` as the pass that merged them."""
    origins: dict[Origin, None] = {}
    passes: dict[str, None] = {}
    for provenance in provenances:
        origins.update(dict.fromkeys(provenance.origins))
        passes.update(dict.fromkeys(provenance.passes))
    if by:
        passes.pop(by, None)
        passes[by] = None
    return Provenance(tuple(origins), tuple(passes))

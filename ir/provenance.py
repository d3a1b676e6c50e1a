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
        if self.module and self.source and self.op:
            return f"{self.module} {self.source} {self.op}"
        return " ".join([part for part in (self.module, self.source, self.op) if part])


@dataclass(frozen=True)
class Provenance:
    """The source operations that a node stands for, and the passes that touched it in order."""

    origins: tuple[Origin, ...] = ()
    passes: tuple[str, ...] = ()

    def where(self) -> str:
        """One short place for a message: module and source line of the first origin."""
        return str(self.origins[0]) if self.origins else "(no source)"


def merge(provenances: Iterable[Provenance], by: str = "") -> Provenance:
    """The union of several nodes' provenance, passes in the order that each knows, then ``by``, which merged them.

    >>> one, other = Provenance((), ("simplify", "fuse-gqa")), Provenance((), ("fuse-rotary", "simplify"))
    >>> merge([one, other], "kv-cache").passes
    ('fuse-rotary', 'simplify', 'fuse-gqa', 'kv-cache')
    """
    provenances = list(provenances)
    if len(provenances) == 1 and provenances[0].passes[-1:] == (by,):
        return provenances[0]
    origins: dict[Origin, None] = {}
    passes: list[str] = []
    for provenance in provenances:
        origins.update(dict.fromkeys(provenance.origins))
        if passes:
            _weave(passes, provenance.passes)
        else:
            passes += provenance.passes
    if by:
        passes = [name for name in passes if name != by] + [by]
    return Provenance(tuple(origins), tuple(passes))


def _weave(passes: list[str], others: tuple[str, ...]) -> None:
    """Put each of the ``others`` that is new before the one that it precedes; where orders differ, the first holds."""
    at = len(passes)
    for name in reversed(others):
        if name in passes:
            at = min(at, passes.index(name))
        else:
            passes.insert(at, name)

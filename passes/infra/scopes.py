"""What a pipeline can nest: fixpoint groups, function bodies and the two phases of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vacc_opt.passes.infra.options import Named, option

if TYPE_CHECKING:
    from vacc_opt.passes.infra.pipeline import Item

CAPACITY = "context"  # what the capacity of the KV buffers is called while it is open


@dataclass(frozen=True)
class Scope(Named):
    """Items in parentheses after a name and its options: ``fixpoint{max_rounds=5}(simplify,fuse-gqa)``."""

    body: tuple[Item, ...] = ()

    def spec(self) -> str:
        """Pipeline text with the nested items."""
        return f"{super().spec()}({','.join(item.spec() for item in self.body)})"


@dataclass(frozen=True)
class Fixpoint(Scope):
    """Repeat the nested passes until a round changes nothing."""

    name: ClassVar[str] = "fixpoint"

    max_rounds: int = option(20, "fail, and name the passes that still change the graph, after so many rounds")


@dataclass(frozen=True)
class Functions(Scope):
    """Run the nested passes on the body of each local function that the model kept, by name."""

    name: ClassVar[str] = "function"

    match: str = option("", "regular expression of function names; empty: all")


@dataclass(frozen=True)
class Phase(Scope):
    """Run the nested passes on the graph at the sizes of one entry point; the graph itself is left behind."""

    batch: int = option(1, "rows of a call")
    context: int | None = option(None, "capacity of the KV buffers in tokens, after `kv-cache{several=true}`")
    label: str = option("", "what the phase is called, where there are several; empty: like the scope")

    @property
    def phase(self) -> str:
        """What the phase is called."""
        return self.label or self.name

    def sizes(self) -> dict[str, int]:
        """What each named size of the interface becomes."""
        return {"batch": self.batch} | ({CAPACITY: self.context} if self.context is not None else {})


@dataclass(frozen=True)
class Prefill(Phase):
    """Run the nested passes on the graph at the sizes of prefill; later scopes of that name continue there."""

    name: ClassVar[str] = "prefill"

    seq: int = option(0, "tokens of a call; needed the first time")

    def sizes(self) -> dict[str, int]:
        """Batch, tokens, and the context where it is open."""
        return {**super().sizes(), "seq": self.seq}


@dataclass(frozen=True)
class Decode(Phase):
    """Run the nested passes on the graph at the sizes of decode; later scopes of that name continue there."""

    name: ClassVar[str] = "decode"

    def sizes(self) -> dict[str, int]:
        """Batch, one token, and the context where it is open."""
        return {**super().sizes(), "seq": 1}


SCOPES: dict[str, type[Scope]] = {cls.name: cls for cls in (Fixpoint, Functions, Prefill, Decode)}

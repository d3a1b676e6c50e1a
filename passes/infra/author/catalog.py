"""What can stand in a pipeline, described from its declaration: passes, presets and scopes."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

import vacc_opt.passes
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.passes.infra.author.examples import Example, doc_of
from vacc_opt.passes.infra.base import Pass
from vacc_opt.passes.infra.options import Named, Option
from vacc_opt.passes.infra.pipeline import dump_pipeline, parse_pipeline
from vacc_opt.passes.infra.presets import PRESETS, Preset
from vacc_opt.passes.infra.registry import ENTRY_POINTS, all_passes
from vacc_opt.passes.infra.scopes import SCOPES, Scope


@dataclass(frozen=True)
class Entry:
    """One thing that pipeline text can name.

    ``what`` is "pass", "preset" or "scope", ``kind`` and ``promise`` are empty but for passes, ``follows`` and
    ``precedes`` name the passes on whose far side it must stand where a pipeline holds both, ``stands_for`` is the text
    of a preset, and ``distribution`` is empty for what vacc-opt brings itself.
    """

    name: str
    what: str
    summary: str
    prose: str
    options: tuple[Option, ...]
    kind: str = ""
    promise: str = ""
    follows: tuple[str, ...] = ()
    precedes: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()
    stands_for: str = ""
    distribution: str = ""


def entries(*, plugins: bool = True) -> dict[str, Entry]:
    """Passes (those of other distributions too, if ``plugins``), then presets, then scopes, each sorted by name.

    Raises:
        UserError: passes of another distribution cannot be loaded.
    """
    found = {name: entry_of(cls) for name, cls in _named().items()}
    return {name: e for name, e in found.items() if plugins or not e.distribution}


def entry(name: str) -> Entry:
    """The entry of that name; raises UserError with the nearest name."""
    named = _named()
    if name not in named:
        raise UserError(f"unknown pass {name!r}", did_you_mean(name, named))
    return entry_of(named[name])


def _named() -> dict[str, type[Named]]:
    return {**all_passes(), **dict(sorted(PRESETS.items())), **dict(sorted(SCOPES.items()))}


def entry_of(cls: type[Named]) -> Entry:
    """The entry of a pass, preset or scope, registered or not."""
    doc = doc_of(cls)
    options = tuple(cls.options())
    if issubclass(cls, Preset):
        text = dump_pipeline(parse_pipeline(cls().text()))  # with no option given
        return Entry(cls.name, "preset", cls.help_line(), doc.prose, options, stands_for=text)
    if issubclass(cls, Scope):
        return Entry(cls.name, "scope", cls.help_line(), doc.prose, options)
    assert issubclass(cls, Pass)
    follows, precedes = _order(cls)
    return Entry(
        name=cls.name,
        what="pass",
        summary=cls.help_line(),
        prose=doc.prose,
        options=options,
        kind=cls.kind.value,
        promise=cls.kind.promise,
        follows=follows,
        precedes=precedes,
        examples=doc.examples,
        distribution=_distribution(cls),
    )


def _order(cls: type[Pass]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What it must follow and precede: by its own word and by that of the others."""
    others = all_passes().values()
    follows = {*cls.runs_after, *(o.name for o in others if cls.name in o.runs_before)}
    precedes = {*cls.runs_before, *(o.name for o in others if cls.name in o.runs_after)}
    return tuple(sorted(follows)), tuple(sorted(precedes))


def _distribution(cls: type[Pass]) -> str:
    if cls.__module__.startswith(f"{vacc_opt.passes.__name__}."):
        return ""
    package = cls.__module__.partition(".")[0]
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.module.partition(".")[0] == package and point.dist is not None:
            return f"{point.dist.name} {point.dist.version}"
    return package

"""Pipeline text such as ``simplify,fixpoint(fuse-gqa{expect=30}),prefill{seq=64}(simplify)`` to items, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.passes.infra.base import Pass
from vacc_opt.passes.infra.options import Named, Option
from vacc_opt.passes.infra.presets import PRESETS, Preset
from vacc_opt.passes.infra.registry import all_passes
from vacc_opt.passes.infra.scopes import SCOPES, Phase, Scope

Item = Pass | Scope

_NAME = re.compile(r"\s*([\w.+-]+)\s*")
_KEY = re.compile(r"\s*([\w-]+)\s*=\s*")
_VALUE = re.compile(r'"((?:[^"\\]|\\.)*)"|([^,}]*)')
_ESCAPED = re.compile(r'\\(["\\])')


def parse_pipeline(text: str) -> list[Item]:
    """Read pipeline text; presets are replaced by what they stand for.

    Raises:
        UserError: with a caret under the place, and the nearest valid name.
    """
    reader = _Reader(text)
    items = reader.items(closing="")
    check_order(items, reader)
    return items


class _Reader:
    """A position in pipeline text, and where each item began."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at: int = 0
        self.places: list[tuple[Named, int]] = []

    def items(self, closing: str) -> list[Item]:
        found: list[Item] = []
        while True:
            found += self._item()
            self._skip_space()
            here = self.text[self.at : self.at + 1]
            if here == closing:
                self.at += len(closing)
                return found
            if here != ",":
                raise self.error(self.at, f"',' or {repr(closing) if closing else 'the end'} is expected here")
            self.at += 1

    def _item(self) -> list[Item]:
        match = _NAME.match(self.text, self.at)
        if match is None:
            raise self.error(self.at, "a pass name is expected here")
        name, start = match[1], match.start(1)
        known: dict[str, type[Named]] = {**all_passes(), **PRESETS, **SCOPES}
        if name not in known:
            raise self.error(start, f"unknown pass {name!r}", did_you_mean(name, known))
        self.at = match.end()
        options = self._options(known[name]) if self._next("{") else {}
        body: tuple[Item, ...] = ()
        if name in SCOPES:
            if not self._next("("):
                raise self.error(self.at, f"'(' is expected here: {name!r} holds passes, as {name}(simplify)")
            body = tuple(self.items(closing=")"))
        return self._made(known[name], options, body, start)

    def _made(self, cls: type[Named], options: dict[str, Any], body: tuple[Item, ...], start: int) -> list[Item]:
        try:
            made = cls(**options, body=body) if issubclass(cls, Scope) else cls(**options)
        except ValueError as error:
            raise self.error(start, str(error)) from error
        if isinstance(made, Preset):
            inner = _Reader(made.text()).items(closing="")
            self.places += [(item, start) for item in flat(inner)]
            return inner
        assert isinstance(made, Pass | Scope)
        self.places.append((made, start))
        return [made]

    def _options(self, cls: type[Named]) -> dict[str, Any]:
        declared = {o.name: o for o in cls.options()}
        given: dict[str, Any] = {}
        while True:
            match = _KEY.match(self.text, self.at)
            if match is None:
                raise self.error(self.at, f"an option of {cls.name!r} is expected here, as name=value")
            key = match[1].replace("-", "_")
            if key not in declared:
                hint = did_you_mean(key, declared) if declared else f"{cls.name!r} takes none"
                raise self.error(match.start(1), f"{cls.name!r} has no option {match[1]!r}", hint)
            value = _VALUE.match(self.text, match.end())
            assert value is not None
            raw = _ESCAPED.sub(r"\1", value[1]) if value[1] is not None else (value[2] or "").strip()
            given[key] = self._convert(raw, declared[key], match.end(), cls.name)
            self.at = value.end()
            if self._next("}"):
                return given
            if not self._next(","):
                raise self.error(self.at, "',' or '}' is expected here")

    def _convert(self, raw: str, option: Option, at: int, name: str) -> Any:
        kinds = {k.strip() for k in option.type.split("|")}
        if raw == "none" and "None" in kinds:
            return None
        try:
            if "bool" in kinds:
                return {"true": True, "false": False}[raw.lower()]
            if "int" in kinds:
                return int(raw)
            if "float" in kinds:
                return float(raw)
        except (ValueError, KeyError):
            wanted = " or ".join(sorted(kinds))
            message = f"option {option.name!r} of {name!r} takes {wanted}, not {raw!r}"
            raise self.error(at, message, option.help) from None
        return raw

    def _next(self, char: str) -> bool:
        self._skip_space()
        if self.text[self.at : self.at + 1] != char:
            return False
        self.at += 1
        return True

    def _skip_space(self) -> None:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1

    def error(self, at: int, message: str, hint: str | None = None) -> UserError:
        caret = f"{self.text}\n  {' ' * at}^"
        return UserError(f"pipeline, column {at + 1}: {message}", caret if hint is None else f"{caret} {hint}")


def flat(items: Iterable[Item]) -> Iterator[Item]:
    """All passes and scopes, outer before inner, in order."""
    for item in items:
        yield item
        if isinstance(item, Scope):
            yield from flat(item.body)


def check_order(items: Sequence[Item], reader: _Reader | None = None) -> None:
    """Refuse a pass on the wrong side of another, and a pass on a graph that a phase was already taken from.

    Raises:
        UserError: with a caret under the place when ``reader`` has read the items from text.
    """
    where = {id(item): at for item, at in reader.places} if reader is not None else {}

    def wrong(item: Item, message: str, hint: str) -> UserError:
        return reader.error(where.get(id(item), 0), message, hint) if reader is not None else UserError(message, hint)

    seen: dict[str, Pass] = {}
    for item in flat(items):
        if not isinstance(item, Pass):
            continue
        for other in item.runs_before:
            if other in seen:
                raise wrong(item, f"{item.name!r} must come before {other!r}", f"move it before {other}")
        for earlier in seen.values():
            if item.name in earlier.runs_after:
                raise wrong(item, f"{earlier.name!r} must come after {item.name!r}", f"move {earlier.name} behind")
        seen[item.name] = item
    phase: Phase | None = None
    for item in items:
        if isinstance(item, Phase):
            phase = phase or item
        elif phase is not None:
            hint = f"put it before {phase.name}(...), or inside"
            raise wrong(item, f"{item.name!r} runs on a graph that {phase.name!r} was already taken from", hint)


def dump_pipeline(items: Sequence[Item]) -> str:
    """The text that :func:`parse_pipeline` reads back; presets appear as what they stand for."""
    return ",".join(item.spec() for item in items)

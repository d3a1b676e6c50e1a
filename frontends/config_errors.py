"""Turn a pydantic validation error into one line: file, line, dotted key, what is wrong; and a hint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from vacc_opt.ir.errors import UserError, did_you_mean

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Locations:
    """Lines of the keys of a file, and the keys that the command line set instead."""

    file: str
    lines: dict[Key, int]
    overridden: dict[Key, str] = field(default_factory=dict)

    def where(self, key: Key) -> str:
        """``file:line`` of a key or of the nearest section above it, or ``-D key=value``."""
        prefixes = [key[:length] for length in range(len(key), 0, -1)]
        for prefix in prefixes:
            if prefix in self.overridden:
                return f"-D {self.overridden[prefix]}"
        return next((f"{self.file}:{self.lines[p]}" for p in prefixes if p in self.lines), self.file)


def describe_error(error: ValidationError, model: type[BaseModel], locations: Locations) -> UserError:
    """The first mistake (by line) as a UserError; the number of further ones is in the hint."""
    first, *others = describe_errors(error, model, locations)
    hint = first.hint
    if others:
        hint = (
            f"{hint}; {len(others)} more to correct after this" if hint else f"{len(others)} more to correct after this"
        )
    return UserError(first.message, hint)


def describe_errors(error: ValidationError, model: type[BaseModel], locations: Locations) -> list[UserError]:
    """Every mistake as a UserError, one a key, by line."""
    details = sorted(
        error.errors(include_url=False), key=lambda d: (_line(_clean(d["loc"]), locations), d["type"] == "missing")
    )
    found: dict[Key, UserError] = {}
    for detail in details:
        key = _clean(detail["loc"])
        if key not in found:
            message, hint = _explain(detail, key, model)
            found[key] = UserError(f"{locations.where(key)}: {message}", hint)
    return list(found.values())


def _line(key: Key, locations: Locations) -> int:
    lines = [locations.lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in locations.lines]
    return lines[0] if lines else 0


def _clean(loc: tuple[str | int, ...]) -> Key:
    """Without the parts that pydantic adds for the members of a union, such as ``list[str]``."""
    unions = {"bool", "int", "str", "float"}
    return tuple(p for p in loc if not (isinstance(p, str) and (p in unions or "[" in p)))


def dotted(key: Key) -> str:
    """``frontend.shape.input_ids[1][0]``."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text


def _explain(detail: Any, key: Key, model: type[BaseModel]) -> tuple[str, str | None]:
    name, kind, given = dotted(key), detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        section = _section(model, key[:-1])
        choices = [f.alias or n for n, f in section.model_fields.items()] if section else []
        return f"unknown key {name}", _elsewhere(model, str(key[-1])) or did_you_mean(str(key[-1]), choices)
    if kind == "missing":
        return f"{name} is missing", f"add `{key[-1]}:`" + (f" under {dotted(key[:-1])}" if key[:-1] else "")
    if kind == "literal_error":
        section = _section(model, key[:-1])
        choices = [str(c) for c in _literals(section.model_fields[str(key[-1])].annotation)] if section else []
        return f"{name} = {given!r} is not a choice", did_you_mean(str(given), choices)
    if kind == "value_error":
        text = str(detail["ctx"]["error"])
        what, _, hint = text.partition("; ")
        return (f"{name}: {what}" if name else what), hint or None
    if kind == "model_type":
        return f"{name} = {given!r} is not a section", "its keys go on the lines below it, indented"
    return f"{name} = {given!r}: {detail['msg'][:1].lower()}{detail['msg'][1:]}", None


def _elsewhere(model: type[BaseModel], name: str, above: str = "") -> str | None:
    """Where a key belongs that is right but stands in another section."""
    for field_name, info in model.model_fields.items():
        if name == (info.alias or field_name) and above:
            return f"`{name}` belongs under {above}"
        section = _section(model, (info.alias or field_name,))
        if section and (found := _elsewhere(section, name, f"{above}.{field_name}".lstrip("."))):
            return found
    return None


def _section(model: type[BaseModel], key: Key) -> type[BaseModel] | None:
    """The model class of the section at ``key``."""
    found: type[BaseModel] = model
    for part in key:
        fields = {(f.alias or n): f for n, f in found.model_fields.items()}
        annotation = fields[str(part)].annotation if str(part) in fields else None
        classes = [c for c in (annotation, *get_args(annotation)) if isinstance(c, type) and issubclass(c, BaseModel)]
        if not classes:
            return None
        found = classes[0]
    return found


def _literals(annotation: Any) -> list[Any]:
    found: list[Any] = []
    for argument in get_args(annotation):
        found += _literals(argument) if get_args(argument) else ([argument] if isinstance(argument, str | int) else [])
    return found

"""Options declared once, as fields of a frozen dataclass: they feed pipeline text, CLI, documentation and errors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar


def option(default: Any, help: str) -> Any:
    """A dataclass field whose ``help`` feeds the CLI, the documentation and the error messages."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Option:
    """One declared option."""

    name: str
    type: str
    default: object
    help: str


@dataclass(frozen=True)
class Named:
    """Something with a name and options that pipeline text can spell: a pass, a scope, a preset."""

    name: ClassVar[str]

    @classmethod
    def options(cls) -> list[Option]:
        """The declared options in order."""
        return [
            Option(f.name, str(f.type), f.default, f.metadata["help"])
            for f in dataclasses.fields(cls)
            if "help" in f.metadata
        ]

    @classmethod
    def help_line(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    def spec(self) -> str:
        """Pipeline text, with the options that differ from their defaults."""
        given = [(o.name, getattr(self, o.name)) for o in self.options() if getattr(self, o.name) != o.default]
        if not given:
            return self.name
        inner = ",".join(f"{name}={_text(value)}" for name, value in given)
        return f"{self.name}{{{inner}}}"


def _text(value: object) -> str:
    if isinstance(value, str) and (not value or value == "none" or value.strip() != value or set(value) & set(',}{"')):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)

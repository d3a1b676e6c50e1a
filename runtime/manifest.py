"""What a manifest holds, as declared models: an artifact opens without them, and `vacc-opt verify` holds it to them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_DIGEST = r"^[0-9a-f]{64}$"


class _Part(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, frozen=True, extra="allow")


class FileEntry(_Part):
    """A file beside the manifest; a weight file, which holds a digest a tensor, has that of its header."""

    bytes: int = Field(ge=0)
    sha256: str | None = Field(None, pattern=_DIGEST)
    header_sha256: str | None = Field(None, pattern=_DIGEST)

    @model_validator(mode="after")
    def _has_one_digest(self) -> FileEntry:
        if (self.sha256 is None) == (self.header_sha256 is None):
            raise ValueError("has not one digest")
        return self


class PhaseEntry(_Part):
    """Types of inputs and outputs by name, and the stored names of the constants that are stored under another."""

    inputs: dict[str, str]
    outputs: dict[str, str]
    weight_names: dict[str, str]


class EntryPointEntry(_Part):
    """Sizes of a phase, in tokens."""

    kind: Literal["prefill", "decode"]
    tokens: int = Field(ge=1)
    context: int = Field(ge=1)


class Manifest(_Part):
    """All of manifest.json; ``made`` is :class:`ModelFacts`, ``config`` the configuration without its workspace."""

    format: Literal["vacc-artifact"]
    format_version: int
    vacc_opt: str
    name: str
    ranks: int = Field(ge=1)
    phases: dict[str, PhaseEntry] = Field(min_length=1)
    entry_points: dict[str, EntryPointEntry]
    model: dict[str, str]
    made: dict[str, Any]
    config: dict[str, Any]
    pipeline: str
    files: dict[str, FileEntry]

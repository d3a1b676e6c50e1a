"""What a manifest holds, as declared models: an artifact opens without them, and `vacc-opt verify` holds it to them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Part(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, frozen=True, extra="allow")


class FileEntry(_Part):
    """A file beside the manifest, with the digest of its bytes, or of the header that has those of the tensors."""

    bytes: int = Field(ge=0)
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    header_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")


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

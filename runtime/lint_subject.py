"""What ``lint`` looks at: a configuration as it stands in its file, and the headers of the checkpoint that it names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vacc_opt.frontends.checkpoint import Checkpoint, open_checkpoint, resolve_path
from vacc_opt.frontends.vamc_config import read_config
from vacc_opt.ir.errors import UserError


class Subject:
    """A configuration file and the checkpoint that it names, as far as they can be read; no weight is."""

    def __init__(self, file: Path, overrides: Sequence[str] = ()) -> None:
        """Raises UserError for a file that is missing or no YAML mapping."""
        self.file = file
        self.data, self.locations = read_config(file, overrides)

    def get(self, dotted: str) -> Any:
        """The value of a key, None when it is not there."""
        value: Any = self.data
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def at(self, dotted: str) -> str:
        """``FILE:LINE: KEY`` of a key."""
        return f"{self.locations.where(tuple(dotted.split('.')))}: {dotted}"

    @cached_property
    def opened(self) -> Checkpoint | UserError | None:
        """The checkpoint, or why it cannot be opened; None when no Hugging Face model is named."""
        name = self.get("frontend.checkpoint")
        if not isinstance(name, str) or self.get("frontend.type") == "onnx":
            return None
        try:
            return open_checkpoint(name)
        except UserError as error:
            return error

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint if it can be opened."""
        return self.opened if isinstance(self.opened, Checkpoint) else None

    @cached_property
    def directory(self) -> Path | None:
        """The directory of the checkpoint, also of one that is damaged."""
        try:
            found = resolve_path(str(self.get("frontend.checkpoint")))
        except UserError:
            return None
        return found if found.is_dir() else None

    @cached_property
    def model(self) -> Mapping[str, Any]:
        """config.json of the checkpoint; empty when there is none that can be read."""
        if self.checkpoint is not None:
            return self.checkpoint.config
        return read_object(self.directory / "config.json") if self.directory is not None else {}

    def number(self, *names: str) -> int | None:
        """The first of the entries of config.json that is a whole number."""
        return next((v for n in names if isinstance(v := self.model.get(n), int) and not isinstance(v, bool)), None)

    @property
    def heads(self) -> int | None:
        """Query heads that config.json gives."""
        return self.number("num_attention_heads", "n_head")

    @property
    def kv_heads(self) -> int | None:
        """KV heads that config.json gives; as many as query heads when it is silent."""
        if self.model.get("multi_query") is True and not self.model.get("new_decoder_architecture"):
            return 1
        return self.number("num_key_value_heads", "multi_query_group_num", "num_kv_heads") or self.heads

    @property
    def json_file(self) -> str:
        """What to call config.json."""
        return (
            str(self.directory / "config.json") if self.directory is not None else str(self.get("frontend.checkpoint"))
        )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object in a file; empty when there is none that can be read."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}

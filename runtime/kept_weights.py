"""Weight files that an earlier artifact has already: a hard link in place of the work.

Nothing is stored twice: the cache knows only where files lie, by what they hold. One that was changed, moved or removed
since is not used. Artifacts then share a file, as a copy on one disk would; `vacc-opt verify` checks each of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.weight_check import header_digest
from vacc_opt.ir.weight_files import WeightFile
from vacc_opt.ir.weights import stored_parts
from vacc_opt.runtime.cache import Cache, key_of
from vacc_opt.runtime.stamps import stamp

_PLACES = 8  # that one content is known to lie at


@dataclass
class KeptWeights:
    """What the cache knows of weight files; ``linked`` are the names of those that were taken from elsewhere."""

    cache: Cache
    linked: list[str] = field(default_factory=list)
    _keys: dict[str, str] = field(default_factory=dict)
    _stamps: dict[str, str] = field(default_factory=dict)

    def take(self, files: Sequence[WeightFile]) -> list[WeightFile]:
        """Link the files that lie somewhere already to their paths; gives those that do not."""
        left: list[WeightFile] = []
        for file in files:
            key = self._keys[file.path.name] = self._key(file)
            if any(_linked(place, file.path) for place in self._places(key)):
                self.linked.append(file.path.name)
            else:
                left.append(file)
        return left

    def remember(self, directory: Path) -> None:
        """Let the cache know that the files of :meth:`take` are in ``directory`` now."""
        for name, key in self._keys.items():
            path = (directory / name).absolute()
            facts = path.stat()
            here = {
                "path": str(path), "bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns, "header": header_digest(path),
            }  # fmt: skip
            others = [
                place for place in self._places(key) if place["path"] != str(path) and Path(place["path"]).is_file()
            ]
            self.cache.put("weights", key, json.dumps([here, *others][:_PLACES]).encode())

    def _places(self, key: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.cache.get("weights", key) or b"[]")
        return found

    def _key(self, file: WeightFile) -> str:
        """What the bytes of a file depend on: names and expressions, and the files behind these as they are now."""
        sources = sorted({part.file for expr in file.tensors.values() for part in stored_parts(expr)})
        for source in sources:
            if source not in self._stamps:
                self._stamps[source] = stamp(Path(source))
        tensors = [(name, expr.key) for name, expr in sorted(file.tensors.items())]
        return key_of("weights", tensors, [(name, self._stamps[name]) for name in sources])


def _linked(place: dict[str, Any], path: Path) -> bool:
    known = Path(place["path"])
    with contextlib.suppress(OSError, UserError):
        facts = known.stat()
        if (facts.st_size, facts.st_mtime_ns) != (place["bytes"], place["mtime_ns"]):
            return False
        if header_digest(known) != place["header"]:
            return False
        try:
            os.link(known, path)
        except OSError:  # another file system, or one without links
            shutil.copyfile(known, path)
        return True
    return False

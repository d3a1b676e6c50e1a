"""Results of steps, kept under what decides them: ``WORKSPACE/.cache/KIND/KEY``, used again when all of that is equal.

An entry is written beside its place and renamed, and begins with its own digest: one that is damaged is made again. Of
each kind the last ones used are kept; `rm -r WORKSPACE/.cache` empties it all and loses nothing but time. A workspace
that cannot be written has no cache, and is no failure here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vacc_opt.backends.vacc import Program, Target, lower, verified_time
from vacc_opt.backends.vacc.search import remembering
from vacc_opt.backends.vacc.timing import Timing
from vacc_opt.backends.vacc.timing_json import timing_from_json, timing_to_json, without_records
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Graph
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.runtime.files import CACHE, sha256
from vacc_opt.runtime.stamps import program_stamp, stamp

KEPT = 64  # entries of a kind; the text of a schedule or graph of a large model has a few megabytes
_MANY = {"tiles": 4096}  # entries of kinds that are small


@dataclass(frozen=True)
class Cache:
    """A directory of entries; without ``keeps`` it gives what is there and takes nothing."""

    path: Path
    keeps: bool = True

    @staticmethod
    def of(workspace: str | os.PathLike[str], *, keeps: bool = True) -> Cache:
        """The cache of a workspace."""
        return Cache(Path(workspace) / CACHE, keeps)

    def get(self, kind: str, key: str) -> bytes | None:
        """What was kept; None when nothing was, or when it is damaged."""
        file = self.path / kind / key
        try:
            digest, _, data = file.read_bytes().partition(b"\n")
            if hashlib.sha256(data).hexdigest().encode() != digest:
                return None
            if self.keeps:
                os.utime(file)  # it was used
        except OSError:
            return None
        return data

    def put(self, kind: str, key: str, data: bytes) -> None:
        """Keep an entry, and forget the one of its kind that was not used for longest when there are many."""
        if not self.keeps:
            return
        with contextlib.suppress(OSError):
            folder = self.path / kind
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", dir=folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
                os.replace(name, folder / key)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            entries = sorted(folder.iterdir(), key=lambda entry: entry.stat().st_mtime_ns)
            for old in entries[: -_MANY.get(kind, KEPT)]:
                old.unlink(missing_ok=True)


def key_of(*parts: object) -> str:
    """A key over parts whose ``repr`` says all of them, and over this program."""
    return hashlib.sha256(repr((program_stamp(), *parts)).encode()).hexdigest()[:32]


def kept_graph(cache: Cache, inputs: Mapping[str, Any], make: Callable[[], Graph]) -> tuple[Graph, bool]:
    """The graph that ``inputs`` decide, and whether it was kept; a damaged entry is made again."""
    key = key_of("export", sorted(inputs.items()))
    data = cache.get("export", key)
    if data is not None:
        with contextlib.suppress(UserError):
            return from_text(data.decode()), True
    graph = make()
    cache.put("export", key, to_text(graph).encode())
    return graph, False


def kept_schedule(cache: Cache, graph: Graph, target: Target, phase: str) -> tuple[Program, Timing, bool]:
    """The verified program of a phase on a target, its timing without records, and whether both were kept."""
    key = key_of("schedule", phase, target.sha, to_text(graph))
    data = cache.get("schedule", key)
    if data is not None:
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
            timing, _, text = data.decode().partition("\n")
            return Program.from_text(text), timing_from_json(json.loads(timing), target), True
    with remembering(_Searches(cache)):
        program = lower(graph, target, phase=phase)
    timed = without_records(verified_time(program, target))
    cache.put("schedule", key, f"{json.dumps(timing_to_json(timed))}\n{program.to_text()}".encode())
    return program, timed, False


@dataclass(frozen=True)
class _Searches:
    """Tiles that were searched, by signature: another model or length with the same linears does not search again."""

    cache: Cache

    def get(self, signature: str) -> bytes | None:
        """What a search of this program found."""
        return self.cache.get("tiles", key_of("tiles", signature))

    def put(self, signature: str, found: bytes) -> None:
        """Keep it."""
        self.cache.put("tiles", key_of("tiles", signature), found)


def kept_sha256(cache: Cache, file: Path) -> str:
    """SHA-256 of a file; of a large one that is as it was, without reading it again."""
    key = key_of("digest", stamp(file))
    data = cache.get("digest", key)
    if data is None:
        data = sha256(file).encode()
        cache.put("digest", key, data)
    return data.decode()

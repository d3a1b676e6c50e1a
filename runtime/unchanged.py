"""An artifact that is what its configuration would make: found by the stamps of all inputs, without the work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vacc_opt.backends.vacc import Target, target_file
from vacc_opt.frontends.checkpoint import resolve_path
from vacc_opt.ir.errors import UserError
from vacc_opt.runtime.artifact import MANIFEST, Artifact, open_artifact
from vacc_opt.runtime.cache import Cache, key_of
from vacc_opt.runtime.files import sha256
from vacc_opt.runtime.models import TEXT_SUFFIX
from vacc_opt.runtime.plan import Plan
from vacc_opt.runtime.stamps import checkpoint_stamp, stamp

_KIND = "artifact"


@dataclass(frozen=True)
class Unchanged:
    """The artifact as it stands, and the names of the steps that made it."""

    artifact: Artifact
    steps: tuple[str, ...]


def unchanged_artifact(plan: Plan, cache: Cache, key: str) -> Unchanged | None:
    """The artifact at the plan's place, when it was made of inputs of this key and is whole; else None.

    Digests of all files but the data of weights are checked; of those the size and the time of change.
    """
    data = cache.get(_KIND, key)
    frontend = plan.config.frontend
    # that code may depend on anything; a text names files of weights, which its stamp does not cover
    if data is None or frontend.trust_remote_code or frontend.checkpoint.endswith(TEXT_SUFFIX):
        return None
    kept = json.loads(data)
    try:
        artifact = open_artifact(plan.output)
        if sha256(plan.output / MANIFEST) != kept["manifest"] or _times(artifact) != kept["times"]:
            return None
    except (UserError, OSError):
        return None
    return Unchanged(artifact, tuple(kept["steps"]))


def remember_artifact(plan: Plan, cache: Cache, key: str, steps: Sequence[str]) -> None:
    """Keep what :func:`unchanged_artifact` needs of an artifact that was just written."""
    artifact = open_artifact(plan.output)
    kept = {"manifest": sha256(plan.output / MANIFEST), "times": _times(artifact), "steps": list(steps)}
    cache.put(_KIND, key, json.dumps(kept).encode())


def _times(artifact: Artifact) -> dict[str, int]:
    return {name: (artifact.path / name).stat().st_mtime_ns for name in artifact.files}


def artifact_key(plan: Plan, target: Target) -> str:
    """What decides the bytes of the plan's artifact for a machine, and its place."""
    config = plan.config
    scales, data = plan.kv_scales, config.dataset
    return key_of(
        str(plan.output.absolute()),
        config.model_dump(mode="json", exclude={"workspace"}),
        checkpoint_stamp(resolve_path(config.frontend.checkpoint)),
        stamp(target_file(config.backend.target)),
        target.sha,
        stamp(scales) if scales is not None else "",
        stamp(Path(data.path), deep=True) if data is not None else "",
    )

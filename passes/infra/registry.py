"""The registry: a pass is known by its command-line name once its module is imported."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TypeVar

import vacc_opt.passes
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.passes.infra.base import Pass

_PASSES: dict[str, type[Pass]] = {}
_P = TypeVar("_P", bound=type[Pass])
GROUPS = ("simplify", "fuse", "quantize", "shard", "legalize")


def register(cls: _P) -> _P:
    """Class decorator: file ``fuse_gqa.py`` holds class ``FuseGqa`` named ``fuse-gqa``."""
    if cls.name in _PASSES:
        raise ValueError(f"two passes are called {cls.name!r}")
    _PASSES[cls.name] = cls
    return cls


@cache
def _load() -> None:
    for group in GROUPS:
        package = importlib.import_module(f"{vacc_opt.passes.__name__}.{group}")
        for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
            importlib.import_module(f"{package.__name__}.{module}")


def all_passes() -> dict[str, type[Pass]]:
    """Every registered pass by name, sorted."""
    _load()
    return dict(sorted(_PASSES.items()))


def get_pass(name: str) -> type[Pass]:
    """The pass of that name; raises UserError with the nearest name."""
    passes = all_passes()
    if name not in passes:
        raise UserError(f"unknown pass {name!r}", did_you_mean(name, passes))
    return passes[name]

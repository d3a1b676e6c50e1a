"""The registry: a pass is known by its name once its module is imported; other distributions add theirs."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from functools import cache
from typing import TypeVar

import vacc_opt.passes
from vacc_opt.ir.errors import UserError
from vacc_opt.passes.infra.base import Pass

_PASSES: dict[str, type[Pass]] = {}
_P = TypeVar("_P", bound=type[Pass])
GROUPS = ("simplify", "fuse", "quantize", "shard", "legalize")
ENTRY_POINTS = "vacc_opt.passes"


def register(cls: _P) -> _P:
    """Class decorator: file ``fuse_gqa.py`` holds class ``FuseGqa`` named ``fuse-gqa``."""
    known = _PASSES.setdefault(cls.name, cls)
    if known is not cls:
        raise ValueError(f"two passes are called {cls.name!r}: {_place(known)} and {_place(cls)}")
    return cls


def _place(cls: type[Pass]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def _load() -> None:
    for group in GROUPS:
        package = importlib.import_module(f"{vacc_opt.passes.__name__}.{group}")
        for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
            importlib.import_module(f"{package.__name__}.{module}")
    for point in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda p: p.name):
        _load_plugin(point)


def _load_plugin(point: importlib.metadata.EntryPoint) -> None:
    """Import what an entry point names: a module that registers passes, or a pass, which is registered."""
    try:
        loaded = point.load()
        if isinstance(loaded, type) and issubclass(loaded, Pass):
            register(loaded)
    except Exception as error:
        owner = point.dist.name if point.dist is not None else "a distribution"
        raise UserError(
            f"{owner}: its passes {point.value!r} cannot be loaded: {type(error).__name__}: {error}",
            f"repair or uninstall {owner}",
        ) from error


def all_passes() -> dict[str, type[Pass]]:
    """Every registered pass by name, sorted.

    Raises:
        UserError: passes of another distribution cannot be loaded.
    """
    _load()
    return dict(sorted(_PASSES.items()))

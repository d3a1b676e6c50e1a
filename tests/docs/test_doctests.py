"""The examples in docstrings run as printed."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

ROOMS = ("ir", "passes", "frontends", "backends", "calibration", "runtime", "cli")


def modules() -> list[str]:
    found: list[str] = []
    for room in ROOMS:
        package = importlib.import_module(f"vacc_opt.{room}")
        found += [m.name for m in pkgutil.walk_packages(package.__path__, f"vacc_opt.{room}.")]
    return [name for name in found if not name.endswith("worker")]


@pytest.mark.parametrize("name", modules())
def test_doctest_examples_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0

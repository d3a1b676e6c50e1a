"""The machine of a command: a target with the numbers of `--what-if`, which make another machine of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vacc_opt.ir.errors import UserError

if TYPE_CHECKING:
    from vacc_opt.backends.vacc import Target


def machine(target: str, what_if: Sequence[str] = ()) -> Target:
    """A shipped target or a YAML file, with the numbers of `what_if`: see :func:`changed`."""
    from vacc_opt.backends.vacc import load_target

    return changed(load_target(target), what_if)


def changed(target: Target, what_if: Sequence[str]) -> Target:
    """A target with the numbers of `what_if`, each `KEY=VALUE`: its name and hash tell it from the target itself.

    A key is the dotted path of a number, or the end of one: `ddr.bytes_per_cycle=200`, `sram.bytes=2MiB`. Raises
    UserError.
    """
    from vacc_opt.backends.vacc.target import overlay, parse_bytes

    changes: dict[str, Any] = {}
    for text in what_if:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not (key and equals and value):
            raise UserError(f"--what-if {text}: no KEY=VALUE", "such as --what-if ddr.bytes_per_cycle=200")
        if key in changes:
            raise UserError(f"--what-if {key} is given twice", "a number has one value; `vacc-opt sweep` tries several")
        changes[key] = parse_bytes(value)
    return overlay(target, changes)

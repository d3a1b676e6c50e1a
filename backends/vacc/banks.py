"""Banks of the SRAM: which buffers may share one, and where a kernel puts its buffers.

A bank is one of equal parts of the SRAM, one after the other. The engines of a buffer are its producer and its
consumers. Two buffers may have bytes in one bank only where they have the same engines: then no engine meets another
one in a bank but those with which it fills and uses the same rings. Slots of one ring, or of rings of the same engines,
may share a bank; what that costs is not modelled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from vacc_opt.backends.vacc.schedule import Buffer
from vacc_opt.backends.vacc.target import Sram
from vacc_opt.ir.errors import UserError


def laid_out(family: str, buffers: Sequence[Buffer], sram: Sram | None) -> tuple[Buffer, ...]:
    """The buffers, each with its offset: one after the other, or with banks those of the same engines.

    These begin at a bank of their own; the order is that in which each was declared first. Raises UserError where there
    are too few banks for kernel `family`.
    """
    groups: dict[frozenset[str], list[int]] = {}
    for index, one in enumerate(buffers):
        groups.setdefault(one.engines if sram and sram.banks else frozenset(), []).append(index)
    if sram:
        enough_banks(family, len(groups), sram)
    placed, end = list(buffers), 0
    for group in groups.values():
        end = sram.whole_banks(end) if sram else end
        for index in group:
            placed[index] = replace(buffers[index], offset=end)
            end = placed[index].end
    return tuple(placed)


def enough_banks(family: str, groups: int, sram: Sram) -> None:
    """Raise UserError where kernel `family`, with buffers of so many different sets of engines, needs more banks."""
    if sram.banks is not None and groups > sram.banks:
        raise UserError(
            f"kernel {family} has buffers of {groups} different sets of engines, but core.sram.banks = {sram.banks}",
            "buffers that different engines use need banks of their own: state more banks",
        )


def shared_banks(buffers: Sequence[Buffer], sram: Sram) -> Iterator[str]:
    """What is wrong with each two buffers of different engines that have bytes in one bank: the first such bank."""
    size = sram.bank_bytes
    if size is None:
        return
    spans = [(one, range(one.offset // size, -(-one.end // size))) for one in buffers]
    for index, (one, banks) in enumerate(spans):
        for other, others in spans[index + 1 :]:
            common = range(max(banks.start, others.start), min(banks.stop, others.stop))
            if common and one.engines != other.engines:
                yield f"{_told(one)} and {_told(other)} share bank {common.start}"


def _told(buffer: Buffer) -> str:
    """A buffer with its engines, as its line in the text has them."""
    to = f" -> {', '.join(buffer.consumers)}" if buffer.is_ring else ""
    return f"buffer `{buffer.name}` ({buffer.producer}{to})"

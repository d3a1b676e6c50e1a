"""What is said while bytes move: how many of how many, how fast, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable

from vacc_opt.runtime.models import format_bytes

_SPAN = 5.0  # seconds over which the speed is measured


class ByteProgress:
    """Tells a listener of bytes that are written or read; called with (bytes done, bytes in all)."""

    def __init__(
        self, running: Callable[[str, int, int | None], None], what: str, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """``running`` hears (text, done, of), the text beginning with ``what``."""
        self._running, self._what, self._clock = running, what, clock
        self._seen: list[tuple[float, int]] = [(clock(), 0)]

    def __call__(self, done: int, of: int) -> None:
        """Say how far it is."""
        now = self._clock()
        if now - self._seen[-1][0] > _SPAN / 50:
            self._seen.append((now, done))
            while self._seen[1][0] < now - _SPAN:
                self._seen.pop(0)
        then, before = self._seen[0]
        speed = (done - before) / (now - then) if now > then else 0.0
        parts = [f"{format_bytes(done)} of {format_bytes(of)}"]
        if speed > 0:
            parts += [f"{format_bytes(speed)}/s", f"{(of - done) / speed:.0f} s left"]
        self._running(f"{self._what}: {', '.join(parts)}", done, of)

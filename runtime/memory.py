"""The peak memory of this process and everything it started, sampled from /proc."""

from __future__ import annotations

import os
import resource
import sys
import threading
from pathlib import Path
from types import TracebackType

_INTERVAL = 0.05  # seconds; an allocation that lives shorter than this may be missed
_PAGE = os.sysconf("SC_PAGE_SIZE")


def tree_bytes(pid: int) -> int:
    """Resident bytes of a process and its descendants; shared pages count once for each process that maps them."""
    total = 0
    pending = [pid]
    while pending:
        one = pending.pop()
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * _PAGE
            for task in Path(f"/proc/{one}/task").iterdir():
                pending += map(int, (task / "children").read_text().split())
        except (OSError, IndexError, ValueError):
            continue  # the process ended while we looked
    return total


class PeakMemory:
    """Watches the process tree while its block runs; ``bytes`` is the largest sum seen."""

    def __init__(self) -> None:
        self.bytes: int = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        if sys.platform == "linux":
            self.bytes = max(self.bytes, tree_bytes(os.getpid()))
        else:  # without /proc: the peaks of this process and of its largest child, which may not coincide
            peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            self.bytes = max(self.bytes, sum(peaks) * (1 if sys.platform == "darwin" else 1024))

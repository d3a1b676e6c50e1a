"""The peak memory of this process and everything it started, sampled from /proc."""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_INTERVAL = 0.05  # seconds; an allocation that lives shorter than this may be missed
_PAGE = os.sysconf("SC_PAGE_SIZE")


def tree_bytes(pid: int, most: int = 0) -> int:
    """Bytes of memory of a process and its descendants; pages that several of them map count once among them.

    Resident pages of all of them are quick to count, but what they share counts for each: only where that sum exceeds
    ``most`` are shared pages told apart (proportional set size, /proc/PID/smaps_rollup).
    """
    processes = list(_tree(pid))
    resident = sum(map(_resident, processes))
    return resident if resident <= most else sum(map(_proportional, processes))


def _tree(pid: int) -> Iterator[int]:
    pending = [pid]
    while pending:
        one = pending.pop()
        yield one
        with suppress(OSError):  # the process ended while we looked
            for task in Path(f"/proc/{one}/task").iterdir():
                pending += map(int, (task / "children").read_text().split())


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):  # an ended process, or a kernel that does not tell
        return _resident(pid)


class PeakMemory:
    """Watches the process tree while its block runs; ``bytes`` is the most memory seen, shared pages counted once."""

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
            self.bytes = max(self.bytes, tree_bytes(os.getpid(), self.bytes))
        else:  # without /proc: the peaks of this process and of its largest child, which may not coincide
            peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            self.bytes = max(self.bytes, sum(peaks) * (1 if sys.platform == "darwin" else 1024))

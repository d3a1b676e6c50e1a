"""Whether the other ranks still live: every rank counts in a store that all reach, and reads the others' counts.

A rank that dies by a signal cannot say so, and what its neighbours see of it (a closed connection, or an exchange that
never ends) does not name it. The count does: it stands still.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

INTERVAL = 1.0  # seconds between two counts
SILENCE = 10.0  # seconds without a new count after which a rank is given up: a busy machine stalls for less
ARRIVAL = 120.0  # seconds in which every rank must have come
LOST, INTERRUPTED = 1, 130
_DONE, _FAILED, _ASKED = "done", "failed ", "asked "


class Watch:
    """Counts for one rank and watches the others; ends this process when one is lost, and says which.

    Args:
        store: a ``torch.distributed`` store of this thread alone: a store waits for one answer at a time.
        rank: which rank this is, of ``ranks``.
        end: ends the process with an exit code, whatever its other threads wait for.
    """

    def __init__(self, store: Any, rank: int, ranks: int, end: Callable[[int], None] = os._exit) -> None:
        self._store, self._rank, self._ranks, self._end = store, rank, ranks, end
        self._keys = [f"count/{r}" for r in range(ranks)]
        self._count = 0
        self._asked: float | None = None  # when a signal asked this rank to end
        self._stopped = threading.Event()
        self._ended = threading.Event()
        now = time.monotonic()
        self._seen = [("", now)] * ranks
        self._began = now

    def start(self) -> None:
        """Watch in a thread of its own."""
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        """Count and look until :meth:`leave`."""
        try:
            self._store.set(f"place/{self._rank}", f"{socket.gethostname()}, process {os.getpid()}")
            while not self._stopped.wait(INTERVAL if self._count else 0):
                self._count += 1
                asked = "" if self._asked is None else _ASKED
                self._store.set(self._keys[self._rank], f"{asked}{self._count}")
                self._look()
        except RuntimeError as error:  # torch's errors of a store
            if not self._stopped.is_set():
                place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                self._say(f"the store at {place} is gone, and with it rank 0 or its torchrun", str(error))
                self._end(LOST)
        finally:
            self._ended.set()

    def interrupt(self, *_: object) -> None:
        """A signal handler: torchrun asks to end when a rank is lost, and then it is to be said which."""
        if self._asked is None:
            self._asked = time.monotonic()

    def take_signals(self) -> None:
        """Let SIGTERM and SIGINT end the process through this watch."""
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, self.interrupt)

    def leave(self, failure: str | None = None) -> None:
        """End the watch; the others hear that this rank is done, or why it failed."""
        self._stopped.set()
        self._ended.wait(SILENCE)
        try:
            self._store.set(self._keys[self._rank], _DONE if failure is None else f"{_FAILED}{failure}")
            deadline = time.monotonic() + SILENCE
            # none goes before all are done: what they still receive from this rank would break off
            while failure is None and time.monotonic() < deadline:
                if all(state == _DONE or state.startswith(_FAILED) for state in self._states()):
                    return
                time.sleep(0.02)
        except RuntimeError:
            return  # the store ended with the rank that kept it

    def _states(self) -> list[str]:
        return [state.decode() for state in self._store.multi_get(self._keys)]

    def _look(self) -> None:
        now = time.monotonic()
        if not self._store.check(self._keys):
            if now - self._began > ARRIVAL:
                missing = [r for r, key in enumerate(self._keys) if not self._store.check([key])]
                self._say(f"rank {', '.join(map(str, missing))} has not come within {ARRIVAL:.0f} s", None)
                self._end(LOST)
            elif self._asked is not None and now - self._asked > SILENCE:
                self._end(INTERRUPTED)
            return
        states = self._states()
        for other, state in enumerate(states):
            if other == self._rank or state == _DONE:
                continue
            if state != self._seen[other][0]:
                self._seen[other] = (state, now)
            if state.startswith(_FAILED):
                self._lost(other, f"failed: {state.removeprefix(_FAILED)}")
            elif now - self._seen[other][1] > SILENCE:
                self._lost(other, f"gave no sign of life for {SILENCE:.0f} s")
        if self._asked is not None:
            everyone = all(state == _DONE or state.startswith(_ASKED) for state in states)
            if everyone or now - self._asked > SILENCE + 3 * INTERVAL:
                self._end(INTERRUPTED)

    def _lost(self, other: int, how: str) -> None:
        key = f"place/{other}"
        place = f" (on {self._store.get(key).decode()})" if self._store.check([key]) else ""
        self._say(f"rank {other}{place} {how}", f"rank {self._rank} ends, the run cannot go on without it")
        self._end(LOST)

    def _say(self, message: str, hint: str | None) -> None:
        lines = [f"error: {message}", *([f"  {hint}"] if hint else [])]
        sys.stderr.write("".join(f"{line}\n" for line in lines))  # in one piece: the ranks share a terminal
        sys.stderr.flush()

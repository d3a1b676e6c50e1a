"""A question that a fork of this process answers while this process goes on."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from types import TracebackType

_YES, _NO = b"yes", b"no"


class Beside:
    """A fork that answers ``question`` from the memory that it finds; called, it waits for the answer.

    Only for a process that is ours alone and runs one thread of Python: a lock that another holds would stay held.
    """

    def __init__(self, question: Callable[[], bool]) -> None:
        self._end, write = os.pipe()
        self._answer: bytes | None = None
        self._child = os.fork()
        if self._child == 0:
            _answer(question, write)
        os.close(write)

    def __call__(self) -> bool:
        """The answer.

        Raises:
            RuntimeError: the fork failed, with its traceback, or was killed.
        """
        if self._answer is None:
            with os.fdopen(self._end, "rb") as pipe:
                self._answer = pipe.read()
            _, status = os.waitpid(self._child, 0)
            if not self._answer:
                self._answer = f"it ended with status {status}".encode()
        if self._answer not in (_YES, _NO):
            raise RuntimeError(f"the process beside failed: {self._answer.decode()}")
        return self._answer == _YES

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._answer is None:  # nobody waits for it any more
            os.close(self._end)
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)


def _answer(question: Callable[[], bool], write: int) -> None:
    """In the fork: what stands in the buffers and exit handlers of the first process is not its own."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a reader of our output waits for the first process only
        answer = _YES if question() else _NO
    except BaseException:
        answer = traceback.format_exc().encode()
    try:
        with os.fdopen(write, "wb") as pipe:
            pipe.write(answer)
    finally:
        os._exit(0)

"""The child process of an export: it loads torch at once, and takes its one request when that is known.

This module imports next to nothing, so that the child can start before its parent has read the configuration.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

STAGE = "stage: "
_ahead: list[ExportProcess] = []  # started before there was a request


class ExportProcess:
    """A child that waits for a request; what it makes of it lies in ``folder`` until the block ends."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="vacc-opt-export-")
        self.folder = Path(self._directory.name)
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        environment["HF_MODULES_CACHE"] = str(self.folder / "modules")  # where transformers copies code of a checkpoint
        # -P: the working directory must not shadow installed packages
        command = [sys.executable, "-P", "-m", "vacc_opt.frontends.worker", str(self.folder)]
        with (self.folder / "stderr").open("wb") as errors:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
            )

    def __enter__(self) -> ExportProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._child.kill()
        with suppress(BrokenPipeError):  # it ended before it read its request
            self._child.__exit__(kind, error, tb)
        self._directory.cleanup()

    def run(self, request: Mapping[str, Any], progress: Callable[[str], None]) -> tuple[int, str]:
        """Hand over the request and wait: the exit code, and what the child wrote to its standard error."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and says why
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.close()
        for line in self._child.stdout:
            if line.startswith(STAGE):
                progress(line.removeprefix(STAGE).strip())
        code = self._child.wait()
        return code, (self.folder / "stderr").read_text(errors="replace").strip()


@contextmanager
def started_ahead() -> Iterator[Callable[[], None]]:
    """Within the block the next export finds its process started; without one it ends with the block, or as called."""
    _ahead.append(ExportProcess())

    def end() -> None:
        while _ahead:
            _ahead.pop().__exit__(None, None, None)

    try:
        yield end
    finally:
        end()


def export_process() -> ExportProcess:
    """The process that was started ahead, or a new one."""
    return _ahead.pop() if _ahead else ExportProcess()

"""Runs the ranks of an artifact as processes under torchrun, and reads what each of them said."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODULE = "vacc_opt.runtime.distributed"


@dataclass(frozen=True)
class Run:
    """What a torchrun gave back, and what each of its ranks wrote, by local rank."""

    returncode: int
    stdout: tuple[str, ...]
    stderr: tuple[str, ...]


def torchrun(
    logs: Path,
    ranks: int,
    arguments: Sequence[object],
    *,
    options: Sequence[str] = (),
    program: Sequence[str] = (),
    before: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Start torchrun, behind the words ``before``; its ranks write below ``logs``."""
    place = options or ("--master-port", str(free_port()))
    command = [*before, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *place]
    command += ["--redirects", "3", "--log-dir", str(logs), *(program or ("-m", MODULE)), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ended(process: subprocess.Popen[bytes], logs: Path, timeout: float = 120) -> Run:
    """Wait for a torchrun, and read what its ranks wrote."""
    try:
        code = process.wait(timeout)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    folders = sorted({p.parent for p in logs.rglob("stdout.log")}, key=lambda p: int(p.name))
    return Run(
        code,
        tuple((p / "stdout.log").read_text() for p in folders),
        tuple((p / "stderr.log").read_text() for p in folders),
    )


def run_ranks(logs: Path, ranks: int, *arguments: object) -> Run:
    """One torchrun from start to end."""
    return ended(torchrun(logs, ranks, arguments), logs)


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""Ranks on two hosts, each a network namespace of its own with a cable between them, and files of its own rank only."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vacc_opt.runtime.artifact import Artifact
from vacc_opt.tests.runtime.ranks import Run, ended, torchrun
from vacc_opt.tests.runtime.test_distributed import PROMPT, SLOW, answer, environment_of

pytestmark = pytest.mark.full
PORT = "29531"


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces, 10.77.0.1 and 10.77.0.2, whose interfaces are named as they are."""
    names = tuple(f"vacc{os.getpid() % 10000}{end}" for end in "ab")
    setup = [f"ip netns add {name}" for name in names]
    setup.append(f"ip link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}")
    for index, name in enumerate(names):
        setup.append(f"ip -n {name} addr add 10.77.0.{index + 1}/24 dev {name}")
        setup += [f"ip -n {name} link set {name} up", f"ip -n {name} link set lo up"]
    try:
        for line in setup:
            try:
                subprocess.run(line.split(), check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {line}: {error}")
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(
    hosts: tuple[str, str], artifact: Artifact, folder: Path, *arguments: object, program: tuple[str, ...] = ()
) -> list[subprocess.Popen[bytes]]:
    started = []
    for rank, host in enumerate(hosts):
        place = folder / f"host{rank}"
        shutil.copytree(artifact.path, place)
        for path in place.glob(f"*rank{1 - rank}.*"):
            path.unlink()
        where = ("--nnodes", "2", "--node-rank", str(rank), "--master-addr", "10.77.0.1", "--master-port", PORT)
        before = ("ip", "netns", "exec", host, "env", f"GLOO_SOCKET_IFNAME={host}")
        logs = folder / f"log{rank}"
        started.append(torchrun(logs, 1, (place, *arguments), options=where, program=program, before=before))
    return started


def test_two_hosts_give_the_tokens_of_one_process(hosts: tuple[str, str], two: Artifact, tmp_path: Path) -> None:
    started = start(hosts, two, tmp_path, "--prompt", PROMPT, "--max-new-tokens", 16, "--json")
    first, second = (ended(process, tmp_path / f"log{rank}") for rank, process in enumerate(started))
    assert (first.returncode, second.returncode) == (0, 0), (first.stderr, second.stderr)
    assert json.loads(first.stdout[0])["token_ids"] == answer(two)
    assert second.stdout == ("",)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_on_one_host_is_named_on_the_other(
    victim: int, hosts: tuple[str, str], two: Artifact, tmp_path: Path
) -> None:
    program = tmp_path / "slow.py"
    program.write_text(SLOW)
    started = start(hosts, two, tmp_path, "--prompt", "hi", "--max-new-tokens", 1000, program=(str(program),))
    rank_of(started[victim]).send_signal(signal.SIGKILL)
    begun = time.monotonic()
    runs: list[Run] = [ended(process, tmp_path / f"log{rank}") for rank, process in enumerate(started)]
    assert time.monotonic() - begun < 30
    assert all(run.returncode != 0 for run in runs)
    said = runs[1 - victim].stderr[0]
    assert "error: rank 1 (on " in said if victim else "rank 0" in said


def rank_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    """The process of the rank below a torchrun, some seconds after it came."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(process.pid).children(recursive=True):
            if "RANK" in environment_of(child):
                time.sleep(8)
                return child
        time.sleep(0.1)
    raise AssertionError("the rank did not start")

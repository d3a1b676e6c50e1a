"""The ranks as processes: the tokens of one process, one answer, and an end that names the rank that is to blame."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from vacc_opt.ir.errors import UserError
from vacc_opt.runtime.artifact import Artifact, open_artifact
from vacc_opt.runtime.distributed import RankEngine, main
from vacc_opt.runtime.engines import make_engine
from vacc_opt.runtime.generate import generate
from vacc_opt.tests.runtime.ranks import Run, ended, free_port, run_ranks, torchrun

PROMPT = "Say one."
# so that a run lasts until it is broken off: a rank waits before each token
SLOW = """
import sys, time
from vacc_opt.runtime import distributed
choose = distributed.RankEngine.choose
distributed.RankEngine.choose = lambda self, logits: (time.sleep(0.5), choose(self, logits))[1]
sys.exit(distributed.main(sys.argv[1:]))
"""


def answer(artifact: Artifact, tokens: int = 16) -> list[int]:
    return list(generate(artifact, make_engine("onnxruntime", artifact), PROMPT, max_new_tokens=tokens).token_ids)


def test_two_processes_give_the_tokens_of_one_and_rank_0_alone_prints(two: Artifact, tmp_path: Path) -> None:
    run = run_ranks(tmp_path, 2, two.path, "--prompt", PROMPT, "--max-new-tokens", 16, "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout[0])
    assert found["token_ids"] == answer(two)
    assert len(set(found["token_ids"])) > 3
    assert found["ranks"] == 2
    assert (run.stdout[1], run.stderr[1]) == ("", "")


@pytest.mark.full
def test_two_hosts_need_only_the_files_of_their_ranks(two: Artifact, tmp_path: Path) -> None:
    """Two torchruns that meet at an address of the loopback, each with a directory of its own."""
    port, started = str(free_port()), []
    for rank in range(2):
        place = tmp_path / f"host{rank}"
        shutil.copytree(two.path, place)
        for path in place.glob(f"*rank{1 - rank}.*"):
            path.unlink()
        where = ("--nnodes", "2", "--node-rank", str(rank), "--master-addr", "127.0.0.2", "--master-port", port)
        arguments = (place, "--prompt", PROMPT, "--max-new-tokens", 16, "--json")
        started.append(torchrun(tmp_path / f"log{rank}", 1, arguments, options=where))
    first, second = (ended(process, tmp_path / f"log{rank}") for rank, process in enumerate(started))
    assert (first.returncode, second.returncode) == (0, 0), (first.stderr, second.stderr)
    assert json.loads(first.stdout[0])["token_ids"] == answer(two)
    assert second.stdout == ("",)


def test_another_number_of_processes_is_refused_once(two: Artifact, tmp_path: Path) -> None:
    run = run_ranks(tmp_path, 3, two.path, "--prompt", PROMPT)
    assert run.returncode != 0
    assert run.stdout == ("", "", "")
    assert run.stderr[0] == (
        f"error: {two.path}: has 2 ranks, and 3 processes were started\n"
        "  torchrun must start 2 in all: --nnodes times --nproc-per-node\n"
    )
    assert run.stderr[1:] == ("", "")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (flip, "rank1.safetensors"),
        pytest.param(cut, "rank1.safetensors", marks=pytest.mark.full),
        pytest.param(flip, "decode.rank1.onnx", marks=pytest.mark.full),
        pytest.param(cut, "prefill.rank1.onnx", marks=pytest.mark.full),
    ],
)
def test_a_rank_whose_file_is_damaged_says_so_before_the_run(
    damage: Callable[[Path], None], name: str, two: Artifact, tmp_path: Path
) -> None:
    place = tmp_path / "damaged"
    shutil.copytree(two.path, place)
    damage(place / name)
    run = run_ranks(tmp_path / "log", 2, place, "--prompt", PROMPT)
    assert run.returncode != 0
    assert run.stdout == ("", "")
    assert run.stderr[0] == ""
    said = (
        rf"error: rank 1: {place}: the file {name} is damaged: (it has not the digest of what was written \([\w.]+\)|"
        r"[\w.]+ is not what `compile` wrote)\n  compile it again\n"
    )
    assert re.fullmatch(said, run.stderr[1])


def broken_off(artifact: Artifact, victim: int, logs: Path) -> tuple[Run, float]:
    """A run whose rank is killed while it makes tokens, and the seconds from there to the end of all ranks."""
    program = logs / "slow.py"
    logs.mkdir()
    program.write_text(SLOW)
    arguments = (artifact.path, "--prompt", "hi", "--max-new-tokens", 1000)
    process = torchrun(logs, artifact.ranks, arguments, program=(str(program),))
    ranks = wait_for_ranks(process, artifact.ranks)
    time.sleep(3)  # past the start
    ranks[victim].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    found = ended(process, logs)
    assert not any(rank.is_running() for rank in ranks)
    return found, time.monotonic() - begun


def wait_for_ranks(process: subprocess.Popen[bytes], count: int) -> list[psutil.Process]:
    """The processes of the ranks, once each has opened its sessions (it then has the threads of an exchange)."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children = [p for p in psutil.Process(process.pid).children() if "RANK" in environment_of(p)]
        if len(children) == count:
            time.sleep(3)
            return sorted(children, key=lambda p: int(environment_of(p)["RANK"]))
        time.sleep(0.1)
    raise AssertionError("the ranks did not start")


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except psutil.Error:
        return {}


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all_and_is_named_within_30_seconds(victim: int, two: Artifact, tmp_path: Path) -> None:
    run, seconds = broken_off(two, victim, tmp_path / "log")
    assert run.returncode != 0
    assert seconds < 30
    assert run.stdout == ("", "")
    survivor = run.stderr[1 - victim]
    assert survivor.startswith(f"error: rank {victim} (on ")
    assert survivor.splitlines()[0].endswith(" gave no sign of life for 10 s")
    assert "Traceback" not in survivor


def test_a_rank_opens_no_file_of_another(two: Artifact, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    shutil.copytree(two.path, place)
    for path in place.glob("*rank0.*"):
        path.unlink()
    with pytest.raises(UserError, match="is missing"):
        open_artifact(place)
    engine = RankEngine(open_artifact(place, 1), 1)
    engine.load()
    assert len(engine.caches) == 1


def test_without_torchrun_it_says_how_to_start_it(
    two: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main([str(two.path), "--prompt", PROMPT]) == 2
    said: Any = capsys.readouterr()
    assert said.err.splitlines()[0] == "error: this is one rank of several, and nothing says which"
    assert "torchrun --nproc-per-node N -m vacc_opt.runtime.distributed" in said.err

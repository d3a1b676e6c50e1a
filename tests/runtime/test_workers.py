"""Several workers make what one makes, byte for byte, and end with the first failure."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vacc_opt.cli.main import main
from vacc_opt.ir.errors import UserError
from vacc_opt.runtime.compile import compile_model
from vacc_opt.runtime.workers import each
from vacc_opt.tests.listener import Silent


@pytest.fixture(scope="module")
def one_worker(config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    file = config(tmp_path_factory.mktemp("one"), tp=3)
    return contents(Path(compile_model(file, ["workspace.workers=1"], Silent()).path))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("workers", [2, 3])
def test_an_artifact_does_not_depend_on_the_number_of_workers(
    workers: int, one_worker: dict[str, bytes], config: Callable[..., Path], tmp_path: Path
) -> None:
    listener = Heard()
    report = compile_model(config(tmp_path, tp=3), [f"workspace.workers={workers}"], listener)
    made = contents(Path(report.path))
    assert list(made) == list(one_worker)
    assert [name for name in made if made[name] != one_worker[name]] == []
    assert listener.written == sorted(listener.written)
    assert listener.written[-1][0] == listener.written[-1][1] > 0


class Heard(Silent):
    """Keeps the progress of writing too."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int, int]] = []

    def running(self, text: str, done: int = 0, of: int | None = None) -> None:
        if text.startswith("write: ") and of is not None:
            self.written.append((done, of))


def test_results_come_in_order_from_other_processes() -> None:
    found = list(each(lambda job: (job * 2, os.getpid()), [1, 2, 3, 4], 2))
    assert [double for double, _ in found] == [2, 4, 6, 8]
    assert os.getpid() not in {process for _, process in found}
    assert len({process for _, process in found}) <= 2


def test_one_worker_works_here() -> None:
    assert set(each(lambda _: os.getpid(), [1, 2], 1)) == {os.getpid()}


def test_an_error_of_a_worker_is_the_error_of_the_call() -> None:
    def fail(job: int) -> int:
        raise UserError(f"job {job} cannot be done", "try another")

    with pytest.raises(UserError, match="job 1 cannot be done") as caught:
        list(each(fail, [1, 2], 2))
    assert caught.value.hint == "try another"


def test_a_killed_worker_is_said() -> None:
    with pytest.raises(UserError, match="a worker process was killed") as caught:
        list(each(lambda _: os.kill(os.getpid(), signal.SIGKILL), [1, 2], 2))
    assert caught.value.hint == "fewer `workspace.workers` need less"


def test_a_weight_that_cannot_be_read_leaves_no_artifact(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise UserError("weight w: it is truncated")

    monkeypatch.setattr("vacc_opt.runtime.artifact.write_weight_files", fail)
    assert main(["compile", str(config(tmp_path)), "-D", "workspace.workers=2"]) == 2
    assert "error: weight w: it is truncated" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".cache", ".calibration"}  # no artifact

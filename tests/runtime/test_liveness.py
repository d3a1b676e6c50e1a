"""The watch: it names the rank that stands still or failed, and leaves alone those that are done or only slow."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from vacc_opt.runtime import liveness
from vacc_opt.runtime.liveness import INTERRUPTED, LOST, Watch

# a process ends in the middle of a look; here the thread does
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "INTERVAL", 0.02)
    monkeypatch.setattr(liveness, "SILENCE", 0.3)
    monkeypatch.setattr(liveness, "ARRIVAL", 0.5)


class Ended(list[int]):
    """Takes the place of the end of the process: keeps the code, and ends the watch's thread."""

    def __call__(self, code: int) -> None:
        self.append(code)
        raise SystemExit(code)

    def wait(self, seconds: float = 3) -> list[int]:
        deadline = time.monotonic() + seconds
        while not self and time.monotonic() < deadline:
            time.sleep(0.01)
        return list(self)


def watched(store: dist.HashStore, rank: int = 0, ranks: int = 2) -> tuple[Watch, Ended]:
    ended = Ended()
    watch = Watch(store, rank, ranks, ended)
    watch.start()
    return watch, ended


def test_a_rank_that_stands_still_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    store = dist.HashStore()
    store.set("place/1", "there, process 7")
    store.set("count/1", "5")
    _, ended = watched(store)
    assert ended.wait() == [LOST]
    assert capfd.readouterr().err.startswith("error: rank 1 (on there, process 7) gave no sign of life for 0 s\n")


def test_a_rank_that_counts_is_left_alone_however_long_it_takes(capfd: pytest.CaptureFixture[str]) -> None:
    store = dist.HashStore()
    store.set("count/1", "0")
    watch, ended = watched(store)
    for count in range(30):
        store.set("count/1", str(count))
        time.sleep(0.03)
    store.set("count/1", "done")
    assert ended.wait(0.6) == []
    watch.leave()
    assert store.get("count/0") == b"done"
    assert capfd.readouterr().err == ""


def test_a_rank_that_failed_is_named_with_its_reason(capfd: pytest.CaptureFixture[str]) -> None:
    store = dist.HashStore()
    other, _ = watched(store, 1)
    _, ended = watched(store)
    other.leave("no memory")
    assert ended.wait() == [LOST]
    assert " failed: no memory\n  rank 0 ends" in capfd.readouterr().err


def test_a_rank_that_never_comes_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    _, ended = watched(dist.HashStore(), 0, 3)
    assert ended.wait() == [LOST]
    assert capfd.readouterr().err == "error: rank 1, 2 has not come within 0 s\n"


def test_a_signal_to_all_ends_all_without_blame(capfd: pytest.CaptureFixture[str]) -> None:
    store = dist.HashStore()
    (first, one), (second, two) = watched(store, 0), watched(store, 1)
    first.interrupt()
    second.interrupt()
    assert (one.wait(), two.wait()) == ([INTERRUPTED], [INTERRUPTED])
    assert capfd.readouterr().err == ""


def test_a_signal_that_follows_a_death_waits_for_the_name(capfd: pytest.CaptureFixture[str]) -> None:
    store = dist.HashStore()
    store.set("count/1", "5")
    watch, ended = watched(store)
    watch.interrupt()
    assert ended.wait() == [LOST]
    assert "error: rank 1 gave no sign of life" in capfd.readouterr().err

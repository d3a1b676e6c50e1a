"""Bytes that move are told with their speed of the last seconds and the time that is left."""

from __future__ import annotations

from vacc_opt.runtime.progress import ByteProgress


def said_at(*moments: tuple[float, int]) -> list[str]:
    """What is said when so many of 10 GB are done after so many seconds."""
    said: list[str] = []
    now = 0.0
    progress = ByteProgress(lambda text, done, of: said.append(text), "write", lambda: now)
    for now, done in moments:  # noqa: B007 - the clock reads it
        progress(done, 10_000_000_000)
    return said


def test_speed_and_rest_are_told() -> None:
    assert said_at((2.0, 1_000_000_000)) == ["write: 1 GB of 10 GB, 500 MB/s, 18 s left"]


def test_nothing_is_foretold_before_anything_moved() -> None:
    assert said_at((0.0, 0)) == ["write: 0 B of 10 GB"]


def test_the_speed_is_that_of_the_last_seconds() -> None:
    slow = [(float(second), second * 10_000_000) for second in range(1, 101)]
    fast = [(100.0 + second, 1_000_000_000 + second * 500_000_000) for second in range(1, 11)]
    assert said_at(*slow, *fast)[-1] == "write: 6 GB of 10 GB, 500 MB/s, 8 s left"

"""Schedules, timings and searches that were kept: what is there is not done again, and gives the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from vacc_opt.backends.vacc import load_target, simulate_time
from vacc_opt.backends.vacc.timing_json import without_records
from vacc_opt.runtime import cache as caching
from vacc_opt.runtime.cache import Cache, kept_schedule
from vacc_opt.tests.backends.llama import Llama

TARGET = load_target("vacc-reference")
search = import_module("vacc_opt.backends.vacc.search")
Work = Counter[str]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """How often something was lowered, verified, timed, searched; the process remembers no search."""
    done: Work = Counter()

    def counting(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            done[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    for name in ("lower", "verified_time"):
        counting(caching, name)
    counting(search, "_search")
    monkeypatch.setattr(search, "_KNOWN", {})
    return done


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(search, "_KNOWN", {})


def test_a_kept_schedule_is_not_lowered_verified_or_timed_again(tmp_path: Path, work: Work) -> None:
    made = kept_schedule(Cache(tmp_path), Llama().graph(), TARGET, "prefill")
    assert made[2] is False
    before = Counter(work)
    again = kept_schedule(Cache(tmp_path), Llama().graph(), TARGET, "prefill")
    assert work == before
    assert again == (made[0], made[1], True)


def test_the_kept_timing_is_that_of_the_program_but_for_the_records(tmp_path: Path) -> None:
    graph = Llama(int8_weights=True, kv="int8", ranks=3).graph()
    kept_schedule(Cache(tmp_path), graph, TARGET, "prefill")
    program, timing, kept = kept_schedule(Cache(tmp_path), graph, TARGET, "prefill")
    assert kept
    full = simulate_time(program, TARGET)
    assert timing == without_records(full)
    assert [list(one.account) for one in timing.kernels.values()] == [
        list(one.account) for one in full.kernels.values()
    ]


def test_a_schedule_whose_timing_cannot_be_read_is_made_again(tmp_path: Path, work: Work) -> None:
    cache, graph = Cache(tmp_path), Llama().graph()
    made = kept_schedule(cache, graph, TARGET, "prefill")
    (file,) = (tmp_path / "schedule").iterdir()
    cache.put("schedule", file.name, b"{}\n" + made[0].to_text().encode())
    assert kept_schedule(cache, graph, TARGET, "prefill") == made
    assert work["verified_time"] == 2


def test_another_model_with_the_same_linears_does_not_search_them_again(
    tmp_path: Path, work: Work, forget: Callable[[], None]
) -> None:
    cache = Cache(tmp_path)
    kept_schedule(cache, Llama(layers=1).graph(), TARGET, "prefill")
    searched = work["_search"]
    assert searched > 0
    forget()
    program, _, kept = kept_schedule(cache, Llama(layers=3).graph(), TARGET, "prefill")
    assert not kept
    assert work["_search"] == searched
    forget()
    assert kept_schedule(Cache(tmp_path / "none"), Llama(layers=3).graph(), TARGET, "prefill")[0] == program


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"tiles": {"m": 8}}', b"not json"])
def test_a_damaged_search_is_made_again(tmp_path: Path, work: Work, forget: Callable[[], None], damage: bytes) -> None:
    cache, graph = Cache(tmp_path), Llama(layers=1).graph()
    made = kept_schedule(cache, graph, TARGET, "prefill")
    searched = work["_search"]
    for file in (tmp_path / "tiles").iterdir():
        cache.put("tiles", file.name, damage)
    for file in (tmp_path / "schedule").iterdir():
        file.unlink()
    forget()
    assert kept_schedule(cache, graph, TARGET, "prefill") == made
    assert work["_search"] == 2 * searched


def test_a_file_that_was_cut_off_is_made_again(tmp_path: Path, work: Work, forget: Callable[[], None]) -> None:
    cache, graph = Cache(tmp_path), Llama(layers=1).graph()
    made = kept_schedule(cache, graph, TARGET, "prefill")
    searched = work["_search"]
    for kind in ("tiles", "schedule"):
        for file in (tmp_path / kind).iterdir():
            file.write_bytes(file.read_bytes()[:-1])
    forget()
    assert kept_schedule(cache, graph, TARGET, "prefill") == made
    assert work["_search"] == 2 * searched

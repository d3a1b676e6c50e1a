"""Jobs on a pool of processes: results in the order of the jobs, whatever process did them and when it ended."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from vacc_opt.ir.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
_inherited: list[tuple[Callable[[Any], Any], Sequence[Any]]] = []  # what a forked process finds in its memory


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def each(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """``work`` of every job in order; in this process for one worker or one job, else in at most ``workers`` others.

    The processes are forks: a graph is there without being written and read again, which takes as long as to lower it.
    Where a fork is not safe (not on Linux) all is done in this process.

    Args:
        work: may hold no lock that another thread could hold now, and start no threads of onnxruntime or torch.
        jobs: anything; what ``work`` makes of them is pickled.
        workers: processes that work at the same time.

    Raises:
        UserError: a process was killed; and what ``work`` raises.
    """
    if workers == 1 or len(jobs) < 2 or sys.platform != "linux":
        yield from map(work, jobs)
        return
    _inherited.append((work, jobs))
    gc.freeze()  # a collection in a fork would write to, and so copy, every page of objects that it shares
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_plain_signals) as pool:
        try:
            for future in [pool.submit(_one, len(_inherited) - 1, index) for index in range(len(jobs))]:
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most likely for want of memory", "fewer `workspace.workers` need less"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise
        finally:
            _inherited.pop()
            gc.unfreeze()


def _one(call: int, index: int) -> Any:
    work, jobs = _inherited[call]
    return work(jobs[index])


def _plain_signals() -> None:
    """An interrupt reaches all processes: the first one ends the others, by a termination that they do not handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

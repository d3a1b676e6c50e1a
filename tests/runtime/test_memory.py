"""Peak memory counts the whole process tree."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vacc_opt.runtime.memory import PeakMemory, tree_bytes

MEGABYTES = 150


@pytest.mark.skipif(sys.platform != "linux", reason="the tree is read from /proc")
def test_memory_of_a_child_process_counts() -> None:
    with PeakMemory() as idle:
        pass
    code = f"import time; x = bytearray({MEGABYTES} * 10**6); time.sleep(0.4)"
    with PeakMemory() as busy:
        subprocess.run([sys.executable, "-c", code], check=True)
    assert busy.bytes - idle.bytes > 0.9 * MEGABYTES * 1e6


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc")
def test_pages_that_processes_share_count_once() -> None:
    """A forked child shares what its parent wrote."""
    held = np.ones(100 << 20, np.uint8)
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        shared, resident = tree_bytes(os.getpid()), tree_bytes(os.getpid(), most=1 << 60)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert held.nbytes < shared < resident - 0.9 * held.nbytes

"""Peak memory counts the whole process tree."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vacc_opt.runtime.memory import PeakMemory

MEGABYTES = 150


@pytest.mark.skipif(sys.platform != "linux", reason="the tree is read from /proc")
def test_memory_of_a_child_process_counts() -> None:
    with PeakMemory() as idle:
        pass
    code = f"import time; x = bytearray({MEGABYTES} * 10**6); time.sleep(0.4)"
    with PeakMemory() as busy:
        subprocess.run([sys.executable, "-c", code], check=True)
    assert busy.bytes - idle.bytes > 0.9 * MEGABYTES * 1e6

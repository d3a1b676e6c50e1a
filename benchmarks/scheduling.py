"""Schedule phases that were written as text: lowered with the search of tiles, verified and timed, in one process.

    python -m vacc_opt.benchmarks.scheduling CACHE prefill.graph decode.graph

The name of a file is that of its phase. With what an earlier run left in CACHE nothing is done again. Prints JSON.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from vacc_opt.backends.vacc import load_target, lower
from vacc_opt.backends.vacc.search import findings
from vacc_opt.cli.main import COLLECT_AFTER
from vacc_opt.ir.text import from_text
from vacc_opt.runtime.cache import Cache, kept_schedule
from vacc_opt.runtime.fusions import activation_bytes


def scheduled(cache: Cache, files: list[Path]) -> dict[str, Any]:
    """Seconds of all phases together, and of each phase its numbers and the digest of its text.

    `seconds` are of the processor: what one idle core takes, as nothing else runs here and little is read.
    `closed_form`: by how much the estimate of each linear that was searched is off its simulated cycles.
    """
    target = load_target("vacc-reference")
    graphs = {file.stem: from_text(file.read_text(encoding="utf-8")) for file in files}
    phases: dict[str, dict[str, Any]] = {}
    spent, kernels = 0.0, []
    for phase, graph in graphs.items():
        started = time.process_time()
        program, timing, kept = kept_schedule(cache, graph, target, phase)
        spent += time.process_time() - started
        kernels += program.kernels
        text = program.to_text().encode()
        phases[phase] = {
            "kernels": len(program.kernels),
            "bytes": len(text),
            "digest": hashlib.sha256(text).hexdigest(),
            "cycles": timing.cycles,
            "ratio": round(timing.ratio, 4),
            "activation_bytes": activation_bytes(program),
            "unfused_activation_bytes": activation_bytes(lower(graph, target, phase=phase, fusions=())),
            "kept": kept,
        }
    chosen = [one for one in findings() if any(replace(k, name=one.kernel.name) == one.kernel for k in kernels)]
    off = {f"{one.kernel.name} {one.kernel.params[0].shape}": round(one.estimate / one.cycles - 1, 4) for one in chosen}
    return {"seconds": round(spent, 3), "phases": phases, "closed_form": off}


if __name__ == "__main__":
    gc.set_threshold(COLLECT_AFTER)  # as the command line does
    print(json.dumps(scheduled(Cache(Path(sys.argv[1])), [Path(one) for one in sys.argv[2:]])))

"""What a compilation would write, told from its graphs: no weight is read, and no text is calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vacc_opt.ir.graph import Graph
from vacc_opt.runtime.plan import SCALES_FILE
from vacc_opt.runtime.stored import PhaseModel, stored_constants


def made_up_scales(graph: Graph, folder: Path) -> Path:
    """A file of scales in the place of calibrated ones; no two are equal, or passes would make one of them."""
    from vacc_opt.calibration.kv_scales import KvScales, ScaleZero

    found: dict[tuple[int, str], ScaleZero] = {}
    for value in graph.inputs:
        if value.name.startswith("past_key_values."):
            _, layer, part = value.name.split(".")
            _, heads, _, width = value.shape or ()
            both = (np.full([int(str(heads)), int(str(width))], 2 * len(found) + n, np.float32) for n in (1, 2))
            found[int(layer), part] = ScaleZero(*both)
    KvScales(found).save(folder / SCALES_FILE)
    return folder / SCALES_FILE


def planned_files(phases: Sequence[PhaseModel]) -> dict[str, int]:
    """Bytes by file name of what makes up nearly all of an artifact: the weights of each rank, and the schedules."""
    found: dict[str, int] = {}
    for rank in range(phases[0].graph.ranks):
        files = stored_constants(phases, rank).files(Path())
        found |= {file.path.name: len(file.header({})) + file.nbytes for file in files}
    return found | {f"{phase.name}.schedule": len(phase.schedule.encode()) for phase in phases}

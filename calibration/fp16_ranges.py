"""The largest magnitude of every value of a model over calibration text, for the pass ``guard-fp16-range``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.calibration.activations import Activations
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.ir.graph import Graph
from vacc_opt.ir.storage import write_safetensors
from vacc_opt.ir.tensor import Literal

Array = npt.NDArray[Any]
_NODES = 40  # run at a time: about a layer
_HIDDEN = 1e30  # what stands for minus infinity in a mask is no activation


def largest_magnitudes(
    graph: Graph,
    feeds: Sequence[Mapping[str, Array]],
    scratch: Path,
    *,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """The largest magnitude in fp32 of every float value that ``graph`` computes, by name; ``progress`` (done, all).

    Raises:
        UserError: there are no feeds.
        CheckError: a value is NaN or plus infinity in fp32; minus infinity hides in masks.
    """
    if not feeds:
        raise UserError("a profile of ranges needs at least one sequence of tokens")
    found: dict[str, float] = {}

    def watch(name: str, array: Array) -> None:
        if array.dtype.kind != "f" or not array.size:
            return
        if np.isnan(array).any() or np.isposinf(array).any():
            raise CheckError(f"calibration: {name} holds NaN or infinity", "the checkpoint may be damaged")
        magnitudes = np.abs(array)
        largest = float(magnitudes.max(initial=-1.0, where=magnitudes < _HIDDEN))
        if largest >= 0:
            found[name] = max(found.get(name, 0.0), largest)

    run = Activations(graph, feeds, scratch, threads=threads)
    try:
        for end in [*range(_NODES, len(run.nodes), _NODES), len(run.nodes)]:
            run.advance(end, {}, watch)
            if progress is not None:
                progress(end, len(run.nodes))
    finally:
        run.close()
    return found


def save_ranges(path: Path, ranges: Mapping[str, float]) -> None:
    """Write each as a float32 [1] under the value's name; equal ranges give equal bytes."""
    part = path.with_name(path.name + ".tmp")
    write_safetensors(part, {name: Literal(np.array([value], np.float32)) for name, value in ranges.items()})
    os.replace(part, path)

"""Weights of a rank as the program reads them: canonical [N, K] arrays, the kernels' layout being strides."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.backends.vacc.schedule import DTYPES, Program
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Graph


def rank_weights(program: Program, graph: Graph, rank: int) -> dict[str, npt.NDArray[Any]]:
    """Read the constants of `graph` that `program` uses, for one rank; UserError when one has gone or changed type."""
    found: dict[str, npt.NDArray[Any]] = {}
    for tensor in program.of_role("weight"):
        value = graph.values.get(tensor.name)
        if value is None or value.const is None:
            raise UserError(f"the graph has no constant `{tensor.name}`")
        array = np.asarray(value.const.rank(rank).read(), order="C")
        if array.shape != tensor.shape or array.dtype != DTYPES[tensor.dtype]:
            expected = f"{tensor.dtype} {list(tensor.shape)}"
            raise UserError(f"`{tensor.name}` is {array.dtype} {list(array.shape)}, not {expected}")
        found[tensor.name] = array
    return found


def empty_caches(program: Program) -> list[dict[str, npt.NDArray[Any]]]:
    """Zeroed KV caches by name, one mapping a rank."""
    return [
        {one.name: np.zeros(one.shape, DTYPES[one.dtype]) for one in program.of_role("cache")}
        for _ in range(program.ranks)
    ]

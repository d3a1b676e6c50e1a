"""Run a graph on onnxruntime a few layers at a time, so that memory holds the weights of these layers and no others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from vacc_opt.ir import Graph, Node, Source, TensorType, Value
from vacc_opt.ir.copy import extract
from vacc_opt.ir.errors import CheckError, VaccError, first_line
from vacc_opt.ir.evaluate import Executable, read_weights
from vacc_opt.ir.graph import Absent
from vacc_opt.ir.seeded import noise, stand_in, with_leaves
from vacc_opt.ir.storage import is_stored
from vacc_opt.ir.tensor import Gguf
from vacc_opt.ir.types import OpaqueType
from vacc_opt.ir.weights import stored_parts
from vacc_opt.passes.infra.check.calls import HIDDEN, Call, Results

Array = npt.NDArray[Any]
Watch = Callable[[str, list[Array]], None]  # hears the name of a computed value, and what each rank computed
LAYER_BYTES = 32 << 20
REAL_BYTES = 1 << 30  # weights of a model up to this size are read; beyond, reading them every time costs too much


def weight_bytes(graph: Graph) -> int:
    """Bytes of the tensors of weight files behind the constants, each counted once."""
    leaves = dict.fromkeys(leaf for v in graph.constants() if v.const is not None for leaf in stored_parts(v.const))
    return sum(leaf.nbytes for leaf in leaves)


def is_there(leaf: Source | Gguf) -> bool:
    """True when the file of a tensor is there and long enough to hold it."""
    path, end = Path(leaf.file), leaf.offset + (leaf.nbytes if isinstance(leaf, Source) else 1)
    return path.is_file() and path.stat().st_size >= end


def missing_file(graph: Graph) -> str:
    """The first weight file, by name, that does not hold what the graph refers to; empty when all do."""
    leaves = (leaf for v in graph.constants() if v.const is not None for leaf in stored_parts(v.const))
    return min((leaf.file for leaf in leaves if not is_there(leaf)), default="")


class Layerwise:
    """Runs graphs in pieces of consecutive nodes, with the real weights or with seeded ones of the same shapes.

    onnxruntime computes every node as it stands, so that equal nodes give equal bits in whatever graph they are.

    Args:
        seeded: put seeded numbers in place of what is read from files.
        layer_bytes: weights that a piece may hold, if it is more than one node.
        jitter: move every float of inputs and weights by about the rounding of its type, to see what that does.
    """

    def __init__(self, *, seeded: bool = False, layer_bytes: int = LAYER_BYTES, jitter: bool = False) -> None:
        self.seeded = seeded
        self.layer_bytes = layer_bytes
        self.jitter = jitter

    def run(self, graph: Graph, call: Call, watch: Watch | None = None) -> Results:
        """Outputs of every rank; ``watch`` hears each computed value, in topological order.

        Raises:
            CheckError: onnxruntime does not load or run a piece.
        """
        values = [call.of(rank) for rank in range(graph.ranks)]
        missing = [v.name for v in graph.inputs if v.uses and v.name not in values[0]]
        if missing:
            raise CheckError(f"nothing is known of the input {missing[0]!r}")
        if self.jitter:
            values = [{name: _jittered(array, name) for name, array in rank.items()} for rank in values]
        pieces = self._pieces(graph)
        last = {v.name: i for i, nodes in enumerate(pieces) for n in nodes for v in n.inputs if v is not None}
        kept = {value.name for value in graph.outputs.values()}
        fixed: set[Value] = set()  # computed from weights alone: weights in another form, and as large
        for index, nodes in enumerate(pieces):
            for node in nodes:
                if all(v is None or v.is_const or v in fixed for v in node.inputs):
                    fixed.update(node.outputs)
            made = [v for node in nodes for v in node.outputs if v not in fixed and not isinstance(v, Absent)]
            found = self._run(graph, nodes, made if watch is not None else [], values)
            if watch is not None:
                for name in (v.name for v in made if v.name in found[0]):
                    watch(name, [rank[name] for rank in found])
            for mine, new in zip(values, found, strict=True):
                mine.update(new)
                for name in [n for n in mine if last.get(n, -1) <= index and n not in kept]:
                    del mine[name]
        return [{name: _read(v, rank, value) for name, value in graph.outputs.items()} for rank, v in enumerate(values)]

    def _pieces(self, graph: Graph) -> list[list[Node]]:
        pieces: list[list[Node]] = [[]]
        held: set[Value] = set()
        size = 0
        for node in graph.nodes():
            new = {v for v in node.inputs if v is not None and is_stored(v) and v not in held}
            more = sum(v.const.rank(r).nbytes for v in new if v.const is not None for r in range(graph.ranks))
            if pieces[-1] and more and size + more > self.layer_bytes:
                pieces.append([])
                held, size = set(), 0
            pieces[-1].append(node)
            held |= new
            size += more
        return pieces

    def _run(self, graph: Graph, nodes: list[Node], watched: list[Value], values: list[dict[str, Array]]) -> Results:
        outputs = [v for node in nodes for v in node.outputs if graph.is_output(v)]
        region = extract(graph, nodes, graph.name, keep=[*outputs, *watched])
        if not region.outputs:
            return [{} for _ in values]
        for value in region.values.values():
            if value.const is not None and self.seeded:
                value.const = with_leaves(value.const, stand_in)
            elif value.const is None and not isinstance(value.type, OpaqueType):
                # shapes as they come: buffers may be shorter than the graph says
                given_here = value.producer is None
                value.type = TensorType(value.type.dtype, values[0][value.name].shape if given_here else None)
        try:
            given = [{v.name: rank[v.name] for v in region.inputs} for rank in values]
            weights = read_weights(region)
            if self.jitter:
                weights = [{name: _jittered(array, name) for name, array in rank.items()} for rank in weights]
            return Executable(region, threads=2, optimize=False, weights=weights).run({}, given)
        except VaccError:
            raise
        except Exception as error:  # of an element type that onnxruntime cannot take
            raise CheckError(f"onnxruntime failed: {first_line(error)}") from error


def _jittered(array: Array, name: str) -> Array:
    if not isinstance(array, np.ndarray) or array.dtype.name not in ("float16", "float32", "float64", "bfloat16"):
        return array
    steps = noise(f"rounding of {name}", 0, array.size).reshape(array.shape)
    step = np.asarray(steps * np.float32(ml_dtypes.finfo(array.dtype).eps), array.dtype)
    limit = min(HIDDEN, float(ml_dtypes.finfo(array.dtype).max) / 4)  # a mask's number stays what it is
    moved = np.where(np.abs(array) < limit, array, 0) * step
    return np.asarray(array + moved, array.dtype)


def _read(values: Mapping[str, Array], rank: int, value: Value) -> Array:
    return values[value.name] if value.const is None else value.const.rank(rank).read()

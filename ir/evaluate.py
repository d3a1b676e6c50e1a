"""Run a graph on onnxruntime: its ranks in this process or some of them, cut at the collectives, weights shared.

Two settings matter for correctness and memory. ``session.disable_quant_qdq``: at its default level onnxruntime turns
int8 DequantizeLinear + MatMul into int8 activations (relative error 5.2e-3 instead of 3e-7). ``ConstantFolding`` off:
it would expand every int8 weight to a second, float copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir import ops
from vacc_opt.ir.copy import extract
from vacc_opt.ir.errors import CheckError, UserError, first_line
from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.onnx_proto import to_onnx
from vacc_opt.ir.ort_values import embed_packed, from_ort, run_session, to_ort
from vacc_opt.ir.storage import stored_tensors
from vacc_opt.ir.types import DType

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Exchange = Callable[[Node, list[Array]], list[Array]]  # the parts of the ranks that run here to what each of them gets


def open_session(
    model: bytes, weights: Mapping[str, Array] | None = None, *, threads: int = 1, optimize: bool = True
) -> Any:
    """An onnxruntime InferenceSession on the CPU, with large initializers taken from ``weights`` without a copy.

    Without ``optimize`` every node is computed as it stands, so that equal nodes give equal bits in any graph.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.disable_prepacking", "1")
    if weights:
        values = [to_ort(array) for array in weights.values()]
        options.add_external_initializers(list(weights), values)
    try:
        return ort.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )
    except Exception as error:
        raise CheckError(f"onnxruntime does not load the graph: {first_line(error)}") from error


class _Part:
    """One stage of one rank: the nodes between two rows of collectives."""

    def __init__(self, graph: Graph, rank: int, weights: Mapping[str, Array], threads: int, optimize: bool) -> None:
        self.inputs = [v.name for v in graph.inputs]
        self.outputs = list(graph.outputs)
        used = {n: weights[n] for n in stored_tensors(graph, rank)}
        self._keep = used  # the session reads these arrays in place
        self._session = None
        ends = [*graph.inputs, *graph.outputs.values()]
        self._bindable = all(v.type.dtype not in (DType.STRING, DType.UNDEFINED) for v in ends)
        if len(graph):
            model = to_onnx(graph, lambda v: ("in-memory", 0, weights[v.name].nbytes), provenance=False)
            given = embed_packed(model, used)
            self._session = open_session(model.SerializeToString(), given, threads=threads, optimize=optimize)

    def run(self, values: MutableMapping[str, Array], in_place: Mapping[str, str]) -> None:
        """Compute the outputs into ``values``; an output in ``in_place`` is written into its input's buffer."""
        if self._session is None:
            return
        if not self._bindable:
            values.update(self._call({name: values[name] for name in self.inputs}))
            return
        binding = self._session.io_binding()
        for name in self.inputs:
            values[name] = np.asarray(values[name], order="C")
        buffers = {n: to_ort(values[n]) for n in self.inputs}
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
        for name in self.outputs:
            if in_place.get(name) in buffers:
                binding.bind_ortvalue_output(name, buffers[in_place[name]])
            else:
                binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise CheckError(f"onnxruntime failed: {first_line(error)}") from error
        for name, result in zip(self.outputs, binding.get_outputs(), strict=True):
            values[name] = values[in_place[name]] if in_place.get(name) in buffers else from_ort(result)

    def _call(self, feeds: Feeds) -> dict[str, Any]:
        """Run without binding, which knows neither strings nor sequences."""
        try:
            return run_session(self._session, feeds)
        except Exception as error:
            raise CheckError(f"onnxruntime failed: {first_line(error)}") from error


def combine(node: Node, parts: Sequence[Array]) -> list[Array]:
    """What a collective gives to each rank, from the parts of all of them in rank order."""
    op = ops.get(node.op_type)
    assert op is not None
    assert op.combine is not None
    return op.combine(parts, node.attributes)


class Executable:
    """A graph, ready to run on onnxruntime for all its ranks, or for those that run here.

    Args:
        graph: any valid graph; PerRank constants and collectives are honoured.
        threads: threads of each session (1: default sessions open one pool each, 369 threads for 3 ranks of a model).
        in_place: graph output -> graph input whose buffer receives it (the KV cache).
        weights: already read weights of each rank by value name, else they are read from the expressions.
        optimize: let onnxruntime rewrite the graph; without, every node is computed as it stands.
        ranks: the ranks that run here; ``weights`` and ``per_rank`` are of these.
        exchange: how collectives meet the ranks that run elsewhere.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        threads: int = 1,
        in_place: Mapping[str, str] | None = None,
        weights: Sequence[Mapping[str, Array]] | None = None,
        optimize: bool = True,
        ranks: Sequence[int] | None = None,
        exchange: Exchange = combine,
    ) -> None:
        self.graph = graph
        self.ranks: Sequence[int] = range(graph.ranks) if ranks is None else ranks
        self._exchange = exchange
        # a stage knows its outputs by the names of values
        inner = {name: value.name for name, value in graph.outputs.items()}
        self.in_place: dict[str, str] = {inner.get(name, name): source for name, source in (in_place or {}).items()}
        self._stages = _split(graph)
        loaded = weights if weights is not None else read_weights(graph, self.ranks)
        self._parts = [
            [_Part(stage, rank, mine, threads, optimize) for rank, mine in zip(self.ranks, loaded, strict=True)]
            for stage, _ in self._stages
        ]

    def run(self, feeds: Feeds, per_rank: Sequence[Feeds] | None = None) -> list[dict[str, Array]]:
        """Outputs of every rank that runs here; ``feeds`` go to all of them, ``per_rank`` (KV buffers) to one each."""
        values: list[dict[str, Array]] = [
            {**feeds, **(per_rank[index] if per_rank else {})} for index in range(len(self.ranks))
        ]
        missing = [v.name for v in self.graph.inputs if v.name not in values[0]]
        if missing:
            raise UserError(f"no value was given for the input {missing[0]!r}")
        for (_, collectives), parts in zip(self._stages, self._parts, strict=True):
            for one, part in zip(values, parts, strict=True):
                part.run(one, self.in_place)
            for node in collectives:
                source = node.inputs[0]
                assert source is not None
                results = self._exchange(node, [one[source.name] for one in values])
                for one, result in zip(values, results, strict=True):
                    one[node.output.name] = result
        return [
            {name: _result(v, value, rank) for name, value in self.graph.outputs.items()}
            for rank, v in zip(self.ranks, values, strict=True)
        ]


def _result(values: Mapping[str, Array], value: Value, rank: int) -> Array:
    return values[value.name] if value.const is None else value.const.rank(rank).read()


def _split(graph: Graph) -> list[tuple[Graph, list[Node]]]:
    """Stages in order: the graph of each, and the collectives that follow it."""
    level: dict[Node, int] = {}
    stages: dict[int, list[Node]] = {}
    exchanges: dict[int, list[Node]] = {}
    for node in graph.nodes():
        depth = 0
        for value in node.inputs:
            if value is not None and value.producer is not None:
                depth = max(depth, level[value.producer] + _is_collective(value.producer))
        level[node] = depth
        (exchanges if _is_collective(node) else stages).setdefault(depth, []).append(node)
    direct = set(graph.outputs.values())
    result = []
    for depth in range(max([*stages, *exchanges], default=-1) + 1):
        nodes = stages.get(depth, [])
        region = extract(graph, nodes, f"{graph.name}.{depth}", keep=direct)
        result.append((region, exchanges.get(depth, [])))
    return result or [(graph, [])]


def _is_collective(node: Node) -> bool:
    op = ops.get(node.op_type) if node.domain == ops.DOMAIN else None
    return op is not None and op.is_collective


def read_weights(
    graph: Graph, ranks: Iterable[int] | None = None, cache: MutableMapping[str, Array] | None = None
) -> list[dict[str, Array]]:
    """The stored constants of every rank, or of ``ranks``, read into memory; equal expressions are read once.

    ``cache`` holds what was read, by the key of its expression, for other graphs over the same weights.
    """
    cache = {} if cache is None else cache
    found: list[dict[str, Array]] = []
    for rank in range(graph.ranks) if ranks is None else ranks:
        tensors = stored_tensors(graph, rank)
        for expr in tensors.values():
            if expr.key not in cache:
                cache[expr.key] = np.asarray(expr.read(), order="C")
        found.append({name: cache[expr.key] for name, expr in tensors.items()})
    return found


def evaluate(graph: Graph, feeds: Feeds, per_rank: Sequence[Feeds] | None = None) -> dict[str, Array]:
    """Outputs of rank 0 on onnxruntime; for one run, else keep an :class:`Executable`."""
    return Executable(graph, threads=2).run(feeds, per_rank)[0]


def random_feeds(graph: Graph, sizes: Mapping[str, int], seed: int = 0, names: Iterable[str] = ()) -> dict[str, Array]:
    """Seeded inputs of the graph's types: normal floats, small integers, all-true masks."""
    rng = np.random.default_rng(seed)
    wanted = set(names)
    feeds: dict[str, Array] = {}
    for value in graph.inputs:
        if wanted and value.name not in wanted:
            continue
        dtype = value.type.dtype
        if dtype is DType.UNDEFINED:
            raise UserError(f"input {value.name!r} is a {value.type}; give a value for it")
        shape = _concrete(value, sizes)
        if dtype.is_float:
            feeds[value.name] = rng.standard_normal(shape).astype(dtype.numpy)
        elif dtype is DType.BOOL:
            feeds[value.name] = np.ones(shape, np.bool_)
        elif dtype is DType.STRING:
            feeds[value.name] = rng.integers(0, 4, shape).astype(str).astype(object)
        else:
            feeds[value.name] = rng.integers(0, 4, shape).astype(dtype.numpy)
    return feeds


def _concrete(value: Value, sizes: Mapping[str, int]) -> list[int]:
    shape: list[int] = []
    for dim in value.shape or ():
        bound = dim if isinstance(dim, int) else dim.bind(sizes)
        if not isinstance(bound, int):
            raise UserError(f"input {value.name!r} has the unbound dimension {bound}; give a size for it")
        shape.append(bound)
    return shape

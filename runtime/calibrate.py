"""Calibration as a configuration asks for it: KV scales and GPTQ codes, in a cache keyed by what they depend on.

``WORKSPACE/.calibration/KEY/`` holds one result. GPTQ keeps its finished layers there while it runs, so that a run that
was ended continues; a result that is there is used and not made again, unless it is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vacc_opt.calibration.activations import SPILLED, fresh_feeds
from vacc_opt.calibration.fp16_ranges import largest_magnitudes, save_ranges
from vacc_opt.calibration.gptq_model import LayerResult, Options, quantize_model
from vacc_opt.calibration.kv_file import read_scales
from vacc_opt.calibration.kv_scales import calibrate_kv
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Graph
from vacc_opt.ir.tensor import Literal
from vacc_opt.ir.weight_check import header_digest
from vacc_opt.ir.weights import formula, stored_parts
from vacc_opt.runtime.cache import Cache, kept_sha256
from vacc_opt.runtime.files import locked_directory
from vacc_opt.runtime.integrity import HEADER, damages
from vacc_opt.runtime.plan import CODES_FILE, RANGES_FILE, SCALES_FILE, Plan
from vacc_opt.runtime.subjects import Ids
from vacc_opt.runtime.tokenizer import Tokenizer

CACHE, LAYERS_FILE = ".calibration", "gptq_layers.json"
FORMAT = 1  # of what is computed: another one does not use older results
Say = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Calibrated:
    """Files of KV scales and of codes, where the plan needs them; what was done, in sentences; losses of the layers.

    ``seconds_a_text`` is what the KV ranges took; 0 where they were known.
    """

    scales: Path | None = None
    codes: Path | None = None
    ranges: Path | None = None
    sentences: tuple[str, ...] = ()
    layers: tuple[LayerResult, ...] = field(default=())
    seconds_a_text: float = 0.0


def calibrate(plan: Plan, graph: Graph, tokenizer: Tokenizer | None, scratch: Path, say: Say) -> Calibrated:
    """Make, or find in the cache, what the plan needs.

    Args:
        plan: of the configuration.
        graph: the recognized model, before ``kv-cache``.
        tokenizer: the model's.
        scratch: directory for files that are not kept.
        say: hears what runs, how much is done, of how much.

    Raises:
        UserError: the text cannot be used, there is no tokenizer, or a file of scales is of another form.
    """
    cache = Path(plan.config.workspace.path) / CACHE
    said: list[str] = []
    scales: Path | None = None
    codes: Path | None = None
    layers: list[LayerResult] = []
    each = 0.0
    ids = _sequences(plan, tokenizer) if plan.calibrates else []
    base = _fingerprint(plan, graph, ids) if plan.calibrates else ""
    if plan.cache_int8 and plan.kv_scales is not None:
        scales = scratch / SCALES_FILE
        read_scales(plan.kv_scales).save(scales)
    elif plan.cache_int8:
        started = time.perf_counter()
        scales, known = _scales(plan, graph, ids, cache, base, say)
        each = 0.0 if known else (time.perf_counter() - started) / len(ids)
        tokens = sum(one.shape[1] for one in ids)
        text = f"KV ranges of {_layer_count(scales)} layers over {len(ids)} texts, {tokens} tokens"
        said.append(f"cached, {text}" if known else f"{text}, {each:.2g} s a text")
    if plan.gptq:
        codes, layers, known = _codes(plan, graph, ids, cache, base, say)
        ratio = np.median([one.loss / one.rounding_loss for one in layers if one.rounding_loss > 0] or [1.0])
        floats = sum(one.kept for one in layers)
        said.append(
            f"{_cached(known)}GPTQ of {len(layers)} linears, {ratio:.2f} of the loss of rounding, {floats} stay float"
        )
    ranges = _ranges(graph, ids, scratch, say) if plan.guarded else None
    return Calibrated(scales, codes, ranges, tuple(said), tuple(layers), each)


def _sequences(plan: Plan, tokenizer: Tokenizer | None) -> list[Ids]:
    from vacc_opt.calibration.datasets import calibration_ids

    data = plan.config.dataset
    assert data is not None  # plan_compilation refuses it
    if tokenizer is None:
        raise UserError(
            f"{plan.config.frontend.checkpoint}: calibration needs the tokenizer, and there is none that is read",
            "put tokenizer.json beside the weights, or name scales in `frontend.quantize.kv_scales`",
        )
    length = min(data.seqlen, plan.context)
    return calibration_ids(
        Path(data.path), tokenizer, name=data.name, nsamples=data.nsamples, seqlen=length, seed=data.seed
    )


def _scales(plan: Plan, graph: Graph, ids: Sequence[Ids], cache: Path, base: str, say: Say) -> tuple[Path, bool]:
    assert plan.config.frontend.quantize is not None
    args = plan.config.frontend.quantize.kv_args
    key = _key("kv", base, args.symmetric, args.envelope)
    target = cache / key / SCALES_FILE
    with _alone(target.parent):
        if _is_whole(target):
            return target, True
        found = calibrate_kv(
            graph,
            ids,
            scratch=target.parent,
            symmetric=args.symmetric,
            envelope=args.envelope,
            progress=lambda done, of: say(f"calibrate: ranges, {done} of {of} parts", done, of),
        )
        part = target.with_name(target.name + ".tmp")
        found.save(part)
        os.replace(part, target)
    return target, False


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """In the directory of a result: another compilation may want the same, and one that was killed left its values."""
    with locked_directory(directory):
        for left in (*directory.glob(f"{SPILLED}*"), *directory.glob(f"work/{SPILLED}*")):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _is_whole(file: Path) -> bool:
    """A result is there, and its tensors are those that were written."""
    if not file.is_file():
        return False
    try:
        return not damages(file.parent, {file.name: {"bytes": file.stat().st_size, HEADER: header_digest(file)}})
    except UserError:
        return False


def _cached(known: bool) -> str:
    return "cached, " if known else ""


def _ranges(graph: Graph, ids: Sequence[Ids], scratch: Path, say: Say) -> Path:
    """The largest magnitudes of all values, which cost one run of the text and are not kept."""
    feeds = [fresh_feeds(graph, one) for one in ids]
    found = largest_magnitudes(
        graph, feeds, scratch, progress=lambda done, of: say(f"calibrate: ranges, {done} of {of} nodes", done, of)
    )
    save_ranges(scratch / RANGES_FILE, found)
    return scratch / RANGES_FILE


def _codes(
    plan: Plan, graph: Graph, ids: Sequence[Ids], cache: Path, base: str, say: Say
) -> tuple[Path, list[LayerResult], bool]:
    options = _options(plan)
    key = _key("gptq", base, asdict(options.solver) | {"device": ""}, options.true_sequential, options.keep_share)
    directory = cache / key
    codes, layers = directory / CODES_FILE, directory / LAYERS_FILE
    with _alone(directory):
        known = layers.is_file() and _is_whole(codes)  # the layers are written last
        if not known:
            found = quantize_model(
                graph,
                [fresh_feeds(graph, one) for one in ids],
                codes,
                directory / "work",
                key,
                options,
                lambda done, of: say(f"calibrate: {done} of {of} linears", done, of),
            )
            part = layers.with_name(layers.name + ".tmp")
            part.write_text(layers_text(found), encoding="utf-8")
            os.replace(part, layers)
            shutil.rmtree(directory / "work", ignore_errors=True)
    entries: list[dict[str, Any]] = json.loads(layers.read_text(encoding="utf-8"))
    return codes, [LayerResult(**{**one, "shape": tuple(one["shape"])}) for one in entries], known


def layers_text(layers: Sequence[LayerResult]) -> str:
    """The losses of the layers as JSON."""
    return json.dumps([asdict(one) for one in layers], indent=1) + "\n"


def _options(plan: Plan) -> Options:
    from vacc_opt.calibration.gptq import Solver, usable_device

    assert plan.config.frontend.quantize is not None
    quantize = plan.config.frontend.quantize
    args = quantize.calib_args
    solver = Solver(damping=args.damping, act_order=args.act_order, device=usable_device(quantize.device))
    return Options(solver=solver, true_sequential=args.true_sequential, threads=os.cpu_count() or 1)


def _fingerprint(plan: Plan, graph: Graph, ids: Sequence[Ids]) -> str:
    """Digest of the weight files, the graph over them, and the text; no place of this machine is in it."""
    digest = hashlib.sha256()
    for line in _content(graph, Cache.of(plan.config.workspace.path)):
        digest.update(line.encode() + b"\n")
    for one in ids:
        digest.update(np.ascontiguousarray(one, "<i8").tobytes() + b"\n")
    return digest.hexdigest()


def _content(graph: Graph, cache: Cache) -> Iterator[str]:
    files = {leaf.file for v in graph.constants() if v.const is not None for leaf in stored_parts(v.const)}
    yield from sorted(kept_sha256(cache, Path(file)) for file in files)
    for value in sorted(graph.constants(), key=lambda v: v.name):
        assert value.const is not None
        made = value.const.key if isinstance(value.const, Literal) else formula(value.const)
        yield f"{value.name} {value.type} {made}"
    for node in graph.nodes():
        inputs = [v.name if v is not None else "" for v in node.inputs]
        yield f"{node.op} {inputs} {[v.name for v in node.outputs]} {sorted(map(str, node.attributes.items()))}"


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((FORMAT, *parts)).encode()).hexdigest()[:32]


def _layer_count(scales: Path) -> int:
    return read_scales(scales).layers

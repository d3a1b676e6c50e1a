"""The driver of ``eval``: opens models, cuts the text into windows, measures, and writes the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from vacc_opt.ir.copy import copy
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.evaluate import read_weights
from vacc_opt.ir.graph import Graph
from vacc_opt.runtime.artifact import Artifact, is_artifact, open_artifact
from vacc_opt.runtime.entry_points import DECODE, EntryPoint
from vacc_opt.runtime.files import sha256
from vacc_opt.runtime.quality import ModelQuality, measure
from vacc_opt.runtime.subjects import BufferedSubject, EngineSubject, GrowingSubject, Ids, Subject
from vacc_opt.runtime.tokenizer import Tokenizer

WINDOW = 512


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate, and how; see the help of ``vacc-opt eval``."""

    models: tuple[str, ...]
    text: Path
    reference: str | None = None
    passes: tuple[str, ...] = ()
    decoded: tuple[str, ...] = ()
    window: int | None = None
    tokens: int | None = None
    kl_tokens: int | None = None
    chunk: int = 0
    engine: str = "onnxruntime"
    threads: int = 0


@dataclass(frozen=True)
class EvalReport:
    """Figures of all models on one text; ``reference_perplexity`` is None without a reference.

    Perplexities are of all ``tokens``; KL, changed tokens and layers of the first ``compared`` of them.
    """

    text: str
    text_sha256: str
    tokens: int
    window: int
    windows: int
    compared: int
    engine: str
    reference: str | None
    reference_perplexity: float | None
    models: tuple[ModelQuality, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        return asdict(self)

    def lines(self) -> list[str]:
        """A table for people."""
        head = f"{self.tokens} tokens of {self.text} in {self.windows} windows of {self.window}, engine {self.engine}"
        lines = [head]
        if self.reference is not None:
            part = f"; KL, top-1 and SNR of the first {self.compared} tokens" if self.compared < self.tokens else ""
            lines.append(f"reference {self.reference}: perplexity {self.reference_perplexity:.4f}{part}")
        width = max(len(one.name) for one in self.models)
        lines.append(
            f"  {'':<{width}}  perplexity  change (95 % interval)          KL nats (95 % interval)        top-1"
        )
        return lines + [f"  {one.name:<{width}}  {_row(one)}" for one in self.models]


def _row(one: ModelQuality) -> str:
    row = f"{one.perplexity:10.4f}"
    if one.kl is None or one.perplexity_interval is None or one.kl_interval is None or one.flips is None:
        return row
    change = f"{100 * (one.perplexity_change or 0):+.3f} % ({100 * one.perplexity_interval[0]:+.3f} to "
    change += f"{100 * one.perplexity_interval[1]:+.3f})"
    kl = f"{one.kl:.6f} ({one.kl_interval[0]:.6f} to {one.kl_interval[1]:.6f})"
    weak = one.weakest
    layer = f"   lowest SNR {weak.decibels:.1f} dB, {weak.signal} of layer {weak.layer}" if weak else ""
    return f"{row}  {change:<30}  {kl:<31} {100 * one.flips:5.2f} %{layer}"


class _Models:
    """Opens models; a checkpoint that is named twice is exported once."""

    def __init__(self, options: EvalOptions, say: Callable[[str], None]) -> None:
        self.options, self.say = options, say
        self.threads = options.threads or os.cpu_count() or 1
        self._graphs: dict[str, Graph] = {}
        self._read: dict[str, Any] = {}  # weights by expression: models of one checkpoint share them
        self.tokenizer: Tokenizer | None = None

    def graph(self, reference: str, window: int) -> Graph:
        """The recognized graph of a checkpoint or model file."""
        from vacc_opt.passes.infra.manager import run_pipeline
        from vacc_opt.passes.infra.presets import Recognize
        from vacc_opt.runtime.models import load_model

        if reference not in self._graphs:
            self.say(f"open {reference}")
            graph = load_model(reference)
            if graph.input_named("pos") is None:
                run_pipeline(graph, Recognize(max(window, WINDOW)).text())
            self._graphs[reference] = graph
        return copy(self._graphs[reference])

    def subjects(self, window: int) -> list[Subject]:
        """Every model, under every pipeline."""
        return [one for model in self.options.models for one in self._of(model, window)]

    def _of(self, model: str, window: int) -> list[Subject]:
        if is_artifact(Path(model)):
            if self.options.passes or self.options.decoded:
                raise UserError(f"{model}: is compiled already", "give --passes with a checkpoint")
            return [self._artifact(model)]
        if self.options.engine != "onnxruntime":
            raise UserError(f"{model}: only an artifact has a schedule", "compile it, or use --engine onnxruntime")
        chunk, decoded = self.options.chunk, self.options.decoded
        if not self.options.passes and not decoded:
            return [self._subject(model, self.graph(model, window), chunk)]
        return [
            *(self._passed(model, pipeline, pipeline, window, chunk) for pipeline in self.options.passes),
            *(self._passed(model, f"{pipeline} token by token", pipeline, window, 1) for pipeline in decoded),
        ]

    def _passed(self, model: str, name: str, pipeline: str, window: int, chunk: int) -> Subject:
        from vacc_opt.passes.infra.manager import run_pipeline

        graph = self.graph(model, window)
        self.say(f"run {pipeline}")
        run_pipeline(graph, pipeline)
        return self._subject(name, graph, chunk)

    def _subject(self, name: str, graph: Graph, chunk: int) -> Subject:
        weights = self.weights(graph)
        if graph.input_named("pos") is not None:
            return BufferedSubject(name, graph, chunk=chunk, threads=self.threads, weights=weights)
        if chunk:
            raise UserError(f"{name}: a graph without KV buffers takes the window at once", "add kv-cache{context=...}")
        return GrowingSubject(name, graph, threads=self.threads, weights=weights)

    def weights(self, graph: Graph) -> list[dict[str, Any]]:
        """The constants of a graph; what another graph has read already is not read again."""
        return read_weights(graph, cache=self._read)

    def _artifact(self, model: str) -> Subject:
        from vacc_opt.runtime.engines import make_engine

        artifact = open_artifact(Path(model))
        name, chunk = artifact.name, self.options.chunk
        if self.options.engine != "onnxruntime":
            if chunk > 1:
                raise UserError(f"{model}: the engine {self.options.engine} is measured token by token", "--chunk 1")
            return EngineSubject(name, make_engine(self.options.engine, artifact))
        phase = _entry(artifact, chunk).name
        weights = [artifact.weights(phase, rank) for rank in range(artifact.ranks)]
        return BufferedSubject(name, artifact.graph(phase), chunk=chunk, threads=self.threads, weights=weights)

    def find_tokenizer(self) -> Tokenizer:
        """The tokenizer of the first model that has one, or of the reference."""
        from vacc_opt.runtime.compile import find_tokenizer

        for model in [*self.options.models, *([self.options.reference] if self.options.reference else [])]:
            if is_artifact(Path(model)):
                return open_artifact(Path(model)).tokenizer()
            found = find_tokenizer(model)
            if found is not None:
                return found
        raise UserError(f"{self.options.models[0]}: no tokenizer that is read", "put its tokenizer.json beside it")


def evaluate_models(
    options: EvalOptions,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | None = None,
) -> EvalReport:
    """Measure models on a text.

    Raises:
        UserError: a model or the text cannot be used, or the text is shorter than two tokens.
        CheckError: a graph does not run, or gives NaN.
    """
    models = _Models(options, say)
    window = options.window or min([WINDOW, *_capacities(options.models)])
    ids = windows_of(options.text, models.find_tokenizer(), window, options.tokens)
    reference = None
    if options.reference is not None:
        if is_artifact(Path(options.reference)):
            raise UserError(f"{options.reference}: the reference is a checkpoint", "give its directory or file")
        graph = models.graph(options.reference, window)
        reference = GrowingSubject(options.reference, graph, threads=models.threads, weights=models.weights(graph))
    compared = _windows_within(ids, options.kl_tokens)
    found, perplexity = measure(models.subjects(window), ids, reference, progress, compared)
    return EvalReport(
        text=options.text.name,
        text_sha256=sha256(options.text),
        tokens=sum(map(len, ids)),
        window=window,
        windows=len(ids),
        compared=sum(map(len, ids[:compared])),
        engine=options.engine,
        reference=_short(options.reference) if options.reference else None,
        reference_perplexity=perplexity,
        models=tuple(found),
    )


def windows_of(text: Path, tokenizer: Tokenizer, window: int, tokens: int | None = None) -> list[Ids]:
    """The text as consecutive windows of token ids, the first ``tokens`` of it; a rest of one token is dropped.

    Where the model wants its first token to be bos, every window begins with it.
    """
    if window < 2:
        raise UserError(f"--window is {window}, it is at least 2 tokens")
    try:
        words = text.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{text}: cannot read the text: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{text}: not UTF-8 text: {error.reason}") from error
    bos = tokenizer.tokens.get("bos_token")
    head = tokenizer.encode(bos) if bos and tokenizer.add_bos else []
    ids = tokenizer.encode(words)[:tokens]
    step = window - len(head)
    parts = [head + ids[at : at + step] for at in range(0, len(ids), step)]
    found = [np.asarray(part, np.int64) for part in parts if len(part) >= 2]
    if not found:
        raise UserError(f"{text}: {len(ids)} tokens are too few to predict one")
    return found


def _entry(artifact: Artifact, chunk: int) -> EntryPoint:
    """Decode token by token, else the longest prefill, over the largest buffers."""
    entries = artifact.entries(artifact.context)
    decode = next((one for one in entries if one.kind == DECODE), None)
    return decode if chunk == 1 and decode is not None else max(entries, key=lambda one: one.tokens)


def _windows_within(windows: Sequence[Ids], tokens: int | None) -> int:
    """How many windows hold the first ``tokens``."""
    if tokens is None:
        return len(windows)
    ends = accumulate(map(len, windows))
    return next((i for i, end in enumerate(ends, 1) if end >= tokens), len(windows))


def _capacities(models: Sequence[str]) -> list[int]:
    return [open_artifact(Path(model)).context for model in models if is_artifact(Path(model))]


def _short(reference: str) -> str:
    """The name of a checkpoint without the directories of this machine."""
    return reference if reference.startswith("package:") else Path(reference).name

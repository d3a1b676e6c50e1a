"""The artifact: a directory with the weights of each rank once, an ONNX file a phase and rank, schedules and reports.

Equal inputs give equal bytes: no time, host or path of the machine is written. ``manifest.json`` holds the digest of
every other file.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt._version import __version__
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.ir.graph import Graph
from vacc_opt.ir.storage import read_safetensors_header, save_onnx
from vacc_opt.ir.tensor import PerRank, Source
from vacc_opt.ir.weight_files import write_weight_files
from vacc_opt.runtime import tokenizer as tokenizers
from vacc_opt.runtime.entry_points import EntryPoint
from vacc_opt.runtime.files import replaced_directory
from vacc_opt.runtime.integrity import check_file, check_weights, file_entry
from vacc_opt.runtime.kept_weights import KeptWeights
from vacc_opt.runtime.report import ModelFacts
from vacc_opt.runtime.stored import PhaseModel, stored_constants, table_file, weight_file
from vacc_opt.runtime.workers import cores

Array = npt.NDArray[Any]
FORMAT, FORMAT_VERSION = "vacc-artifact", 1
_OF_RANK = re.compile(r"\brank(\d+)\.(?:safetensors|onnx)$")
MANIFEST, REMARKS, TARGET = "manifest.json", "remarks.yaml", "target.yaml"


def write_artifact(
    path: Path,
    *,
    phases: Sequence[PhaseModel],
    facts: Mapping[str, Any],
    texts: Mapping[str, str],
    tokenizer: tokenizers.Tokenizer | None,
    files: Sequence[Path] = (),
    progress: Callable[[int, int], None] | None = None,
    kept: KeptWeights | None = None,
) -> Artifact:
    """Write the directory ``path`` in one step; an artifact that stands there is replaced only when all is complete.

    Args:
        path: its last part is the artifact's name.
        phases: prefill first; all of one rank count.
        facts: further entries of the manifest (JSON values).
        texts: further files by name.
        tokenizer: its files are stored too.
        files: further files, copied.
        progress: hears (bytes written, bytes in all) of the weights.
        kept: where weight files of equal content may lie, which are then linked.

    Raises:
        UserError: a directory that is not an artifact is in the way.
    """
    ranks = phases[0].graph.ranks
    with replaced_directory(path, is_artifact) as directory:
        aliases = write_phases(directory, phases, ranks, progress, kept)
        for phase in phases:
            (directory / f"{phase.name}.schedule").write_text(phase.schedule, encoding="utf-8")
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
        for file in files:
            shutil.copyfile(file, directory / file.name)
        if tokenizer is not None:
            tokenizer.save(directory)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "vacc_opt": __version__,
            "name": path.name,
            "ranks": ranks,
            "phases": {p.name: {**_interface(p.graph), "weight_names": aliases[p.name]} for p in phases},
            **facts,
            "files": {p.name: file_entry(p) for p in sorted(directory.iterdir())},
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
    if kept is not None:
        kept.remember(path)
    return open_artifact(path)


def write_phases(
    directory: Path,
    phases: Sequence[PhaseModel],
    ranks: int,
    progress: Callable[[int, int], None] | None = None,
    kept: KeptWeights | None = None,
) -> dict[str, dict[str, str]]:
    """Weights of all phases once a rank, and the ONNX files over them; gives the stored name where it differs.

    All ranks are written in one pass over the checkpoint, by a thread for each core.
    """
    stored = [stored_constants(phases, rank) for rank in range(ranks)]
    files = [one.files(directory) for one in stored]
    weights, tables = [first for first, *_ in files], [file for _, *rest in files for file in rest]
    left = weights if kept is None else kept.take(weights)
    write_weight_files([*left, *tables], workers=cores(), progress=progress)
    for one in stored:
        offsets = {file.path.name: file.offsets() for file in one.files(directory)}
        for phase in phases:
            path = directory / f"{phase.name}.rank{one.rank}.onnx"
            save_onnx(phase.graph, path, rank=one.rank, places=one.places(phase, offsets))
    return stored[0].aliases  # the same for every rank


def _interface(graph: Graph) -> dict[str, dict[str, str]]:
    return {
        "inputs": {v.name: str(v.type) for v in graph.inputs},
        "outputs": {name: str(v.type) for name, v in graph.outputs.items()},
    }


def is_artifact(path: Path) -> bool:
    """Whether a directory holds a manifest of ours, of any version."""
    try:
        return bool(json.loads((path / MANIFEST).read_bytes()).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return False


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk whose files are all there and undamaged; data of weights is checked when it is asked for."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.manifest["name"])

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks."""
        return int(self.manifest["ranks"])

    @property
    def phases(self) -> tuple[str, ...]:
        """Names of the entry points: ``prefill`` and ``decode``, or such with their sizes where there are several."""
        return tuple(self.manifest["phases"])

    @cached_property
    def entry_points(self) -> dict[str, EntryPoint]:
        """The phases with their sizes, by name, prefill first."""
        return {name: EntryPoint.from_json(name, one) for name, one in self.manifest["entry_points"].items()}

    @property
    def contexts(self) -> tuple[int, ...]:
        """Tokens that KV buffers can hold, ascending."""
        return tuple(sorted({one.context for one in self.entry_points.values()}))

    @property
    def context(self) -> int:
        """Tokens that the largest KV buffers hold."""
        return self.contexts[-1]

    def entries(self, context: int) -> tuple[EntryPoint, ...]:
        """The entry points that share KV buffers of ``context`` tokens; raises UserError when there are none."""
        found = tuple(one for one in self.entry_points.values() if one.context == context)
        if not found:
            raise UserError(
                f"{self.path}: has no context {context}", did_you_mean(str(context), map(str, self.contexts))
            )
        return found

    def find_phase(self, name: str) -> EntryPoint:
        """The phase of that name, or the only one of that kind.

        Raises:
            UserError: there is none, or there are several; they are named.
        """
        named = self.entry_points.get(name)
        found = [one for one in self.entry_points.values() if one.kind == name] if named is None else [named]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"{self.path}: has several phases {name!r}", f"name one: {', '.join(p.name for p in found)}"
            )
        raise UserError(f"{self.path}: has no phase {name!r}", did_you_mean(name, self.phases))

    @property
    def files(self) -> dict[str, int]:
        """Bytes of every file but the manifest, by name."""
        return {name: int(entry["bytes"]) for name, entry in self.manifest["files"].items()}

    @property
    def facts(self) -> ModelFacts:
        """What was made: fusions, bytes, schedules, prediction."""
        return ModelFacts.from_json(self.manifest["made"])

    @cached_property
    def _mapped(self) -> dict[str, dict[str, Array]]:
        return {}

    def _stored(self, name: str) -> dict[str, Array]:
        """Every tensor of a file, checked and mapped; one that is not aligned is copied."""
        if name not in self._mapped:
            check_weights(self.path, name, self.manifest["files"][name])
            sources = read_safetensors_header(self.path / name)
            data = np.memmap(self.path / name, np.uint8, "r")
            self._mapped[name] = {tensor: _view(data, source) for tensor, source in sources.items()}
        return self._mapped[name]

    def weights(self, phase: str, rank: int) -> dict[str, Array]:
        """The constants of a phase by the names that its graph and schedule use."""
        weights, tables = self._stored(weight_file(rank)), table_file(phase, rank)
        renamed = {name: weights[other] for name, other in self.manifest["phases"][phase]["weight_names"].items()}
        return {**weights, **renamed, **(self._stored(tables) if tables in self.files else {})}

    def schedule(self, phase: str) -> str:
        """The schedule of a phase as text; raises UserError for a phase that the artifact has not."""
        return (self.path / f"{self.find_phase(phase).name}.schedule").read_text(encoding="utf-8")

    def rank_graph(self, phase: str, rank: int) -> Graph:
        """The graph of all ranks with the constants of one, from that rank's ONNX file alone."""
        from vacc_opt.frontends import load_onnx

        graph = load_onnx(self.path / f"{self.find_phase(phase).name}.rank{rank}.onnx")
        graph.ranks = self.ranks
        return graph

    def graph(self, phase: str) -> Graph:
        """One graph for all ranks, put together from the ONNX files of the ranks; constants refer to the files."""
        parts = [self.rank_graph(phase, rank) for rank in range(self.ranks)]
        whole = parts[0]
        if self.ranks > 1:
            for value in whole.constants():
                expressions = tuple(c for c in (p.values[value.name].const for p in parts) if c is not None)
                if any(isinstance(e, Source) for e in expressions):
                    value.const = PerRank(expressions)
        return whole

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The model's tokenizer; raises UserError when the artifact was made without one."""
        return tokenizers.load_tokenizer(self.path)


def _view(data: npt.NDArray[np.uint8], source: Source) -> Array:
    raw = data[source.offset : source.offset + source.nbytes]
    array: Array = raw.view(source.dtype.numpy).reshape(source.shape)
    return array if array.flags.aligned else np.array(array)


def open_artifact(path: Path, rank: int | None = None) -> Artifact:
    """Open an artifact and check every file against its digest; with ``rank``, files of other ranks may be elsewhere.

    Of weight files, which may be large, the size and the header, which holds the digest of each tensor, are checked.

    Raises:
        UserError: not an artifact, one of a newer version, or a file that is missing or damaged, which is named.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such artifact directory", "`vacc-opt compile CONFIG.yaml` makes one")
    if not is_artifact(path):
        raise UserError(f"{path}: not an artifact: no {MANIFEST} of ours", "give a directory that `compile` wrote")
    manifest = json.loads((path / MANIFEST).read_bytes())
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: artifact format {manifest.get('format_version')}, this vacc-opt reads {FORMAT_VERSION}",
            "compile it again",
        )
    for name, entry in manifest["files"].items():
        owner = _OF_RANK.search(name)
        if rank is None or owner is None or int(owner[1]) == rank:
            check_file(path, name, entry)
    return Artifact(path, manifest)

"""Models as files: load whatever form a path names, write a graph in the form that an output path asks for."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Graph
from vacc_opt.ir.infer import RULES_OPSET
from vacc_opt.ir.storage import save_onnx
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import InvalidGraph, verify
from vacc_opt.ir.weights import stored_parts
from vacc_opt.runtime.files import remove_abandoned, scratch_directory

TEXT_SUFFIX = ".vacc"
_SCRATCH = ".vacc-opt-"
_OURS = re.compile(r"(rank\d+|model)\.(onnx|safetensors)|(prefill|decode)[\w-]*\.rank\d+\.(onnx|safetensors)")


@dataclass(frozen=True)
class Written:
    """A file that was written."""

    path: Path
    bytes: int

    def __str__(self) -> str:
        return f"{self.path}  {format_bytes(self.bytes)}"


def format_bytes(count: float) -> str:
    """Bytes in decimal units with about three digits.

    >>> format_bytes(47_210_000), format_bytes(812)
    ('47.2 MB', '812 B')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def load_model(
    reference: str,
    *,
    attention: str = "eager",
    trust_remote_code: bool = False,
    keep_functions: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Graph:
    """The graph of an .onnx file, a text form (.vacc, or ``-`` for standard input), or a checkpoint (directory, .gguf,
    ``package:NAME/FILE``); verified, so that no pass is blamed for what was wrong before it.

    ``trust_remote_code``: run the code that comes with a checkpoint.
    ``keep_functions``: let the local functions of an .onnx file be bodies instead of inlining them.

    Raises:
        UserError: the file is missing, damaged, of no known form, or not a valid graph.
    """
    from vacc_opt.frontends import export_checkpoint

    export = partial(export_checkpoint, attention=attention, trust_remote_code=trust_remote_code, progress=progress)
    graph = _read(reference, export, keep_functions)
    try:
        verify(graph)
    except InvalidGraph as error:
        raise UserError(f"{reference}: {error.message}", "the model was like this before any pass") from error
    return graph


def _read(reference: str, export: Callable[[str | Path], Graph], keep_functions: bool) -> Graph:
    from vacc_opt.frontends import load_onnx

    if reference.startswith("package:"):
        return export(reference)
    if reference == "-":
        return _from_text(sys.stdin.read, "standard input")
    path = Path(reference).expanduser()
    if not path.exists():
        raise UserError(f"{reference}: no such file or directory")
    if path.suffix == ".onnx":
        return load_onnx(path, keep_functions=keep_functions)
    if path.suffix == TEXT_SUFFIX:
        return _from_text(partial(path.read_text, encoding="utf-8"), reference)
    if path.is_dir() or path.suffix == ".gguf":
        return export(path)
    raise UserError(
        f"{reference}: not a model", "give an .onnx file, a .vacc text, a Hugging Face directory or a .gguf file"
    )


def _from_text(read: Callable[[], str], name: str) -> Graph:
    try:
        text = read()
        text.encode()  # standard input may let bytes through that are no text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UserError(f"{name}: not text: {error.reason}") from error
    try:
        return from_text(text)
    except UserError as error:
        raise UserError(f"{name}: {error.message}", error.hint) from error


def describe(graph: Graph) -> str:
    """A sentence: how many nodes, and where it says so, the model and its size."""
    parameters = graph.metadata.get("parameters", "")
    model = f"{graph.metadata['model_type']}, " if "model_type" in graph.metadata else ""
    size = f"{int(parameters) / 1e6:.0f} M parameters, " if parameters.isdigit() else ""
    ranks = f", {graph.ranks} ranks" if graph.ranks > 1 else ""
    old = f", opset {graph.opset}: too old for most passes" if graph.opset < RULES_OPSET else ""
    return f"{model}{size}{len(graph)} nodes{ranks}{old}"


def check_output(path: Path) -> None:
    """Refuse an output that could not be written, before any work; raises UserError."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{path}: the directory {parent} does not exist")
    if path.suffix in (".onnx", TEXT_SUFFIX) and path.is_dir():
        raise UserError(f"{path}: is a directory", "name a file")
    if path.suffix not in (".onnx", TEXT_SUFFIX) and not path.is_dir() and (path.exists() or path.suffix):
        raise UserError(f"{path}: no form of a model", "end OUT in .onnx or .vacc, or name a directory")
    if (path / "config.json").exists():
        raise UserError(f"{path}: is a checkpoint", "its weights would be replaced; name another directory")
    weights = path.with_suffix(".safetensors")
    if path.suffix == ".onnx" and weights.exists() and not path.exists():
        raise UserError(
            f"{path}: its weights would overwrite {weights.name}, which is not of an earlier {path.name}",
            "choose another name",
        )
    if not os.access(path if path.is_dir() else parent, os.W_OK):
        raise UserError(f"{path}: the directory {parent} cannot be written to")


def model_text(graph: Graph) -> str:
    """The text form; of a graph with phases that of each phase under a comment with its name."""
    if not graph.phases:
        return to_text(graph)
    return "".join(f"# phase {name}\n{to_text(phase)}" for name, phase in graph.phases.items())


def write_model(graph: Graph, out: Path) -> list[Written]:
    """Write text (.vacc), one ONNX file with its weights beside it, or a directory with a file a rank.

    Of a graph with phases only these are written: into a directory, an ONNX file a phase and rank over weights that
    are stored once a rank. The files appear under their names only when all are complete; a failure leaves what was
    there before.

    Raises:
        UserError: the form that ``out`` asks for cannot hold this graph.
    """
    check_output(out)
    if graph.phases and out.suffix in (".onnx", TEXT_SUFFIX):
        phases = ", ".join(graph.phases)
        raise UserError(f"{out}: the model has phases ({phases})", "name a directory (a file a phase and rank)")
    if out.suffix == TEXT_SUFFIX:
        return _publish(out.parent, lambda scratch: _write_text(graph, scratch / out.name))
    if out.suffix == ".onnx":
        if graph.ranks > 1:
            raise UserError(
                f"{out}: the graph is split over {graph.ranks} ranks",
                "name a directory (a file a rank), or end the pipeline with `expand-ranks` (one file of all ranks)",
            )
        return _publish(out.parent, lambda scratch: save_onnx(graph, scratch / out.name))
    existed = out.is_dir()
    out.mkdir(exist_ok=True)
    try:
        written = _publish(out, lambda scratch: _write_ranks(graph, scratch))
        read = _read_stems(graph)  # an input may lie there too
        for stale in set(_rank_files(out)) - {one.path for one in written}:
            if stale.resolve().with_suffix("") not in read:
                stale.unlink()  # of an earlier split or of other phases
        return written
    except BaseException:
        if not existed:
            out.rmdir()
        raise


def _rank_files(directory: Path) -> list[Path]:
    return [p for p in directory.iterdir() if _OURS.fullmatch(p.name)]


def _read_stems(graph: Graph) -> set[Path]:
    """The files, without their endings, that hold weights of the graph."""
    constants = (v.const for one in (graph, *graph.phases.values()) for v in one.constants() if v.const is not None)
    return {Path(part.file).resolve().with_suffix("") for const in constants for part in stored_parts(const)}


def _write_text(graph: Graph, path: Path) -> None:
    path.write_text(to_text(graph), encoding="utf-8")


def _write_ranks(graph: Graph, directory: Path) -> None:
    if graph.phases:
        from vacc_opt.runtime.artifact import write_phases
        from vacc_opt.runtime.stored import PhaseModel

        phases = [PhaseModel(name, phase, "", ()) for name, phase in graph.phases.items()]
        write_phases(directory, phases, phases[0].graph.ranks)
        return
    for rank in range(graph.ranks):
        name = f"rank{rank}" if graph.ranks > 1 else "model"
        save_onnx(graph, directory / f"{name}.onnx", rank=rank)


def _publish(directory: Path, write: Callable[[Path], None]) -> list[Written]:
    """Let ``write`` fill a scratch directory beside the target, then move its files in, weights before graphs."""
    remove_abandoned(directory, _SCRATCH)
    with scratch_directory(directory, _SCRATCH) as scratch:
        write(scratch)
        files = sorted(scratch.iterdir(), key=lambda p: (p.suffix == ".onnx", p.name))
        written = [Written(directory / p.name, p.stat().st_size) for p in files]
        for path in files:
            path.replace(directory / path.name)
    return written

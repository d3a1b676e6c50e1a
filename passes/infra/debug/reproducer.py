"""Reproducers: a failed run as one text file (graph, rest of the pipeline, options, versions) that replays anywhere.

The file is the text form of the graph in front of the failing pass, with ``# reproducer KEY = VALUE`` lines before it
that its parser skips, so `vacc-opt opt FILE -p ...` reads it as any other model.
"""

from __future__ import annotations

import base64
import json
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from vacc_opt._version import __version__
from vacc_opt.ir import Graph, Source
from vacc_opt.ir.errors import CheckError, UserError, VaccError
from vacc_opt.ir.seeded import stand_in, with_leaves
from vacc_opt.ir.tensor import Gguf, TensorExpr
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.weights import stored_parts
from vacc_opt.passes.infra.base import Pass
from vacc_opt.passes.infra.check.layerwise import is_there
from vacc_opt.passes.infra.check.numerics import CheckNumerics, NumericMismatch
from vacc_opt.passes.infra.instrument import Instrument, Step
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.pipeline import dump_pipeline, flat, parse_pipeline
from vacc_opt.passes.infra.scopes import Fixpoint, Scope
from vacc_opt.passes.infra.show.files import write_whole

if TYPE_CHECKING:
    from vacc_opt.passes.infra.pipeline import Item

_LINE = re.compile(r"^# reproducer ([\w.-]+)(?: (\S+))? = (.*)$", re.MULTILINE)
_LIBRARIES = ("numpy", "onnx", "onnxruntime", "networkx")
FILE_BYTES = 1 << 20  # files that an option names are carried along up to this size


@dataclass(frozen=True)
class Numerics:
    """The options of ``--check-numerics``."""

    tolerance: float | None = None
    seed: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    weights: str = "auto"

    def instrument(self) -> CheckNumerics:
        """The check."""
        return CheckNumerics(self.tolerance, seed=self.seed, sizes=self.sizes, weights=self.weights)


@dataclass(frozen=True)
class Reproducer:
    """A run that can be repeated: graph, pipeline and checks; and how it failed, if it did.

    ``failure`` identifies what went wrong, ``error`` says it. ``files`` are contents of files that the pipeline reads.
    """

    graph: Graph
    pipeline: str
    numerics: Numerics | None = None
    verify_each: bool = True
    failure: str = ""
    error: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: str = ""

    def text(self) -> str:
        """The file's content; the same reproducer gives the same bytes."""
        lines = [("pipeline", self.pipeline)]
        lines += [("failure", self.failure), ("error", json.dumps(self.error))] if self.failure else []
        if self.numerics is not None:
            lines.append(("check-numerics", json.dumps(vars(self.numerics))))
        lines += [("verify-each", str(self.verify_each).lower()), ("versions", self.versions or versions())]
        lines += [("note", note) for note in self.notes]
        head = [f"# reproducer {key} = {value}" for key, value in lines]
        files = [(quote(name), base64.b64encode(data).decode()) for name, data in sorted(self.files.items())]
        head += [f"# reproducer file {name} = {data}" for name, data in files]
        return "\n".join(["# Replay: vacc-opt opt --run-reproducer THIS_FILE", *head, to_text(self.graph)])

    @staticmethod
    def read(path: Path) -> Reproducer:
        """Read a file; weights whose files are not there become seeded ones, which a note says.

        Raises:
            UserError: the file is missing, or no reproducer.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not text'}") from error
        found = _LINE.findall(text)
        if not any(key == "pipeline" for key, _, _ in found):
            raise UserError(
                f"{path}: no reproducer", "one is written when a pipeline fails, or by --generate-reproducer"
            )
        keys = {key: rest for key, _, rest in found if key not in ("note", "file")}
        graph = from_text(text)
        missing = seed_missing(graph)
        notes = [f"seeded weights stand for {file}, which is not here" for file in missing]
        return Reproducer(
            graph,
            keys["pipeline"],
            Numerics(**json.loads(keys["check-numerics"])) if "check-numerics" in keys else None,
            keys.get("verify-each", "true") == "true",
            keys.get("failure", ""),
            json.loads(keys.get("error", '""')),
            {unquote(name): base64.b64decode(rest) for key, name, rest in found if key == "file"},
            tuple([rest for key, _, rest in found if key == "note"] + notes),
            keys.get("versions", ""),
        )

    def replay(self, instruments: Sequence[Instrument] = ()) -> Exception | None:
        """Run it again; gives what was raised. The graph is that of the failing pass, or of the end, afterwards."""
        with tempfile.TemporaryDirectory(prefix="vacc-opt-") as scratch:
            items = parse_pipeline(self.pipeline)
            # numbered: two files of other directories may have one name
            places = {n: Path(scratch) / f"{i}-{Path(n).name}" for i, n in enumerate(sorted(self.files))}
            for name, place in places.items():
                place.write_bytes(self.files[name])
            items = [_relocated(item, places) for item in items]
            checks = [self.numerics.instrument()] if self.numerics is not None else []
            try:
                run_pipeline(self.graph, items, verify_each=self.verify_each, instruments=[*checks, *instruments])
            except Exception as error:
                return error
        return None


def versions() -> str:
    """Our version and those of what computes."""
    found = [f"{name} {metadata.version(name)}" for name in _LIBRARIES]
    return ", ".join([f"vacc-opt {__version__}", f"python {platform.python_version()}", *found])


def failure_of(error: Exception) -> str:
    """What identifies a failure: its kind and place, without numbers that differ between machines."""
    if isinstance(error, NumericMismatch):
        application = f" application {error.application.index}" if error.application is not None else ""
        value = f" value {error.difference.name}" if error.difference is not None else ""
        return f"NumericMismatch {error.pass_name}{application}{value}"
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__} {first}"


def seed_missing(graph: Graph) -> list[str]:
    """Put seeded numbers in place of weights whose files do not hold them; gives the names of those files."""
    missing: dict[str, None] = {}

    def stands(leaf: Source | Gguf) -> TensorExpr:
        if is_there(leaf):
            return leaf
        missing[leaf.file] = None
        return stand_in(leaf)

    for value in graph.values.values():
        if value.const is not None:
            value.const = with_leaves(value.const, stands)
    return sorted(missing)


def rest_of(items: Sequence[Item], item: Pass) -> list[Item]:
    """The pipeline from ``item`` on; inside a phase or a function only that scope's, whose graph is another."""
    return _rest(items, item) or [item]


def _rest(items: Sequence[Item], item: Pass) -> list[Item] | None:
    for index, one in enumerate(items):
        if one is item:
            return list(items[index:])
        if isinstance(one, Scope):
            inner = _rest(one.body, item)
            if inner is not None:
                return [*inner, one, *items[index + 1 :]] if isinstance(one, Fixpoint) else inner
    return None


def file_options(items: Sequence[Item]) -> Iterator[tuple[str, Path]]:
    """(text of the option, path) of every option of a pass that names an existing file."""
    for item in flat(items):
        for one in item.options():
            value = getattr(item, one.name)
            if isinstance(value, str) and value and Path(value).is_file():
                yield value, Path(value)


def _carried(items: Sequence[Item]) -> tuple[dict[str, bytes], list[str]]:
    files, notes = {}, []
    for text, path in file_options(items):
        if path.stat().st_size <= FILE_BYTES:
            files[text] = path.read_bytes()
        else:
            notes.append(f"the pipeline reads {text}, which is too large to be carried along")
    return files, notes


def _relocated(item: Item, places: Mapping[str, Path]) -> Item:
    """The item with its options naming the files where they lie now."""
    changed = {
        one.name: str(places[value])
        for one in item.options()
        if isinstance(value := getattr(item, one.name), str) and value in places
    }
    if isinstance(item, Scope):
        return replace(item, body=tuple(_relocated(one, places) for one in item.body))
    return replace(item, **changed) if changed else item


def reproducer_of(
    graph: Graph,
    items: Sequence[Item],
    *,
    numerics: Numerics | None = None,
    verify_each: bool = True,
    error: Exception | None = None,
    notes: Sequence[str] = (),
) -> Reproducer:
    """The reproducer of running ``items`` on ``graph``; what only files hold is noted."""
    files, more = _carried(items)
    weights = sorted({leaf.file for v in graph.constants() if v.const is not None for leaf in stored_parts(v.const)})
    more += [f"weights of {file} are referred to; seeded ones take their place where it is missing" for file in weights]
    said = "" if error is None else str(error)
    failure = "" if error is None else failure_of(error)
    return Reproducer(graph, dump_pipeline(items), numerics, verify_each, failure, said, files, (*notes, *more))


class WriteReproducer(Instrument):
    """Writes a reproducer when a pass, its verification or a check fails, or (``always``) of the whole run.

    An error of the user (a wrong option) gets one only where ``path`` was asked for. The error says where the file is.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        numerics: Numerics | None = None,
        verify_each: bool = True,
        always: bool = False,
    ) -> None:
        self.path = path
        self.always = always
        self.numerics = numerics
        self.verify_each = verify_each
        self.written: Path | None = None
        self._items: Sequence[Item] = ()

    def started(self, graph: Graph, items: Sequence[Item]) -> None:
        """Write the whole run, if asked to."""
        self._items = items
        if self.always and self.path is not None:
            self._write(self.path, reproducer_of(graph, items, numerics=self.numerics, verify_each=self.verify_each))

    def failed(self, step: Step, graph: Graph, error: Exception) -> None:
        """Write what failed, and let the error name the file."""
        if self.always or (isinstance(error, UserError) and self.path is None):
            return
        path = self.path or Path(tempfile.mkdtemp(prefix="vacc-opt-")) / "reproducer.vacc"
        notes = [f"the graph is that of the scope {step.scope!r}"] if step.scope else []
        rest = rest_of(self._items, step.item)
        made = reproducer_of(
            graph, rest, numerics=self.numerics, verify_each=self.verify_each, error=error, notes=notes
        )
        self._write(path, made)
        words = f"reproducer: vacc-opt opt --run-reproducer {path}"
        if isinstance(error, VaccError):
            error.hint = words if error.hint is None else f"{error.hint}\n  {words}"
        else:
            error.add_note(words)

    def _write(self, path: Path, made: Reproducer) -> None:
        write_whole(path, made.text())
        self.written = path


def check_replay(reproducer: Reproducer, error: Exception | None) -> str:
    """One sentence about a replay that did not fail any more.

    Raises:
        CheckError: it failed, the same way as then or another.
    """
    if error is None:
        then = "; then it failed" if reproducer.failure else ", as it did then"
        return f"the pipeline runs without an error{then}"
    if reproducer.failure and failure_of(error) == reproducer.failure:
        raise CheckError(f"it fails the same way: {error}") from error
    before = f"then: {reproducer.error.splitlines()[0]}" if reproducer.error else "then it did not fail"
    raise CheckError(f"it fails another way: {error}", before) from error

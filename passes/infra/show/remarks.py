"""Remarks as a YAML file: what each pass said of each place, written the same way every time and read back safely."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vacc_opt.ir import Graph
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Remark
from vacc_opt.passes.infra.instrument import Instrument, PassRecord, Report, Step
from vacc_opt.passes.infra.show.files import check_place, write_whole

FILE_NAME = "remarks.yaml"  # inside an artifact
KINDS = ("passed", "missed", "analysis")
_HEADER = "# what each pass said of each place: passed (rewritten), missed (and why), analysis (a fact)"
_NEEDED = ("kind", "pass", "message")
_OPTIONAL = ("where", "scope")
_WHERE = re.compile(r"(\S+) \((.*)\)")
_SOURCE = re.compile(r"(?:(\S+) )?(\S+:\d+)(?: .*)?")


@dataclass(frozen=True)
class Entry:
    """A remark of a run, and the scope (a phase, a function) whose graph the pass ran on."""

    remark: Remark
    scope: str = ""

    @property
    def by(self) -> str:
        """The pass, with the scope where there is one."""
        return f"{self.scope}: {self.remark.pass_name}" if self.scope else self.remark.pass_name

    @property
    def module(self) -> str:
        """The module path of the model, empty where the remark has none."""
        return self._place()[0]

    @property
    def place(self) -> str:
        """Module path and source line, without the name of a node; the node where the model says nothing."""
        module, source = self._place()
        return " ".join(part for part in (module, source) if part) or self.remark.where or "the whole graph"

    def _place(self) -> tuple[str, str]:
        outer = _WHERE.fullmatch(self.remark.where)
        inner = _SOURCE.fullmatch(outer[2]) if outer is not None else None
        return (inner[1] or "", inner[2]) if inner is not None else ("", "")


def entries(records: Iterable[PassRecord]) -> list[Entry]:
    """All remarks of a run in order."""
    return [Entry(remark, record.scope) for record in records for remark in record.remarks]


def to_yaml(found: Iterable[Entry]) -> str:
    """Remarks as a YAML list; every text is quoted as JSON, which YAML reads."""
    lines = [_HEADER]
    for one in found:
        remark = one.remark
        lines.append(f"- kind: {remark.kind}\n  pass: {remark.pass_name}")
        lines += [f"  scope: {_quoted(one.scope)}"] if one.scope else []
        lines.append(f"  message: {_quoted(remark.message)}")
        lines += [f"  where: {_quoted(remark.where)}"] if remark.where else []
    return "\n".join(lines if len(lines) > 1 else [*lines, "[]"]) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def read_remarks(path: Path) -> list[Entry]:
    """The remarks of a file, or of an artifact's directory.

    Raises:
        UserError: the file is missing or holds something else, with its line.
    """
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            raise UserError(f"{path}: no {FILE_NAME} in this directory", "name a file of remarks, or an artifact")
        path /= FILE_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text: {error.reason}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return list(_entries(path, text))


def _entries(path: Path, text: str) -> Iterator[Entry]:
    root = _compose(path, text)
    if root is None or not isinstance(root.value, list) or root.tag.endswith("map"):
        line = 1 if root is None else root.start_mark.line + 1
        raise UserError(f"{path}:{line}: a list of remarks is expected", "`vacc-opt opt --remarks-file` writes one")
    for item in root.value:
        yield _entry(path, item)


def _compose(path: Path, text: str) -> Any:
    """The tree of YAML nodes with their lines; nothing is constructed from it but strings."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise UserError(f"{path}:{line}: not YAML: {error.problem or error.context}") from error
    except YAMLError as error:
        raise UserError(f"{path}:1: not YAML: {' '.join(str(error).split())}") from error


def _entry(path: Path, item: Any) -> Entry:
    line = item.start_mark.line + 1
    if not item.tag.endswith("map"):
        raise UserError(f"{path}:{line}: a remark with {', '.join(_NEEDED)} is expected")
    fields: dict[str, str] = {}
    for key, value in item.value:
        at = key.start_mark.line + 1
        if not isinstance(key.value, str) or not isinstance(value.value, str):
            raise UserError(f"{path}:{at}: a text is expected")
        if key.value not in _NEEDED + _OPTIONAL:
            raise UserError(f"{path}:{at}: unknown field {key.value!r}", did_you_mean(key.value, _NEEDED + _OPTIONAL))
        if key.value == "kind" and value.value not in KINDS:
            raise UserError(f"{path}:{at}: unknown kind {value.value!r}", did_you_mean(value.value, KINDS))
        fields[key.value] = value.value
    missing = [name for name in _NEEDED if name not in fields]
    if missing:
        raise UserError(f"{path}:{line}: a remark without {' and '.join(missing)}")
    remark = Remark(fields["kind"], fields["pass"], fields["message"], fields.get("where", ""))
    return Entry(remark, fields.get("scope", ""))


def chosen(found: Sequence[Entry], kinds: Sequence[str] = (), passes: Sequence[str] = ()) -> list[Entry]:
    """The remarks of these kinds and passes; empty means all.

    Raises:
        UserError: no remark is of a pass that is named.
    """
    said = {one.remark.pass_name for one in found}
    for name in passes:
        if name not in said:
            raise UserError(f"no remark is by the pass {name!r}", did_you_mean(name, said) if said else None)
    return [
        one
        for one in found
        if (not kinds or one.remark.kind in kinds) and (not passes or one.remark.pass_name in passes)
    ]


@dataclass(eq=False)
class RemarksFile(Instrument):
    """Writes the remarks of a run when it ends; of a run that fails, those up to the failure.

    Raises:
        UserError: the file could not be written.
    """

    path: Path
    written: bool = False
    _records: list[PassRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_place(self.path)

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        """Keep the remarks."""
        self._records.append(record)

    def failed(self, step: Step, graph: Graph, error: Exception) -> None:
        """Write what there is."""
        self._write()

    def finished(self, report: Report) -> None:
        """Write all."""
        self._write()

    def text(self) -> str:
        """Where the file is, once it is written."""
        return f"  -> {self.path}" if self.written else ""

    def _write(self) -> None:
        write_whole(self.path, to_yaml(entries(self._records)))
        self.written = True

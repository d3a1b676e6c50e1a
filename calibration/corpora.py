"""Texts of the published data sets and of plain files, one document at a time, in the order of the file.

- ``c4``: ``*.json.gz`` (or ``*.json``), a JSON object a line with ``text`` (allenai/c4).
- ``ceval``: the ``ceval-exam.zip`` of CSV files with question, A, B, C, D and, but for the test split, an answer.
- ``jsonl``: a JSON object a line with ``text``. ``text``: UTF-8, documents apart by blank lines.

Archives are read in memory and never unpacked.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from vacc_opt.ir.errors import UserError, did_you_mean

_LARGEST_MEMBER = 64 << 20  # bytes of a CSV file once unpacked; the published ones are below 1 MB
_CHOICES = ("A", "B", "C", "D")


def documents(name: str, path: Path) -> Iterator[str]:
    """The documents of a data set that are not empty.

    Raises:
        UserError: no such data set or file, a damaged file, or one of another form; file and line are named.
    """
    if name not in READERS:
        raise UserError(f"no data set {name!r}", did_you_mean(name, READERS))
    suffixes, read = READERS[name]
    found = False
    for file in _files(path, suffixes):
        try:
            for text in read(file):
                if text.strip():
                    found = True
                    yield text
        except OSError as error:  # gzip's error of a bad header is one too
            raise UserError(f"{file}: cannot read the calibration data: {error.strerror or error}") from error
        except (EOFError, zlib.error, zipfile.BadZipFile, csv.Error) as error:
            raise UserError(f"{file}: damaged or truncated: {error}", "download the file again") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text: {error.reason}") from error
    if not found:
        raise UserError(f"{path}: holds no text of the form {name}", f"{' or '.join(suffixes)} is expected")


def _files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(suffixes))
    if not found:
        raise UserError(f"{path}: no {' or '.join('*' + s for s in suffixes)} in this directory", "name the file")
    return found


def _lines(file: Path) -> Iterator[str]:
    """The field ``text`` of each line."""
    with file.open("rb") as raw:
        stream = io.TextIOWrapper(gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw, encoding="utf-8")
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}: line {number} is not JSON: {error}") from error
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise UserError(f"{file}: line {number} has no 'text'", 'a line is {"text": "..."}')
            yield text


def _exams(file: Path) -> Iterator[str]:
    """Every question of the archive, or of a CSV file that was taken out of it."""
    if file.suffix == ".csv":
        yield from _questions(file.read_text(encoding="utf-8-sig"), str(file))
        return
    with zipfile.ZipFile(file) as archive:
        for member in sorted(archive.infolist(), key=lambda one: one.filename):
            if not member.filename.endswith(".csv") or member.filename.startswith("__MACOSX"):
                continue
            if member.file_size > _LARGEST_MEMBER or member.flag_bits & 1:
                raise UserError(f"{file}: {member.filename} is encrypted or too large for an exam", "check the file")
            yield from _questions(archive.read(member).decode("utf-8-sig"), f"{file}: {member.filename}")


def _questions(text: str, where: str) -> Iterator[str]:
    rows = csv.DictReader(io.StringIO(text))
    missing = [name for name in ("question", *_CHOICES) if name not in (rows.fieldnames or ())]
    if missing:
        raise UserError(f"{where}: no column {missing[0]!r}", "its columns are id, question, A, B, C, D, answer")
    for row in rows:
        parts = [row["question"] or "", *(f"{name}. {row[name]}" for name in _CHOICES)]
        if row.get("answer"):
            parts.append(f"答案：{row['answer']}")
        if row.get("explanation"):
            parts.append(str(row["explanation"]))
        yield "\n".join(parts)


def _paragraphs(file: Path) -> Iterator[str]:
    yield from file.read_text(encoding="utf-8").split("\n\n")


READERS: dict[str, tuple[tuple[str, ...], Callable[[Path], Iterator[str]]]] = {
    "c4": ((".json.gz", ".json"), _lines),
    "ceval": ((".zip", ".csv"), _exams),
    "jsonl": ((".jsonl", ".jsonl.gz"), _lines),
    "text": ((".txt",), _paragraphs),
}

"""Pipelines: text such as ``simplify,fuse-gqa{expect=30}`` to passes, and the manager that runs and verifies them."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vacc_opt.ir import Graph
from vacc_opt.ir.errors import CheckError, UserError, VaccError, did_you_mean
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.verify import verify
from vacc_opt.passes.infra.base import Option, Pass, Remark
from vacc_opt.passes.infra.registry import all_passes

_TOKEN = re.compile(r"\s*([\w.+-]+)\s*")


@dataclass(frozen=True)
class PassRecord:
    """What one pass did in a run."""

    name: str
    spec: str
    seconds: float
    changes: int
    summary: str
    remarks: tuple[Remark, ...]
    fused: int | None = None
    candidates: int | None = None


@dataclass(frozen=True)
class Report:
    """What a pipeline did, pass by pass."""

    records: tuple[PassRecord, ...]

    def remarks(self) -> list[Remark]:
        """All remarks in order."""
        return [r for record in self.records for r in record.remarks]

    def record(self, name: str) -> PassRecord | None:
        """The first record of a pass."""
        return next((r for r in self.records if r.name == name), None)


def parse_pipeline(text: str) -> list[Pass]:
    """Read pipeline text.

    Raises:
        UserError: with a caret under the place, and the nearest valid name.
    """
    passes: list[Pass] = []
    at = 0
    while True:
        match = _TOKEN.match(text, at)
        if match is None:
            raise _at(text, at, "a pass name is expected here")
        name, start = match[1], match.start(1)
        known = all_passes()
        if name not in known:
            raise _at(text, start, f"unknown pass {name!r}", did_you_mean(name, known))
        at = match.end()
        options: dict[str, Any] = {}
        if text[at : at + 1] == "{":
            options, at = _options(text, at + 1, known[name])
            at += len(text[at:]) - len(text[at:].lstrip())
        try:
            passes.append(known[name](**options))
        except ValueError as error:
            raise _at(text, start, str(error)) from error
        if at >= len(text):
            return passes
        if text[at] != ",":
            raise _at(text, at, "',' or the end is expected here")
        at += 1


def _options(text: str, at: int, cls: type[Pass]) -> tuple[dict[str, Any], int]:
    declared = {o.name: o for o in cls.options()}
    given: dict[str, Any] = {}
    while True:
        match = re.compile(r"\s*([\w-]+)\s*=\s*").match(text, at)
        if match is None:
            raise _at(text, at, f"an option of {cls.name!r} is expected here, as name=value")
        key = match[1].replace("-", "_")
        if key not in declared:
            raise _at(text, match.start(1), f"{cls.name!r} has no option {match[1]!r}", did_you_mean(key, declared))
        value = re.compile(r'"([^"]*)"|([^,}]*)').match(text, match.end())
        assert value is not None
        raw = value[1] if value[1] is not None else (value[2] or "").strip()
        given[key] = _convert(raw, declared[key], text, match.end(), cls.name)
        at = value.end()
        if text[at : at + 1] == "}":
            return given, at + 1
        if text[at : at + 1] != ",":
            raise _at(text, at, "',' or '}' is expected here")
        at += 1


def _convert(raw: str, option: Option, text: str, at: int, name: str) -> Any:
    kinds = {k.strip() for k in option.type.split("|")}
    if raw == "none" and "None" in kinds:
        return None
    try:
        if "bool" in kinds:
            return {"true": True, "false": False}[raw.lower()]
        if "int" in kinds:
            return int(raw)
        if "float" in kinds:
            return float(raw)
    except (ValueError, KeyError):
        wanted = " or ".join(sorted(kinds))
        raise _at(text, at, f"option {option.name!r} of {name!r} takes {wanted}, not {raw!r}", option.help) from None
    return raw


def _at(text: str, at: int, message: str, hint: str | None = None) -> UserError:
    caret = f"{text}\n  {' ' * at}^"
    return UserError(f"pipeline, column {at + 1}: {message}", caret if hint is None else f"{caret} {hint}")


def dump_pipeline(passes: Sequence[Pass]) -> str:
    """The text that :func:`parse_pipeline` reads back."""
    return ",".join(p.spec() for p in passes)


def run_pipeline(
    graph: Graph,
    pipeline: str | Sequence[Pass],
    *,
    on_pass: Callable[[PassRecord], None] | None = None,
    verify_each: bool = True,
) -> Report:
    """Run passes over ``graph`` in place, verifying after each.

    Raises:
        VaccError: a pass declined its task, an expectation is not met, or a pass left an invalid graph.
    """
    passes = parse_pipeline(pipeline) if isinstance(pipeline, str) else list(pipeline)
    records: list[PassRecord] = []
    for item in passes:
        started = time.perf_counter()
        rw = Rewriter(graph, by=item.name)
        try:
            outcome = item.run(graph, rw)
        except VaccError as error:
            raise _named(error, item) from error
        except Exception as error:
            error.add_note(f"in the pass {item.name}")
            raise
        if verify_each:
            verify(graph, after=item.name)
        record = PassRecord(
            item.name,
            item.spec(),
            time.perf_counter() - started,
            rw.modified,
            outcome.summary,
            tuple(outcome.remarks),
            outcome.fused,
            outcome.candidates,
        )
        records.append(record)
        if on_pass is not None:
            on_pass(record)
        _check_expectation(item, record)
    return Report(tuple(records))


def _named(error: VaccError, item: Pass) -> VaccError:
    if error.message.startswith(f"{item.name}: "):
        return error
    return type(error)(f"{item.name}: {error.message}", error.hint)


def _check_expectation(item: Pass, record: PassRecord) -> None:
    fields = {f.name for f in dataclasses.fields(item)}
    expected = getattr(item, "expect", None) if "expect" in fields else None
    if expected is None or expected == record.fused:
        return
    missed = [str(r) for r in record.remarks if r.kind == "missed"]
    other = " other" if record.fused else ""
    hint = "\n  ".join(missed[:5]) if missed else f"no{other} place in the graph came close to the pattern"
    raise CheckError(f"{item.name}: {record.fused} rewritten, {expected} expected", hint)

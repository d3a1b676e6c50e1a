"""The before and after graphs in a docstring: one text for ``vacc-opt passes``, the documentation and the tests."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass

from vacc_opt.passes.infra.options import Named

_HEADING = re.compile(r"(Before|After(?: (?P<spec>\S.*))?):")


@dataclass(frozen=True)
class Example:
    """Two graphs in ONNX text, and the pass with the options that turns the first into the second."""

    spec: str
    before: str
    after: str


@dataclass(frozen=True)
class Doc:
    """A docstring in parts: the text for people, and the examples in order."""

    prose: str
    examples: tuple[Example, ...]


def doc_of(cls: type[Named]) -> Doc:
    """The docstring of a pass, its examples taken out of the text.

    An example is a line ``Before:`` and a line ``After:`` (or ``After fuse-gqa{expect=1}:``, for a pass with options),
    each with a graph indented below it.

    Raises:
        ValueError: ``Before:`` without ``After:``, the other way round, or either without a graph.
    """
    lines = inspect.cleandoc(cls.__doc__ or "").splitlines()
    prose: list[str] = []
    examples: list[Example] = []
    before: str | None = None
    at = 0
    while at < len(lines):
        heading = _HEADING.fullmatch(lines[at])
        at += 1
        if heading is None:
            prose.append(lines[at - 1])
            continue
        end = next((i for i in range(at, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines))
        graph = textwrap.dedent("\n".join(lines[at:end])).strip()
        at = end
        is_before = heading[1] == "Before"
        if not graph or is_before is (before is not None):
            raise ValueError(f"{cls.name}: {heading[0]!r} stands without its other half or its graph")
        if is_before:
            before = graph
        else:
            assert before is not None
            examples.append(Example(heading["spec"] or cls.name, before, graph))
            before = None
    if before is not None:
        raise ValueError(f"{cls.name}: 'Before:' without an 'After:'")
    return Doc(re.sub(r"\n{3,}", "\n\n", "\n".join(prose)).strip(), tuple(examples))

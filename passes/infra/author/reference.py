"""An entry of the catalog as text for a terminal, and all of them as the page ``docs/passes.md``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from vacc_opt.passes.infra.author.catalog import Entry
from vacc_opt.passes.infra.options import Option

_INTRODUCTION = """# Passes

Written by `make docs` from the passes themselves; every example below runs as a test. `vacc-opt passes NAME` prints the
same for one of them. A pass is used by its name in a pipeline: `-p simplify,fuse-gqa{expect=30}`.
"""
_PRESETS = "A preset is written like a pass and stands for pipeline text; `--dump-pipeline` shows it."
_SCOPES = "A scope holds passes in parentheses: `fixpoint{max_rounds=5}(simplify,fuse-gqa)`."


def table(entries: Iterable[Entry]) -> str:
    """One line each: name, kind of pass (or what it is), summary."""
    rows = [(e.name, e.kind or e.what, e.summary) for e in entries]
    width = max((len(name) for name, _, _ in rows), default=0)
    return "".join(f"{name:<{width}}  {kind:<14} {summary}\n" for name, kind, summary in rows)


def described(entry: Entry) -> str:
    """All that is known of one, for a terminal."""
    facts = [
        ("Promise", entry.promise),
        ("Order", _order(entry, "{}")),
        ("Means", entry.stands_for),
        ("From", entry.distribution),
    ]
    width = max((len(label) for label, fact in facts if fact), default=0)
    parts = [f"{entry.name} ({entry.kind or entry.what})", entry.prose]
    parts.append("\n".join(f"{f'{label}:':<{width + 1}} {fact}" for label, fact in facts if fact))
    if entry.options:
        left = [f"{o.name}: {o.type} = {_default(o)}" for o in entry.options]
        column = max(map(len, left))
        lines = [f"  {text:<{column}}  {o.help}" for text, o in zip(left, entry.options, strict=True)]
        parts.append("\n".join(["Options:", *lines]))
    for example in entry.examples:
        after = "after" if example.spec == entry.name else f"after {example.spec}"
        before, result = (textwrap.indent(text, "    ") for text in (example.before, example.after))
        parts.append(f"Example:\n  before\n{before}\n  {after}\n{result}")
    return "\n\n".join(part for part in parts if part) + "\n"


def page(entries: Sequence[Entry]) -> str:
    """Markdown: a table of the passes, then each with its text; presets and scopes behind them."""
    passes, presets, scopes = ([e for e in entries if e.what == what] for what in ("pass", "preset", "scope"))
    lines = [_INTRODUCTION, "| pass | kind | what it does |", "|---|---|---|"]
    lines += [f"| [`{e.name}`](#{e.name}) | {e.kind} | {_cell(e.summary)} |" for e in passes]
    for entry in passes:
        lines += ["", f"## {entry.name}", "", *_section(entry)]
    for title, text, group in (("Presets", _PRESETS, presets), ("Scopes", _SCOPES, scopes)):
        if group:
            lines += ["", f"# {title}", "", text]
        for entry in group:
            lines += ["", f"## {entry.name}", "", *_section(entry)]
    return "\n".join(lines) + "\n"


def _section(entry: Entry) -> list[str]:
    lines = [f"Kind: {entry.kind}, {entry.promise}."] if entry.kind else []
    lines += [f"Order: {_order(entry, '`{}`')}."] if entry.follows or entry.precedes else []
    lines += [f"From: {entry.distribution}."] if entry.distribution else []
    lines += ["", entry.prose] if lines else [entry.prose]
    if entry.stands_for:
        lines += ["", f"Stands for `{entry.stands_for}`."]
    if entry.options:
        lines += ["", "| option | type | default | meaning |", "|---|---|---|---|"]
        lines += [_row(option) for option in entry.options]
    for example in entry.examples:
        after = "After:" if example.spec == entry.name else f"After `{example.spec}`:"
        lines += ["", "Before:", "", "```text", example.before, "```", "", after, "", "```text", example.after, "```"]
    return lines


def _order(entry: Entry, form: str) -> str:
    sides = (("after", entry.follows), ("before", entry.precedes))
    return "; ".join(f"{side} {', '.join(map(form.format, names))}" for side, names in sides if names)


def _row(option: Option) -> str:
    return f"| `{option.name}` | {option.type.replace('|', 'or')} | {_default(option)} | {_cell(option.help)} |"


def _default(option: Option) -> str:
    """As in pipeline text."""
    plain = str(option.default)
    return plain.lower() if isinstance(option.default, bool | None) else plain or "empty"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")

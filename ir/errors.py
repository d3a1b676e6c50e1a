"""The two ways in which we refuse: the user's input is wrong (exit 2), or a check failed (exit 1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VaccError(Exception):
    """An error that a person can act on: one line of what and where, one line of what to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.message, self.hint)


class UserError(VaccError):
    """The input cannot be used: a wrong name, an impossible option, a damaged file."""

    exit_code = 2


class CheckError(VaccError):
    """A check that we make did not hold: an invalid graph, a schedule with a hazard, an unmet expectation."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; its kind if it says nothing.

    >>> first_line(ValueError("no\\nmore")), first_line(EOFError())
    ('no', 'EOFError')
    """
    return next(iter(str(error).splitlines()), type(error).__name__)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint that names the nearest choice, or all of them when none is near.

    >>> did_you_mean("fuse-gpa", ["fuse-gqa", "kv8"])
    'did you mean `fuse-gqa`?'
    """
    names = sorted(choices)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean `{near[0]}`?"
    return f"choices: {', '.join(names)}"

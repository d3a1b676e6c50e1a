"""What a person sees: one line a step (what it did, how long), a bar on a terminal, nothing extra in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import click

NAME_WIDTH, TEXT_WIDTH = 10, 62


def step_lines(name: str, sentence: str, seconds: float | None = None, width: int = NAME_WIDTH) -> str:
    """A step in the form of the main job: name, sentence (lines after the first are indented), seconds at the end.

    >>> step_lines("split", "tp 3: 60 all-reduces", 0.12)
    '  split      tp 3: 60 all-reduces                                             0.1 s'
    """
    lines = sentence.splitlines() or [""]
    if seconds is not None:
        lines[-1] = f"{lines[-1]:<{TEXT_WIDTH}} {seconds:>5.1f} s"
    first = f"  {name:<{width}} {lines[0]}"
    return "\n".join([first, *(f"  {'':<{width}} {line}" for line in lines[1:])])


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns, indented.

    >>> table([("ranks", "3"), ("KV cache", "int8")])
    '  ranks     3\\n  KV cache  int8'
    """
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join(f"  {label:<{width}}  {fact}" for label, fact in rows)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[str] = ()) -> None:
    """Columns under their heads, those named in ``left`` aligned to the left; as wide as they are in a pipe."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in head:
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a pipe has no edge to fit into
    console.print(table)


class Steps:
    """Prints finished steps and shows the running one.

    Finished steps go to standard output, or to standard error when ``to_stderr`` (because the result itself goes to
    standard output), names padded to ``width``. The running one is a progress bar on standard error, on a
    terminal only.
    """

    def __init__(self, *, to_stderr: bool = False, quiet: bool = False, width: int = NAME_WIDTH) -> None:
        self._to_stderr = to_stderr
        self._quiet = quiet
        self._width = width
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Steps:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TimeElapsedColumn(),
            )
            # left to itself, rich would send what we print on standard output to standard error
            self._bar = Progress(
                *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def running(self, text: str, done: int = 0, of: int | None = None) -> None:
        """Name what runs now, and how much of it is done where that is known."""
        if self._bar is None:
            return
        if self._task is None:
            self._task = self._bar.add_task(text, total=of)
        self._bar.update(self._task, description=text, completed=done, total=of)

    def done(self, name: str, sentence: str, seconds: float | None = None) -> None:
        """Print a finished step."""
        self.line(step_lines(name, sentence, seconds, self._width))

    def line(self, text: str) -> None:
        """Print a line among the steps."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.stop()  # it would write over the line
        click.echo(text, err=self._to_stderr)
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
                self._task = None
            self._bar.start()

    @contextmanager
    def step(self, name: str, running: str) -> Iterator[list[str]]:
        """Time a block; the lines that it appends to the list become the sentence of the step."""
        said: list[str] = []
        self.running(f"{name}: {running}")
        started = time.perf_counter()
        yield said
        self.done(name, "\n".join(said), time.perf_counter() - started)

"""A listener of the compiler for tests: it shows nothing and keeps what steps say."""

from __future__ import annotations


class Silent:
    """``said``: the sentence of each step, in the order in which they ended."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def line(self, text: str) -> None:
        pass

    def running(self, text: str, done: int = 0, of: int | None = None) -> None:
        pass

    def done(self, name: str, sentence: str, seconds: float | None = None) -> None:
        self.said[name] = sentence

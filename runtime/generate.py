"""Greedy text generation over an engine: chunked prefill, then token by token to the end of answer or context."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vacc_opt.ir.errors import UserError
from vacc_opt.runtime.artifact import Artifact
from vacc_opt.runtime.engines import Array, Engine
from vacc_opt.runtime.entry_points import DECODE, EntryPoint, chunks


@dataclass(frozen=True)
class Generation:
    """An answer. ``stopped`` says why it ended: ``end`` (a stop token), ``length`` or ``context``; times in seconds."""

    text: str
    token_ids: tuple[int, ...]
    engine: str
    tiles_executed: int
    prompt_tokens: int
    stopped: str
    prefill_seconds: float
    decode_seconds: float
    ranks: int
    context: int

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        seconds = {"prefill_seconds": round(self.prefill_seconds, 3), "decode_seconds": round(self.decode_seconds, 3)}
        return {**asdict(self), "token_ids": list(self.token_ids), **seconds}

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank" + ("s" if self.ranks > 1 else "")
        tiles = f", {self.tiles_executed} tiles executed" if self.tiles_executed else ""
        return f"{len(self.token_ids)} tokens on engine {self.engine}, {ranks}{tiles}"


def prefill(engine: Engine, token_ids: Sequence[int], *, pad_id: int = 0) -> Array:
    """Put a prompt into the empty buffers of ``engine`` by the fastest calls (:func:`chunks`); logits [V] of its end.

    Raises:
        UserError: the prompt is empty or longer than the context.
    """
    artifact, count = engine.artifact, len(token_ids)
    _check_count(engine.context, count)
    seconds = {phase.phase: phase.milliseconds / 1e3 for phase in artifact.facts.phases}
    logits: Array | None = None
    for chunk in chunks(artifact.entries(engine.context), count, seconds):
        taken = list(token_ids[chunk.start : chunk.start + chunk.count])
        ids = np.array([taken + [pad_id] * (chunk.entry.tokens - chunk.count)], np.int64)
        one = np.ones([1], np.int64)
        logits = engine.run(chunk.entry.name, ids, one * chunk.start, one * chunk.count)[0, -1]
    assert logits is not None
    return logits


def decode(engine: Engine, token_id: int, pos: int) -> Array:
    """Logits [V] after one more token, when ``pos`` tokens are cached."""
    one, entry = np.ones([1], np.int64), _decode(engine)
    assert entry is not None
    return np.asarray(engine.run(entry.name, one[None] * token_id, one * pos, one)[0, -1])


def _decode(engine: Engine) -> EntryPoint | None:
    return next((one for one in engine.artifact.entries(engine.context) if one.kind == DECODE), None)


def greedy(
    engine: Engine,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    on_token: Callable[[int], None] | None = None,
) -> tuple[list[int], str, tuple[float, float]]:
    """New token ids (a stop token is not among them), why it stopped, and the seconds of prefill and decode."""
    engine.prepare()
    started = time.perf_counter()
    engine.reset()
    logits = prefill(engine, prompt_ids)
    filled = time.perf_counter()
    made: list[int] = []
    stopped = "length"
    while len(made) < max_new_tokens:
        token = engine.choose(logits)
        if token in stop_ids:
            stopped = "end"
            break
        made.append(token)
        if on_token is not None:
            on_token(token)
        pos = len(prompt_ids) + len(made) - 1
        if len(made) == max_new_tokens:
            break
        if _decode(engine) is None or pos >= engine.context:
            stopped = "context"
            break
        logits = decode(engine, token, pos)
    return made, stopped, (filled - started, time.perf_counter() - filled)


def check_prompt(artifact: Artifact, prompt: str, context: int | None = None) -> list[int]:
    """The ids of a prompt; raises UserError for an empty one, bad text, or one that the context does not hold.

    ``context``: one of the artifact's; the largest by default.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty", "give a prompt with text")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid UTF-8 text") from None
    if context is not None:
        artifact.entries(context)
    ids = artifact.tokenizer().encode_prompt(prompt)
    _check_count(context or artifact.context, len(ids))
    return ids


def _check_count(context: int, count: int) -> None:
    if not count:
        raise UserError("the prompt has no tokens", "give a prompt with text")
    if count > context:
        raise UserError(
            f"the prompt has {count} tokens, the context holds {context}", "shorten it, or compile for more"
        )


def fitting_context(artifact: Artifact, tokens: int) -> int:
    """The smallest context that holds so many tokens, or the largest when none does."""
    return next((context for context in artifact.contexts if context >= tokens), artifact.context)


def generate(
    artifact: Artifact,
    engine: Engine,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    context: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Answer a prompt in the model's chat template; ``on_text`` hears the answer so far after every token.

    The KV buffers are of one ``context`` throughout, by default the smallest that holds prompt and answer.

    Raises:
        UserError: the prompt does not fit, or the artifact has no tokenizer.
    """
    if max_new_tokens < 1:
        raise UserError(f"max-new-tokens is {max_new_tokens}; it is at least 1")
    tokenizer = artifact.tokenizer()
    prompt_ids = check_prompt(artifact, prompt, context)
    engine.take_context(context or fitting_context(artifact, len(prompt_ids) + max_new_tokens))
    shown: list[int] = []

    def heard(token: int) -> None:
        shown.append(token)
        if on_text is not None:
            on_text(tokenizer.decode(shown))

    before = engine.tiles_executed
    made, stopped, seconds = greedy(
        engine, prompt_ids, max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids, on_token=heard
    )
    tiles = engine.tiles_executed - before
    return Generation(
        tokenizer.decode(made),
        tuple(made),
        engine.name,
        tiles,
        len(prompt_ids),
        stopped,
        *seconds,
        artifact.ranks,
        engine.context,
    )

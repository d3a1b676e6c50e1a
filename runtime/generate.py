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

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        seconds = {"prefill_seconds": round(self.prefill_seconds, 3), "decode_seconds": round(self.decode_seconds, 3)}
        return {**asdict(self), "token_ids": list(self.token_ids), **seconds}

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank" + ("s" if self.ranks > 1 else "")
        tiles = f", {self.tiles_executed} tiles executed" if self.tiles_executed else ""
        return f"{len(self.token_ids)} tokens on engine {self.engine}, {ranks}{tiles}"


def prefill(engine: Engine, token_ids: Sequence[int], *, pad_id: int = 0) -> Array:
    """Put a prompt into the empty buffers of ``engine``, in chunks of the prefill length; logits [V] of its last token.

    A last chunk that would write past the buffers, because the context is no multiple of the prefill length, goes
    through decode token by token.

    Raises:
        UserError: the prompt is empty or longer than the context.
    """
    length, context = engine.artifact.prefill, engine.artifact.context
    count = len(token_ids)
    _check_count(engine.artifact, count)
    at = 0
    logits: Array | None = None
    while at < count:
        if at + length > context:
            logits = decode(engine, token_ids[at], at)
            at += 1
            continue
        chunk = list(token_ids[at : at + length])
        ids = np.array([chunk + [pad_id] * (length - len(chunk))], np.int64)
        logits = engine.run("prefill", ids, np.array([at], np.int64), np.array([len(chunk)], np.int64))[0, -1]
        at += len(chunk)
    assert logits is not None
    return logits


def decode(engine: Engine, token_id: int, pos: int) -> Array:
    """Logits [V] after one more token, when ``pos`` tokens are cached."""
    one = np.ones([1], np.int64)
    return np.asarray(engine.run("decode", one[None] * token_id, one * pos, one)[0, -1])


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
        if "decode" not in engine.artifact.phases or pos >= engine.artifact.context:
            stopped = "context"
            break
        logits = decode(engine, token, pos)
    return made, stopped, (filled - started, time.perf_counter() - filled)


def check_prompt(artifact: Artifact, prompt: str) -> list[int]:
    """The ids of a prompt; raises UserError for an empty one, bad text, or one that the context does not hold."""
    if not prompt.strip():
        raise UserError("the prompt is empty", "give a prompt with text")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid UTF-8 text") from None
    ids = artifact.tokenizer().encode_prompt(prompt)
    _check_count(artifact, len(ids))
    return ids


def _check_count(artifact: Artifact, count: int) -> None:
    if not count:
        raise UserError("the prompt has no tokens", "give a prompt with text")
    if count > artifact.context:
        raise UserError(
            f"the prompt has {count} tokens, the context holds {artifact.context}", "shorten it, or compile for more"
        )


def generate(
    artifact: Artifact,
    engine: Engine,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Answer a prompt in the model's chat template; ``on_text`` hears the answer so far after every token.

    Raises:
        UserError: the prompt does not fit, or the artifact has no tokenizer.
    """
    if max_new_tokens < 1:
        raise UserError(f"max-new-tokens is {max_new_tokens}; it is at least 1")
    tokenizer = artifact.tokenizer()
    prompt_ids = check_prompt(artifact, prompt)
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
    )

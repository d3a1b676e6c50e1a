"""Calibration text: a data set becomes seeded token sequences; records of alpaca in the model's chat template."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vacc_opt.calibration.corpora import documents
from vacc_opt.ir.errors import UserError

Message = dict[str, str]
_SHORT = 16  # tokens of the shortest documents that are common: so many are drawn that they fill the sequences
Ids = npt.NDArray[np.int64]
_FORM = 'a list of {"instruction": ..., "input": ..., "output": ...} is expected'

# the prompt of the data set's authors (Taori et al. 2023, Stanford Alpaca), for models without a chat template
_ALPACA_HEAD = (
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
)


class TextEncoder(Protocol):
    """What calibration needs of a tokenizer."""

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can be used."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    def chat(self, messages: Sequence[Message], *, reply: bool = True) -> str:
        """The messages in the model's chat template; with ``reply``, up to where the model's answer begins."""


@dataclass(frozen=True)
class Sample:
    """One record of the alpaca format."""

    instruction: str
    input: str
    output: str

    @property
    def question(self) -> str:
        """Instruction and input as a user would write them."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


def load_alpaca(path: Path) -> list[Sample]:
    """Read a JSON file in the alpaca form, or the only one of a directory.

    Raises:
        UserError: the file is missing, empty, not JSON, or of another form; the first wrong record is named.
    """
    file = _only_json(path) if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the calibration data: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file}: not a JSON file: {error}", _FORM) from error
    if not isinstance(data, list):
        raise UserError(f"{file}: holds a JSON {type(data).__name__}, not a list of records", _FORM)
    if not data:
        raise UserError(f"{file}: the list of records is empty", _FORM)
    return [_sample(file, index, record) for index, record in enumerate(data)]


def _only_json(directory: Path) -> Path:
    found = sorted(directory.glob("*.json"))
    if len(found) != 1:
        raise UserError(f"{directory}: {len(found)} .json files, one is expected", "name the file")
    return found[0]


def _sample(file: Path, index: int, record: object) -> Sample:
    if not isinstance(record, dict):
        raise UserError(f"{file}: record {index} is a {type(record).__name__}, not an object", _FORM)
    fields = {name: record.get(name, "") for name in ("instruction", "input", "output")}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise UserError(f"{file}: record {index}: {name!r} is a {type(value).__name__}, not text", _FORM)
    if not fields["instruction"].strip():
        raise UserError(f"{file}: record {index} has no 'instruction'", _FORM)
    return Sample(**fields)


def prompt_text(sample: Sample, encoder: TextEncoder) -> str:
    """Question and answer as the model sees them in use: its chat template, else the alpaca prompt."""
    if encoder.has_chat_template:
        messages = [{"role": "user", "content": sample.question}]
        if sample.output:
            messages.append({"role": "assistant", "content": sample.output})
        return encoder.chat(messages, reply=not sample.output)
    paired = ", paired with an input that provides further context" if sample.input else ""
    text = _ALPACA_HEAD.format(paired=paired, instruction=sample.instruction)
    if sample.input:
        text += f"### Input:\n{sample.input}\n\n"
    return f"{text}### Response:\n{sample.output}"


def calibration_ids(
    path: Path, encoder: TextEncoder, *, name: str = "alpaca", nsamples: int = 128, seqlen: int = 512, seed: int = 0
) -> list[Ids]:
    """At most ``nsamples`` token sequences [1, n <= ``seqlen``] of a data set, chosen by ``seed``.

    A record of alpaca is a sequence of its own, cut at ``seqlen`` and never padded. Documents of the other sets are
    drawn in seeded order and joined until ``seqlen`` tokens are full; a long one begins at a seeded place. When the
    text ends before that there are fewer sequences, or a single shorter one.

    Raises:
        UserError: as :func:`load_alpaca` and :func:`documents`, or no text gives a token.
    """
    if name == "alpaca":
        found = _alpaca_sequences(path, encoder, nsamples, seqlen, seed)
    else:
        found = _joined_sequences(documents(name, path), encoder, nsamples, seqlen, random.Random(seed))
    ids = [np.asarray([tokens], np.int64) for tokens in found if tokens]
    if not ids:
        raise UserError(f"{path}: the tokenizer makes no tokens of this text")
    return ids


def _alpaca_sequences(path: Path, encoder: TextEncoder, nsamples: int, seqlen: int, seed: int) -> list[list[int]]:
    samples = load_alpaca(path)
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    chosen = sorted(order[:nsamples])
    return [encoder.encode(prompt_text(samples[i], encoder))[:seqlen] for i in chosen]


def _joined_sequences(
    texts: Iterator[str], encoder: TextEncoder, nsamples: int, seqlen: int, rng: random.Random
) -> list[list[int]]:
    drawn = _drawn(texts, nsamples * (4 + seqlen // _SHORT), rng)
    separator = encoder.encode("\n\n")
    sequences: list[list[int]] = []
    current: list[int] = []
    for text in drawn:
        tokens = encoder.encode(text)
        if not current and len(tokens) > seqlen:
            tokens = tokens[rng.randrange(len(tokens) - seqlen + 1) :]
        current += [*(separator if current else []), *tokens]
        if len(current) >= seqlen:
            sequences.append(current[:seqlen])
            current = []
        if len(sequences) == nsamples:
            return sequences
    return sequences or [current]


def _drawn(texts: Iterator[str], count: int, rng: random.Random) -> list[str]:
    """``count`` of the texts in random order, each equally likely, without holding all (Vitter 1985, algorithm R)."""
    held: list[str] = []
    for index, text in enumerate(texts):
        if index < count:
            held.append(text)
        elif (place := rng.randrange(index + 1)) < count:
            held[place] = text
    rng.shuffle(held)
    return held

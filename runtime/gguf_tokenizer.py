"""The tokenizer inside a GGUF file, rebuilt for the ``tokenizers`` package: byte-level BPE of the known families."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from vacc_opt.frontends.gguf_header import ARRAY, SCALARS, STRING, read_gguf_header
from vacc_opt.ir.errors import UserError
from vacc_opt.runtime.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
ARRAYS = tuple(_PREFIX + name for name in ("tokens", "merges", "token_type"))
_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types: one is never text, the other is matched before any merge
_PAIRS_AT = 16  # where the count of key-value pairs stands: after magic, version and tensors
# how llama 3 and qwen 2 cut text before merging; both differ only in the digits that stay together
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer, special tokens and chat template of a GGUF file.

    Raises:
        UserError: the file holds no tokenizer, or one of a family that is not supported.
    """
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    found = {**read_gguf_header(path).metadata, **_arrays(path)}
    kind = found.get(_PREFIX + "model")
    if kind != "gpt2":
        raise UserError(
            f"{path}: its tokenizer is of the kind {kind!r}; byte-level BPE (`gpt2`) is supported",
            "compile the Hugging Face form of this model",
        )
    tokens: list[str] = found.get(ARRAYS[0]) or []
    pairs = [tuple(merge.split(" ", 1)) for merge in found.get(ARRAYS[1]) or []]
    if not tokens:
        raise UserError(f"{path}: holds no tokens", "compile the Hugging Face form of this model")
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    backend.pre_tokenizer = _pre_tokenizer(str(found.get(_PREFIX + "pre", "default")), path)
    backend.decoder = decoders.ByteLevel()
    types = found.get(ARRAYS[2]) or [1] * len(tokens)
    own = [(t, k) for t, k in zip(tokens, types, strict=True) if k in (_CONTROL, _USER_DEFINED)]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in own if k == _CONTROL])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in own if k == _USER_DEFINED])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: found.get(f"{_PREFIX}{key}_token_id") for name, key in names.items()}
    named = {name: tokens[i] for name, i in ids.items() if i is not None}
    stop = [found[key] for key in (_PREFIX + "eos_token_id", _PREFIX + "eot_token_id") if key in found]
    return Tokenizer(
        backend, found.get("tokenizer.chat_template"), named, stop, bool(found.get(_PREFIX + "add_bos_token", False))
    )


def _pre_tokenizer(name: str, path: Path) -> Any:
    """How text is cut before merges, by the name that GGUF gives the family."""
    from tokenizers import Regex, pre_tokenizers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in ("gpt-2", "default"):
        return plain
    if name == "smollm":  # every digit is a token of its own
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    if name in ("llama-bpe", "llama3", "qwen2"):
        words = Regex(_WORDS % ("" if name == "qwen2" else "{1,3}"))
        split = pre_tokenizers.Split(words, behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise UserError(
        f"{path}: tokenizer family {name!r} is not supported", "compile the Hugging Face form of this model"
    )


def _arrays(path: Path) -> dict[str, list[Any]]:
    """The arrays of the vocabulary, which the header reader steps over; the header is known to be whole."""
    found: dict[str, list[Any]] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        (pairs,) = struct.unpack_from("<Q", data, _PAIRS_AT)
        at = _PAIRS_AT + 8
        for _ in range(pairs):
            key, at = _item(data, at, STRING)
            (kind,) = struct.unpack_from("<I", data, at)
            value, at = _item(data, at + 4, kind)
            if key in ARRAYS:
                found[key] = value
    return found


def _item(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """The value at a byte, and the byte after it."""
    if kind == STRING:
        (length,) = struct.unpack_from("<Q", data, at)
        return data[at + 8 : at + 8 + length].decode(), at + 8 + length
    if kind == ARRAY:
        element, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if element != STRING and element != ARRAY:
            layout = f"<{count}{SCALARS[element]}"
            return list(struct.unpack_from(layout, data, at)), at + struct.calcsize(layout)
        items = []
        for _ in range(count):
            item, at = _item(data, at, element)
            items.append(item)
        return items, at
    layout = "<" + SCALARS[kind]
    return struct.unpack_from(layout, data, at)[0], at + struct.calcsize(layout)

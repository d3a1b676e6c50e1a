"""Data sets in their published formats: what is read, what is refused, and how sequences are drawn."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from vacc_opt.calibration.corpora import documents
from vacc_opt.calibration.datasets import Message, calibration_ids
from vacc_opt.ir.errors import UserError

EXAM = "id,question,A,B,C,D,answer,explanation\n0,1+1=?,1,2,3,4,B,加法\n1,水的化学式?,H2O,CO2,O2,N2,A,\n"
TEST = "id,question,A,B,C,D\n0,2+2=?,1,2,3,4\n"


class Characters:
    """A character is a token."""

    has_chat_template = False

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def chat(self, messages: Sequence[Message], *, reply: bool = True) -> str:
        raise AssertionError("there is no template")


def c4(path: Path, texts: Sequence[str]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://x"}) + "\n")
    return path


def ceval(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_a_shard_of_c4_is_its_texts(tmp_path: Path) -> None:
    path = c4(tmp_path / "c4-train.00000-of-01024.json.gz", ["one", "", "two"])
    assert list(documents("c4", path)) == ["one", "two"]
    assert list(documents("c4", tmp_path)) == ["one", "two"]


def test_the_archive_of_ceval_is_its_questions_by_file(tmp_path: Path) -> None:
    path = ceval(tmp_path / "ceval-exam.zip", {"val/b_val.csv": EXAM, "test/a_test.csv": TEST, "README.md": "x"})
    assert list(documents("ceval", path)) == [
        "2+2=?\nA. 1\nB. 2\nC. 3\nD. 4",
        "1+1=?\nA. 1\nB. 2\nC. 3\nD. 4\n答案：B\n加法",
        "水的化学式?\nA. H2O\nB. CO2\nC. O2\nD. N2\n答案：A",
    ]


def test_unpacked_exams_lines_of_json_and_plain_text_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val/a_val.csv").write_text("\ufeff" + EXAM, encoding="utf-8")
    assert len(list(documents("ceval", tmp_path))) == 2
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert list(documents("jsonl", tmp_path / "a.jsonl")) == ["one", "two"]
    (tmp_path / "a.txt").write_text("one\nstill one\n\ntwo\n")
    assert list(documents("text", tmp_path)) == ["one\nstill one", "two\n"]


def test_documents_are_joined_to_full_sequences_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    path = c4(tmp_path / "a.json.gz", [f"{i:03}" * (1 + i % 5) for i in range(400)])

    def drawn(seed: int) -> list[list[int]]:
        found = calibration_ids(path, Characters(), name="c4", nsamples=6, seqlen=40, seed=seed)
        assert [ids.shape for ids in found] == [(1, 40)] * 6
        return [ids[0].tolist() for ids in found]

    assert drawn(0) == drawn(0) != drawn(1)


def test_a_long_document_begins_at_a_seeded_place(tmp_path: Path) -> None:
    path = c4(tmp_path / "a.json.gz", ["".join(chr(i) for i in range(100, 1100))])
    starts = {
        int(calibration_ids(path, Characters(), name="c4", nsamples=1, seqlen=8, seed=seed)[0][0, 0])
        for seed in range(9)
    }
    assert len(starts) > 3


def test_text_shorter_than_a_sequence_is_one_shorter_sequence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short\n\ntext")
    (ids,) = calibration_ids(tmp_path / "a.txt", Characters(), name="text", nsamples=4, seqlen=512)
    assert ids.shape == (1, len("short\n\ntext"))


def broken_gzip(path: Path) -> None:
    c4(path, ["a" * 5000])
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("name", "file", "make", "message"),
    [
        ("c4", "a.json.gz", lambda p: p.write_bytes(b"no gzip"), "cannot read the calibration data: Not a gzipped"),
        ("c4", "a.json.gz", broken_gzip, "damaged or truncated"),
        ("c4", "a.json.gz", lambda p: c4(p, []), "holds no text of the form c4"),
        ("c4", "a.json", lambda p: p.write_text('{"text": "a"}\nno\n'), "line 2 is not JSON"),
        ("c4", "a.json", lambda p: p.write_text('{"txt": "a"}\n'), "line 1 has no 'text'"),
        ("ceval", "a.zip", lambda p: p.write_bytes(b"no zip"), "damaged or truncated"),
        ("ceval", "a.zip", lambda p: ceval(p, {"README": "x"}), "holds no text of the form ceval"),
        ("ceval", "a.zip", lambda p: ceval(p, {"val/x.csv": "id,question\n0,a\n"}), r"val/x\.csv: no column 'A'"),
        ("ceval", "a.zip", lambda p: ceval(p, {"val/x.csv": ""}), "no column 'question'"),
        ("text", "a.txt", lambda p: p.write_bytes(b"caf\xe9"), "not UTF-8 text"),
        ("text", "missing.txt", lambda p: None, "cannot read the calibration data: No such file"),
        ("text", "a.txt", lambda p: p.write_text(" \n"), "holds no text of the form text"),
        ("c5", "a", lambda p: None, "no data set 'c5'"),
    ],
)
def test_what_is_not_of_the_form_is_one_message(name: str, file: str, make, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / file)
    with pytest.raises(UserError, match=message):
        calibration_ids(tmp_path / file, Characters(), name=name)


def test_a_directory_without_files_of_the_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*\.zip or \*\.csv in this directory"):
        list(documents("ceval", tmp_path))


def test_a_member_that_unpacks_to_more_than_an_exam_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("val/x.csv", b"0" * (65 << 20))
    with pytest.raises(UserError, match=r"val/x\.csv is encrypted or too large"):
        list(documents("ceval", path))

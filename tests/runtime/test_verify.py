"""`vacc-opt verify`: a whole artifact passes, and each kind of damage is named with its file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vacc_opt.cli.main import main
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.storage import read_safetensors_header
from vacc_opt.runtime.artifact import Artifact
from vacc_opt.runtime.integrity import file_entry
from vacc_opt.runtime.verify_artifact import CHECKS, Check, verify_artifact


class Heard:
    """Keeps what it hears of progress."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, int, int | None]] = []

    def running(self, text: str, done: int = 0, of: int | None = None) -> None:
        self.parts.append((text, done, of))


@pytest.fixture
def other(artifact: Artifact, tmp_path: Path) -> Path:
    """A copy of the artifact, to damage."""
    return Path(shutil.copytree(artifact.path, tmp_path / "copy"))


def failed(path: Path, *names: str) -> dict[str, tuple[str, ...]]:
    """The problems of every check that fails, of these or of all."""
    checks = verify_artifact(path, Heard(), names or tuple(CHECKS))
    return {check.name: check.problems for check in checks if not check.passed}


def with_digest_of_now(path: Path, name: str) -> None:
    """Let the manifest say of a file what it is: someone changed it and its digest."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"][name] = file_entry(path / name)
    file.write_text(json.dumps(manifest))


def changed(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change the manifest."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_whole_artifact_passes_every_check(artifact: Artifact) -> None:
    heard = Heard()
    checks = list(verify_artifact(artifact.path, heard))
    assert [check.name for check in checks] == list(CHECKS)
    assert [check.problems for check in checks] == [()] * len(checks)
    said = {check.name: check.said for check in checks}
    assert said["files"].startswith(f"{len(artifact.files)} files as they were written, ")
    assert said["graphs"].startswith("4 ONNX files load; ")
    assert said["schedules"].count("verified") == 2
    total = sum(artifact.files.values())
    assert any(text.startswith("verify: files: ") and (done, of) == (total, total) for text, done, of in heard.parts)


def test_a_flipped_byte_in_a_weight_file_is_named(other: Path) -> None:
    file = other / "rank1.safetensors"
    tensor = read_safetensors_header(file)["model.layers.1.mlp.up_proj.qweight"]
    data = bytearray(file.read_bytes())
    data[tensor.offset + 5] ^= 1
    file.write_bytes(data)
    assert failed(other, "files", "weights", "graphs") == {
        "files": (f"rank1.safetensors is damaged: it has not the digest of what was written ({tensor.name})",)
    }


def test_a_file_that_is_missing_or_too_short_is_named(other: Path) -> None:
    (other / "remarks.yaml").unlink()
    file = other / "report.html"
    file.write_bytes(file.read_bytes()[:-1])
    size = file.stat().st_size
    problems = ("remarks.yaml is missing", f"report.html has {size} bytes, {size + 1} were written")
    assert failed(other, "files") == {"files": problems}


def test_a_schedule_that_is_wrong_is_found_although_its_digest_is_right(other: Path) -> None:
    file = other / "decode.schedule"
    text, count = re.subn(r" @128 ", " @0 ", file.read_text(), count=1)  # one buffer over another
    assert count == 1
    file.write_text(text)
    with_digest_of_now(other, "decode.schedule")
    (problem,) = failed(other, "files", "schedules")["schedules"]
    assert problem.startswith("decode.schedule: ")
    assert "overlap" in problem


def test_a_schedule_that_does_not_print_as_it_stands_is_found(other: Path) -> None:
    file = other / "decode.schedule"
    file.write_text(file.read_text() + "\n")
    with_digest_of_now(other, "decode.schedule")
    assert failed(other, "files", "schedules") == {"schedules": ("decode.schedule: is not what its program prints",)}


def test_a_target_that_is_not_the_one_compiled_for_is_found(other: Path) -> None:
    file = other / "target.yaml"
    text = file.read_text()
    file.write_text(text.replace("version: 1", "version: 2", 1))
    assert file.read_text() != text
    with_digest_of_now(other, "target.yaml")
    found = failed(other, "files", "target", "schedules")
    assert set(found) == {"target", "schedules"}
    assert "target.yaml is vacc-reference v2" in found["target"][0]


def test_a_graph_whose_weights_lie_elsewhere_is_found(other: Path) -> None:
    shutil.copyfile(other / "prefill.rank1.onnx", other / "prefill.rank0.onnx")
    with_digest_of_now(other, "prefill.rank0.onnx")
    found = failed(other, "files", "weights", "graphs")
    assert set(found) == {"graphs"}
    assert all(one.startswith("prefill.rank0.onnx: ") and "not in rank0.safetensors" in one for one in found["graphs"])


def test_weights_that_are_stored_in_another_order_are_found(other: Path) -> None:
    file = other / "rank0.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = "model.layers.0.self_attn.k_proj.qweight", "model.layers.0.self_attn.v_proj.qweight"
    digests = header["__metadata__"]
    for entries, prefix in ((header, ""), (digests, "sha256 ")):
        names = f"{prefix}{first}", f"{prefix}{second}"
        entries[names[0]], entries[names[1]] = entries[names[1]], entries[names[0]]
    text = json.dumps(header, separators=(",", ":")).encode()
    file.write_bytes(data[:8] + text + b" " * (length - len(text)) + data[8 + length :])
    with_digest_of_now(other, "rank0.safetensors")
    found = failed(other, "files", "weights", "graphs")
    assert set(found) == {"graphs"}
    assert any(f"prefill.rank0.onnx: {first} lies at byte" in one for one in found["graphs"])


def test_a_manifest_that_promises_something_else_is_found(other: Path) -> None:
    def change(manifest: dict[str, object]) -> None:
        manifest["ranks"] = "two"
        made = manifest["made"]
        assert isinstance(made, dict)
        made["phases"][0]["cycles"] += 1

    changed(other, change)
    found = failed(other, "manifest")
    assert found["manifest"] == ("manifest.json: ranks: Input should be a valid integer",)
    changed(other, lambda manifest: manifest.update(ranks=2))
    (problem,) = failed(other, "schedules")["schedules"]
    assert "prefill.schedule: takes" in problem
    assert "cycles, manifest.json says" in problem


def test_many_problems_of_one_check_are_counted() -> None:
    check = Check("files", "", tuple(f"file{i} is missing" for i in range(20)), 0.0)
    assert check.sentence.splitlines() == ["FAILED", *(f"file{i} is missing" for i in range(8)), "and 12 more"]


def test_the_command_prints_a_line_a_check_and_ends_with_one(
    artifact: Artifact, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(artifact.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == artifact.name
    assert [line.split()[0] for line in lines[1:] if not line.startswith("   ")] == list(CHECKS)
    (other / "remarks.yaml").unlink()
    assert main(["verify", str(other), "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["passed"], [one["name"] for one in found["checks"] if not one["passed"]]) == (False, ["files"])
    assert err == f"error: {other}: 1 of {len(CHECKS)} checks failed: files\n  remarks.yaml is missing\n"


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an artifact"):
        list(verify_artifact(tmp_path, Heard()))

"""`--what-if`: a model compiled for a machine with other numbers, and a schedule timed on one that it was not made for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vacc_opt.backends.vacc import Program, ScheduleError, load_target
from vacc_opt.backends.vacc.target import overlay
from vacc_opt.cli.main import main
from vacc_opt.ir.errors import UserError
from vacc_opt.runtime.artifact import MANIFEST, TARGET, Artifact, open_artifact
from vacc_opt.runtime.compile import compile_model
from vacc_opt.runtime.engines import make_engine
from vacc_opt.runtime.generate import prefill
from vacc_opt.runtime.integrity import file_entry
from vacc_opt.runtime.simulate import simulate
from vacc_opt.runtime.sweep import sweep
from vacc_opt.runtime.verify_artifact import verify_artifact
from vacc_opt.tests.listener import Silent

KEY, RATE = "ddr.bytes_per_cycle", 40
CHANGE = (f"{KEY}={RATE}",)
SLOW = overlay(load_target("vacc-reference"), {KEY: RATE})


@pytest.fixture(scope="module")
def slow(config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The small model, compiled for a machine whose memory is slower than the reference's."""
    report = compile_model(config(tmp_path_factory.mktemp("slow")), (), Silent(), what_if=CHANGE)
    assert report.path is not None
    return open_artifact(Path(report.path))


def test_an_artifact_carries_the_changed_machine_and_says_so(slow: Artifact) -> None:
    assert load_target(slow.path / TARGET) == SLOW
    facts = slow.facts.target
    assert (facts.name, facts.sha) == (f"vacc-reference+{KEY}={RATE}", SLOW.sha)
    assert facts.assumed["die.ddr.bytes_per_cycle"] == RATE
    for phase in slow.phases:
        assert Program.from_text(slow.schedule(phase)).target_sha == SLOW.sha


def test_the_artifact_of_a_changed_machine_verifies_and_is_timed_as_compiled(slow: Artifact) -> None:
    assert [one.problems for one in verify_artifact(slow.path, Silent()) if not one.passed] == []
    for phase in slow.facts.phases:
        assert simulate(slow.path, phase.phase).cycles == phase.cycles


def test_the_artifact_of_a_changed_machine_runs_on_its_schedules(slow: Artifact, artifact: Artifact) -> None:
    """Tiles may differ, numbers are those of the model: both engines choose the same token."""
    tokens = list(range(40, 50))
    picks = {int(prefill(make_engine("schedule", one), tokens).argmax()) for one in (slow, artifact)}
    assert picks == {int(prefill(make_engine("onnxruntime", artifact), tokens).argmax())}


def test_what_was_kept_for_one_machine_is_not_used_for_another(config: Callable[..., Path], tmp_path: Path) -> None:
    """The artifact of a configuration is made anew when a number changes, and again when it changes back."""
    file, made = config(tmp_path), []
    for what_if in ((), CHANGE, CHANGE, ()):
        report = compile_model(file, (), Silent(), what_if=what_if)
        steps = {step.name: step.sentence for step in report.steps}
        made.append((report.facts.target.sha, steps["write"] == "cached"))
        assert load_target(Path(str(report.path)) / TARGET).sha == report.facts.target.sha
    plain = load_target("vacc-reference").sha
    assert made == [(plain, False), (SLOW.sha, False), (SLOW.sha, True), (plain, False)]


def test_a_plan_is_made_for_the_changed_machine(config: Callable[..., Path], tmp_path: Path, slow: Artifact) -> None:
    planned = compile_model(config(tmp_path), (), Silent(), plan_only=True, what_if=CHANGE)
    assert [one.cycles for one in planned.facts.phases] == [one.cycles for one in slow.facts.phases]


def test_simulate_times_the_same_text_on_another_machine_and_says_whose_tiles_they_are(
    artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not what `sweep` says, which chooses tiles anew: here no schedule changes."""
    assert main(["simulate", str(artifact.path), "--phase", "decode", "--what-if", *CHANGE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == f"{SLOW.name} v{SLOW.version}"
    assert found["tiles_of"] == f"vacc-reference v{SLOW.version}"
    (point,) = sweep(artifact.path, {KEY: [RATE]}).points
    anew = next(one for one in point.phases if one.phase == "decode")
    assert found["cycles"] > simulate(artifact.path, "decode").cycles
    assert found["cycles"] >= anew.cycles
    assert main(["simulate", str(artifact.path), "--phase", "decode", "--what-if", *CHANGE]) == 0
    assert "tiles are those that were chosen for vacc-reference v1" in capsys.readouterr().out


def test_without_a_change_nothing_is_said_of_tiles(artifact: Artifact) -> None:
    found = simulate(artifact.path, "decode")
    assert found.tiles_of is None
    assert "tiles" not in found.text()


@pytest.mark.parametrize(
    ("change", "rule"),
    [("sram.bytes=4KiB", "capacity"), ("die.cores=4", "with 8 cores"), ("ddr.capacity=4KiB", "capacity")],
)
def test_a_machine_on_which_the_stored_schedule_breaks_a_rule_is_refused_with_the_rule(
    artifact: Artifact, change: str, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", str(artifact.path), "--phase", "decode", "--what-if", change]) == 1
    printed = capsys.readouterr()
    assert rule in printed.err
    assert printed.out == ""


def test_a_schedule_that_is_not_of_its_target_stays_refused(artifact: Artifact, tmp_path: Path) -> None:
    """A changed machine is no way around the check that the text belongs to the artifact's target."""
    copy = tmp_path / "copy"
    shutil.copytree(artifact.path, copy)
    text = (copy / TARGET).read_text().replace("value: 835", "value: 836", 1)
    (copy / TARGET).write_text(text)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][TARGET] = file_entry(copy / TARGET)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ScheduleError, match="made for vacc-reference"):
        simulate(copy, "decode", what_if=CHANGE)


@pytest.mark.parametrize("change", ["ddr.latancy=3", "ddr.latency", "ddr.efficiency=2"])
def test_an_unknown_number_is_refused_before_anything_is_done(
    config: Callable[..., Path], tmp_path: Path, artifact: Artifact, change: str
) -> None:
    listener = Silent()
    with pytest.raises(UserError):
        compile_model(config(tmp_path), (), listener, what_if=[change])
    assert listener.said == {}
    assert not (tmp_path / "out" / "tiny").exists()
    with pytest.raises(UserError):
        simulate(artifact.path, "decode", what_if=[change])

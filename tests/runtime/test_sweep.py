"""A sweep predicts what compiling for each machine would predict, and says of a machine that cannot run the model why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vacc_opt.cli.main import main
from vacc_opt.ir.errors import UserError
from vacc_opt.runtime.artifact import Artifact
from vacc_opt.runtime.simulate import simulate
from vacc_opt.runtime.sweep import Sweep, parse_over, sweep

RATES = (50, 64, 200)


@pytest.fixture(scope="module")
def found(artifact: Artifact) -> Sweep:
    return sweep(artifact.path, {"ddr.bytes_per_cycle": RATES})


def test_the_point_of_the_target_itself_is_what_simulate_predicts(found: Sweep, artifact: Artifact) -> None:
    point = found.points[RATES.index(64)]
    assert [one.phase for one in point.phases] == list(artifact.phases)
    for one in point.phases:
        simulated = simulate(artifact.path, one.phase)
        assert (one.cycles, one.bound_cycles) == (simulated.cycles, simulated.bound_cycles)
        assert (one.ratio, one.binds) == (simulated.ratio, simulated.binds)


def test_more_bandwidth_makes_no_phase_slower_and_raises_no_bound(found: Sweep) -> None:
    for phase in range(len(found.points[0].phases)):
        times = [point.phases[phase] for point in found.points]
        assert [one.cycles for one in times] == sorted((one.cycles for one in times), reverse=True)
        assert times[0].bound_cycles >= times[-1].bound_cycles  # latency may bind in so small a model
        assert all(one.ratio >= 1 for one in times)


def test_every_point_is_another_machine(found: Sweep) -> None:
    assert len({point.sha for point in found.points}) == len(RATES)
    assert found.keys == ("die.ddr.bytes_per_cycle",)


def test_a_configuration_gives_the_times_of_its_artifact(
    found: Sweep, config: Callable[..., Path], tmp_path: Path
) -> None:
    planned = sweep(config(tmp_path), {"ddr.bytes_per_cycle": (200,)})
    assert planned.points[0].phases == found.points[-1].phases


def test_a_machine_that_cannot_run_the_model_is_a_point_with_a_reason(artifact: Artifact) -> None:
    small, large = sweep(artifact.path, {"sram.bytes": (64, 1 << 20)}).points
    assert small.phases == ()
    assert small.reason is not None
    assert "SRAM" in small.reason
    assert large.reason is None


def test_all_combinations_of_two_keys_are_tried(artifact: Artifact, tmp_path: Path) -> None:
    both = sweep(artifact.path, {"ddr.bytes_per_cycle": (64, 200), "die.cores": (4, 8)})
    assert [list(point.values.values()) for point in both.points] == [[64, 4], [64, 8], [200, 4], [200, 8]]
    page = both.html()
    assert page == both.html()
    assert page.count('<polyline class="time"') == 4  # two phases at two numbers of cores
    assert page.count("<tr>") == 1 + 8


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "nothing to sweep over"),
        (["ddr.bytes_per_cycle"], "no KEY=VALUE,VALUE"),
        (["ddr.bytes_per_cycle=fast"], "`fast` is no number"),
        (["die.cores=1", "die.cores=2"], "given twice"),
    ],
)
def test_what_is_no_list_of_values_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_over(texts)


def test_an_unknown_key_is_refused_with_the_nearest_one(artifact: Artifact) -> None:
    with pytest.raises(UserError) as caught:
        sweep(artifact.path, {"ddr.bytes_per_cycl": (1,)})
    assert "no number `ddr.bytes_per_cycl`" in str(caught.value)
    assert "ddr.bytes_per_cycle" in str(caught.value.hint)


def test_the_command_prints_a_table_a_json_object_and_a_page(
    artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "sweep.html"
    words = ["sweep", str(artifact.path), "--over", "ddr.bytes_per_cycle=50,200"]
    assert main([*words, "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "die.ddr.bytes_per_cycle" in printed
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main([*words, "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["values"] for point in points] == [{"die.ddr.bytes_per_cycle": rate} for rate in (50, 200)]


def test_a_key_that_is_no_number_ends_with_exit_code_2_and_writes_nothing(
    artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "sweep.html"
    assert main(["sweep", str(artifact.path), "--over", "cores.sram=1", "--html", str(page)]) == 2
    assert "error: target vacc-reference has no number `cores.sram`" in capsys.readouterr().err
    assert not page.exists()

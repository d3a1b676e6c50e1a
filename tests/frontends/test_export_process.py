"""An export in a process of its own: started ahead of its request, and with a fork that checks what it rests on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from vacc_opt.frontends import export_checkpoint, export_process, torch_export
from vacc_opt.frontends.beside import Beside
from vacc_opt.frontends.export_process import ExportProcess, started_ahead
from vacc_opt.frontends.families import structures
from vacc_opt.frontends.huggingface import build_module
from vacc_opt.frontends.skeleton import ExportDefect, export_skeleton
from vacc_opt.frontends.torch_export import Skeleton, export_module
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.text import to_text

LAYERS = 5


def small(name: str = "llama3-2") -> dict[str, Any]:
    """The small config of a family, with layers that may be left out."""
    found = dict(dict(structures())[name].config)
    return found | {"num_layers" if "num_layers" in found else "num_hidden_layers": LAYERS}


def answer(value: bool) -> bool:
    return value


def test_a_question_is_answered_beside() -> None:
    for value in (True, False):
        with Beside(lambda value=value: answer(value)) as asked:  # type: ignore[misc]
            assert asked() is value
            assert asked() is value


def test_what_a_question_raises_is_not_lost() -> None:
    with Beside(lambda: answer(bool(1 // 0))) as asked, pytest.raises(RuntimeError, match="ZeroDivisionError"):
        asked()


def test_a_killed_process_beside_is_no_answer() -> None:
    def killed() -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        return True

    with Beside(killed) as asked, pytest.raises(RuntimeError, match="process beside failed: it ended with status 9"):
        asked()


def test_nobody_waits_for_an_answer_that_is_not_wanted() -> None:
    with Beside(lambda: bool(signal.pause())):  # type: ignore[func-returns-value]
        pass
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def exported(beside: bool, change: Any = None) -> Skeleton:
    module, mode = build_module(small())
    if change is not None:
        change(module)
    return export_module(module, mode, beside=beside)


def test_the_layers_are_checked_beside_the_trace_of_two() -> None:
    beside, before = exported(True), exported(False)
    assert beside.layers is not None
    assert beside.layers.count == LAYERS
    assert (beside.model.SerializeToString(), beside.origins) == (before.model.SerializeToString(), before.origins)


def test_different_layers_are_all_exported_though_two_were_traced() -> None:
    def another(module: Any) -> None:
        module.model.layers[3].register_forward_hook(lambda layer, given, result: result * 2)

    beside, before = exported(True, another), exported(False, another)
    assert beside.layers is None
    assert len([o for o in beside.model.graph.output if o.name.endswith("key")]) == LAYERS
    assert beside.model.SerializeToString() == before.model.SerializeToString()


def test_a_check_that_fails_ends_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("no room for the check")

    monkeypatch.setattr(torch_export, "find_same_layers", fails)
    with pytest.raises(RuntimeError, match="no room for the check"):
        exported(True)


@pytest.mark.parametrize("name", ["llama3-2", "chatglm2", "phi-2", pytest.param("falcon", marks=pytest.mark.full)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_shorter_ways_through_the_exporter_give_what_the_long_ones_give(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skeleton() -> tuple[bytes, object]:
        found = export_skeleton(small(name), attention, isolated=False, progress=lambda _: None)
        return found.model.SerializeToString(deterministic=True), found.origins

    short = skeleton()
    monkeypatch.setattr(torch_export, "shorter_export", nullcontext)
    assert short == skeleton()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ExportProcess]]:
    """The processes that were started."""
    found: list[ExportProcess] = []

    class Counted(ExportProcess):
        def __init__(self) -> None:
            super().__init__()
            found.append(self)

    monkeypatch.setattr(export_process, "ExportProcess", Counted)
    yield found
    assert not any(process.folder.exists() for process in found)


def test_an_export_takes_the_process_that_was_started_ahead(started: list[ExportProcess], untied_llama: Any) -> None:
    with started_ahead():
        ahead = export_checkpoint(untied_llama.path)
        assert len(started) == 1
        assert to_text(export_checkpoint(untied_llama.path)) == to_text(ahead)
        assert len(started) == 2


def test_a_process_ahead_that_nobody_needs_ends(started: list[ExportProcess]) -> None:
    with started_ahead():
        pass
    with started_ahead() as end:
        end()
        assert not started[1].folder.exists()


def test_a_process_that_ended_ahead_is_a_defect_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, untied_llama: Any, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ExportDefect, match="this torch is broken"), started_ahead():
        export_checkpoint(untied_llama.path)


def test_a_full_disk_is_no_defect_of_an_export(
    monkeypatch: pytest.MonkeyPatch, untied_llama: Any, tmp_path: Path
) -> None:
    full = "import onnx\n\ndef save(*_):\n    raise OSError(28, 'No space left on device')\n\nonnx.save = save\n"
    (tmp_path / "sitecustomize.py").write_text(full)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="the export cannot be written: No space left on device"):
        export_checkpoint(untied_llama.path)

"""A compile that ends at any moment, by a kill or for want of space: the target is absent or whole, and nothing stays."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from vacc_opt.ir.errors import UserError
from vacc_opt.runtime.artifact import Artifact, open_artifact
from vacc_opt.runtime.compile import compile_model
from vacc_opt.runtime.integrity import damages
from vacc_opt.tests.listener import Silent

MOMENTS = 10


def command(file: Path) -> list[str]:
    return [sys.executable, "-m", "vacc_opt.cli.main", "compile", str(file)]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def is_whole(path: Path) -> bool:
    artifact = open_artifact(path)
    return damages(path, artifact.manifest["files"]) == {}


@pytest.mark.full
@pytest.mark.parametrize("stands", [False, True])
def test_a_kill_at_any_moment_leaves_the_target_absent_or_whole(
    stands: bool, config: Callable[..., Path], artifact: Artifact, tmp_path: Path
) -> None:
    """Ten moments, spread over a run that does all of its work; then a run that ends makes the bytes of any other."""
    file = config(tmp_path)
    out, target = tmp_path / "out", tmp_path / "out" / "tiny"
    started = time.perf_counter()
    subprocess.run(command(file), check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    before = contents(target)
    assert before == contents(artifact.path)
    moments = random.Random(7)
    for number in range(MOMENTS):
        for kept in (".cache", ".calibration"):
            shutil.rmtree(out / kept, ignore_errors=True)
        if not stands:
            shutil.rmtree(target, ignore_errors=True)
        process = subprocess.Popen(command(file), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds * (number + moments.random()) / MOMENTS)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not target.exists() or is_whole(target)
    subprocess.run(command(file), check=True, stdout=subprocess.DEVNULL)
    assert contents(target) == before
    assert {path.name for path in out.iterdir()} == {"tiny", ".cache", ".calibration"}


def test_a_kill_while_weights_are_written_leaves_the_old_artifact_and_the_next_run_cleans_up(
    config: Callable[..., Path], artifact: Artifact, tmp_path: Path
) -> None:
    file, target = config(tmp_path), tmp_path / "out" / "tiny"
    shutil.copytree(artifact.path, target)
    child = os.fork()
    if child == 0:
        import vacc_opt.runtime.artifact as module

        def killed(*_: object, **__: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        module.save_onnx = killed  # the weights are there, the graphs are not
        compile_model(file, (), Silent())
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = [path for path in target.parent.iterdir() if path.name.startswith(".tiny.")]
    assert [path.name for path in left[0].glob("*.safetensors")] != []
    assert is_whole(target)
    compile_model(file, (), Silent())
    assert contents(target) == contents(artifact.path)
    assert not left[0].exists()


def test_a_disk_that_is_full_is_one_message(config: Callable[..., Path], tmp_path: Path) -> None:
    """Files of more than 40,000 bytes cannot be written, as where a quota or the disk ends."""
    run = subprocess.run(
        command(config(tmp_path)),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert run.returncode == 2
    assert "out/tiny: cannot be written: File too large" in run.stderr
    assert len(run.stderr.splitlines()) == 2
    assert not (tmp_path / "out" / "tiny").exists()
    assert [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".tiny")] == []


def test_a_truncated_shard_is_named_before_any_work(
    checkpoint: Path, config: Callable[..., Path], tmp_path: Path
) -> None:
    root = tmp_path / "model"
    shutil.copytree(checkpoint, root)
    tensors = load_file(root / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, root / shard)
    index = {name: shard for shard, held in shards.items() for name in held}
    (root / "model.safetensors.index.json").write_text('{"weight_map": ' + str(index).replace("'", '"') + "}")
    (root / "model.safetensors").unlink()
    os.truncate(root / "b.safetensors", 5000)
    with pytest.raises(UserError, match=r"b\.safetensors: truncated: .* ends at byte \d+, the file has 5000"):
        compile_model(config(tmp_path, checkpoint=root, type="huggingface"), (), Silent())
    assert not (tmp_path / "out").exists()

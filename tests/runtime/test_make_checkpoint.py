"""The random checkpoints that full-size measurements compile: official layout, readable, the same each time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from vacc_opt.benchmarks.make_checkpoint import write_checkpoint
from vacc_opt.frontends import open_checkpoint
from vacc_opt.frontends.families import structures

CONFIGS = {name: structure.config for name, structure in structures()}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["chatglm2", "qwen2-2", "gemma-1", "internlm2", "falcon"])
def test_shards_open_with_the_bytes_that_were_promised(tmp_path: Path, name: str, form: str) -> None:
    size = write_checkpoint(CONFIGS[name], tmp_path, form=form, shard_bytes=40_000)
    assert len(list(tmp_path.glob(f"*.{form}"))) > 1
    checkpoint = open_checkpoint(tmp_path)
    assert sum(tensor.nbytes for tensor in checkpoint.tensors.values()) == size
    largest = max(checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes)
    values = np.abs(np.asarray(largest.read(())).astype(np.float32))
    assert values.min() >= 2**-7
    assert values.max() < 2**-3


def test_the_same_config_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for run in ("first", "second"):
        write_checkpoint(CONFIGS["chatglm2"], tmp_path / run, dtype="bfloat16")
        digests.append(hashlib.sha256((tmp_path / run / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1]


def test_a_sparse_checkpoint_has_its_size_and_takes_no_disk(tmp_path: Path) -> None:
    size = write_checkpoint(CONFIGS["qwen3-2"], tmp_path, sparse=True)
    status = (tmp_path / "model.safetensors").stat()
    assert status.st_size > size > status.st_blocks * 512

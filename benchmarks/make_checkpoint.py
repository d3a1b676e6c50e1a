"""Write a checkpoint in the official layout of any supported architecture, with random weights, at real size.

    python -m vacc_opt.benchmarks.make_checkpoint chatglm2-6b DIRECTORY --layers 28 --dtype float16

MODEL is a name in ``published.py`` or the path of a config.json. Names and shapes are the parameters of the module that
transformers or our definitions build; the values are seeded by the name of the tensor. With ``--sparse`` the shards
have their size but no data on disk, for what never reads a weight.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import click
import numpy as np
import numpy.typing as npt

from vacc_opt.benchmarks.published import CONFIGS, with_layers

Shapes = dict[str, tuple[int, ...]]
# by dtype: its safetensors name, and for random 16 bits: those that stay, and those that are set so that magnitudes lie
# between 2^-7 and 2^-3, as weights do
DTYPES = {"float16": ("F16", 0x8FFF, 0x2000), "bfloat16": ("BF16", 0x81FF, 0x3C00)}
SHARD_BYTES, BLOCK = 2_000_000_000, 1 << 24


def shapes_of(config: Mapping[str, Any]) -> Shapes:
    """The tensors of a published checkpoint of the architecture, tied ones once."""
    from vacc_opt.frontends.huggingface import build_module

    module, _ = build_module(config)
    persistent = module.state_dict().keys()
    tensors = [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if n in persistent)]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def random_blocks(name: str, count: int, dtype: str) -> Iterator[npt.NDArray[np.uint16]]:
    """``count`` numbers of 16 bits, some million at a time; weights of norms are near one."""
    _, kept, set_bits = DTYPES[dtype]
    generator = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    if "norm" in name:
        near_one = 1 + generator.uniform(-0.25, 0.25, count).astype(np.float32)
        yield near_one.astype(np.float16).view(np.uint16) if dtype == "float16" else _bfloat16(near_one)
        return
    for at in range(0, count, BLOCK):
        some = min(BLOCK, count - at)
        bits = generator.integers(0, 2**64, -(-some // 4), dtype=np.uint64).view(np.uint16)[:some]
        bits &= np.uint16(kept)
        bits |= np.uint16(set_bits)
        yield bits


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def shards_of(shapes: Shapes, most: int = SHARD_BYTES) -> list[list[str]]:
    """Names of the tensors of each shard, at most ``most`` bytes of 2-byte elements where one tensor is not larger."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def write_checkpoint(
    config: Mapping[str, Any],
    directory: Path,
    *,
    dtype: str = "float16",
    form: str = "safetensors",
    sparse: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write config.json, the shards and their index; gives the bytes of the weights.

    Args:
        config: as config.json.
        directory: is made; files in it are replaced.
        dtype: ``float16`` or ``bfloat16``.
        form: ``safetensors`` or ``bin``, which holds a shard in memory.
        sparse: safetensors whose data are a hole in the file: zeros that take no disk.
        shard_bytes: the most that a shard holds.
    """
    shapes = shapes_of(config)
    shards = shards_of(shapes, shard_bytes)
    directory.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = directory / f"{stem}{part}.{suffix}"
        tensors = {name: shapes[name] for name in names}
        if form == "bin":
            _save_bin(file, tensors, dtype)
        else:
            _save_safetensors(file, tensors, dtype, sparse)
        where |= dict.fromkeys(names, file.name)
    size = sum(2 * math.prod(shape) for shape in shapes.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=1))
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}, indent=1))
    return size


def _save_safetensors(file: Path, tensors: Shapes, dtype: str, sparse: bool) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": DTYPES[dtype][0], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            out.truncate(out.tell() + end)
        else:
            _write_values(out, tensors, dtype)


def _write_values(out: BinaryIO, tensors: Shapes, dtype: str) -> None:
    for name, shape in tensors.items():
        for block in random_blocks(name, math.prod(shape), dtype):
            block.tofile(out)


def _save_bin(file: Path, tensors: Shapes, dtype: str) -> None:
    import torch

    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        bits = np.concatenate(list(random_blocks(name, math.prod(shape), dtype)))
        return torch.from_numpy(bits).view(getattr(torch, dtype)).reshape(shape)

    torch.save({name: tensor(name, shape) for name, shape in tensors.items()}, file)


def read_config(model: str) -> dict[str, Any]:
    """The config of a name in ``published.py``, or of a file."""
    if model in CONFIGS:
        return CONFIGS[model]
    if not Path(model).is_file():
        raise click.BadParameter(f"{model}: no such config.json, and none of {', '.join(CONFIGS)}")
    found: dict[str, Any] = json.loads(Path(model).read_text())
    return found


@click.command()
@click.argument("model")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(1), help="Another number of layers.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float16", show_default=True)
@click.option("--format", "form", type=click.Choice(["safetensors", "bin"]), default="safetensors", show_default=True)
@click.option("--sparse", is_flag=True, help="Files of the right size without data.")
def main(model: str, directory: Path, layers: int | None, dtype: str, form: str, sparse: bool) -> None:
    """Write a checkpoint of MODEL (a name in published.py, or a config.json) to DIRECTORY."""
    if sparse and form == "bin":
        raise click.UsageError("--sparse is for safetensors: the data of a .bin are inside an archive")
    config = read_config(model)
    config = with_layers(config, layers) if layers else config
    size = write_checkpoint(config, directory, dtype=dtype, form=form, sparse=sparse)
    click.echo(f"-> {directory}   {size / 1e9:.2f} GB of {dtype}")


if __name__ == "__main__":
    sys.exit(main())

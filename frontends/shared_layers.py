"""Which layers of a checkpoint share their feed-forward block, where its config.json does not say.

Of a block that several layers share, a file may hold one copy, under the name of any of the layers, or a copy for each.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from vacc_opt.frontends.checkpoint import Checkpoint
from vacc_opt.ir.tensor import Source, TensorExpr

_SHARING = "MobiLlamaForCausalLM"
_BLOCK = re.compile(r"model\.layers\.(\d+)\.mlp\.(\w+\.weight)")
_CHUNK = 1 << 20


def find_shared_layers(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with ``share_mlp`` in its config, and one copy of a shared block, under the name of layer 0.

    Checkpoints of other architectures come back as they are.
    """
    if _SHARING not in (checkpoint.config.get("architectures") or ()):
        return checkpoint
    blocks: dict[int, dict[str, TensorExpr]] = {}
    others: dict[str, TensorExpr] = {}
    for name, tensor in checkpoint.tensors.items():
        if found := _BLOCK.fullmatch(name):
            blocks.setdefault(int(found[1]), {})[found[2]] = tensor
        else:
            others[name] = tensor
    parts: dict[str, list[TensorExpr]] = {}
    for layer in sorted(blocks):
        for part, tensor in blocks[layer].items():
            parts.setdefault(part, []).append(tensor)
    shared = all(_same(copies[0], other) for copies in parts.values() for other in copies[1:])
    config = {**checkpoint.config, "share_mlp": shared}
    if not shared:
        return replace(checkpoint, config=config)
    first = {f"model.layers.0.mlp.{part}": copies[0] for part, copies in parts.items()}
    return replace(checkpoint, config=config, tensors=others | first)


def _same(a: TensorExpr, b: TensorExpr) -> bool:
    """Two tensors hold the same bytes; unequal ones are read as far as the first difference, by the megabyte."""
    if not isinstance(a, Source) or not isinstance(b, Source) or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with Path(a.file).open("rb") as one, Path(b.file).open("rb") as two:
        one.seek(a.offset)
        two.seek(b.offset)
        for start in range(0, a.nbytes, _CHUNK):
            size = min(_CHUNK, a.nbytes - start)
            if one.read(size) != two.read(size):
                return False
    return True

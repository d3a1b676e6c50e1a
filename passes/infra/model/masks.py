"""What an attention mask means: its subgraph is run on probes and compared with causal + padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vacc_opt.ir import DType, Graph, Node, Value
from vacc_opt.ir.copy import extract
from vacc_opt.ir.errors import VaccError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.passes.infra.base import ancestors, where

BLOCKED = -1e4  # a float mask below this hides a key: exporters write finfo.min or -inf
# (batch, new tokens, past tokens, left pads of each row, right pads of each row)
PROBES = (
    (1, 5, 0, (0,), (0,)),
    (2, 4, 3, (0, 2), (0, 0)),
    (2, 6, 0, (3, 0), (0, 2)),
    (1, 1, 7, (2,), (0,)),
    (1, 40, 37, (0,), (0,)),
)


def why_not_causal_padding(graph: Graph, attentions: Sequence[Node], context: int) -> str:
    """Empty when every attention is causal, bottom-right aligned, over the keys that ``attention_mask`` admits.

    Otherwise one sentence that names the attention and the first query and key that differ. The probes cover several
    lengths, a past, and padding on both sides; one has ``context`` keys, so that a sliding window shorter than the
    buffers is seen. Rows of queries that are padding, or whose keys are all hidden, are not compared: nothing reads
    them, and models differ in what they let them see.
    """
    seen: set[Value] = set()
    for node in attentions:
        mask = node.input(3)
        if mask is None:
            if node.attributes.get("is_causal"):
                continue
            return f"{where(node)} has no mask: it is bidirectional"
        if node.attributes.get("is_causal"):
            return f"{where(node)} has a mask and is_causal, which is not supported"
        if mask not in seen:
            seen.add(mask)
            why = _probe_all(graph, mask, context)
            if why:
                return f"the mask of {where(node)} is not causal with padding: {why}"
    return ""


def _probe_all(graph: Graph, mask: Value, context: int) -> str:
    nodes = list(ancestors(graph, mask))
    region = extract(graph, nodes, "mask", keep=[mask])
    run: Executable | None = None
    for probe in (*PROBES, (1, 1, context - 1, (0,), (0,))):
        feeds, expected = _feeds(region, probe)
        missing = [v.name for v in region.inputs if v.name not in feeds]
        if missing:
            return f"it depends on the input {missing[0]!r}"
        try:
            run = run or Executable(region)
            found = run.run(feeds)[0][mask.name]
        except VaccError as error:
            return f"it cannot be evaluated: {error.message}"
        why = _compare(found, expected, probe)
        if why:
            return why
    return ""


def _feeds(
    region: Graph, probe: tuple[int, int, int, tuple[int, ...], tuple[int, ...]]
) -> tuple[dict[str, npt.NDArray[np.generic]], npt.NDArray[np.bool_]]:
    batch, seq, past, left, right = probe
    keep = np.ones((batch, past + seq), np.int64)
    for row in range(batch):
        keep[row, : left[row]] = 0
        keep[row, past + seq - right[row] :] = 0
    feeds: dict[str, npt.NDArray[np.generic]] = {}
    for value in region.inputs:
        dims = {"batch": batch, "seq": seq, "past": past, "past + seq": past + seq}
        shape = [d if isinstance(d, int) else dims.get(str(d), 1) for d in value.shape or ()]
        if value.name == "attention_mask":
            feeds[value.name] = keep.astype(value.type.dtype.numpy)
        elif value.name == "position_ids":
            feeds[value.name] = np.clip(np.cumsum(keep, axis=1) - 1, 0, None)[:, past:]
        elif value.name == "input_ids" or value.rank == 4:
            feeds[value.name] = np.zeros(shape, value.type.dtype.numpy)
    causal = np.arange(past + seq)[None, :] <= np.arange(seq)[:, None] + past
    # a row without any key to see stands for "not compared"
    return feeds, causal[None] & (keep[:, None, :] == 1) & (keep[:, past:, None] == 1)


def _compare(found: npt.NDArray[np.generic], expected: npt.NDArray[np.bool_], probe: Sequence[object]) -> str:
    floats = found.astype(np.float32)
    allowed = found.astype(np.bool_) if found.dtype == DType.BOOL.numpy else floats > BLOCKED
    if found.dtype != DType.BOOL.numpy and bool(np.any(allowed & (floats != 0))):
        return "it adds a bias to the scores"
    batch, seq, total = expected.shape
    try:
        full = np.broadcast_to(allowed, (batch, allowed.shape[-3] if allowed.ndim > 2 else 1, seq, total))
    except ValueError:
        return f"its shape is {list(found.shape)} for {batch} rows, {seq} queries and {total} keys"
    for head in range(full.shape[1]):
        wrong = (full[:, head] != expected) & expected.any(axis=2, keepdims=True)
        if wrong.any():
            row, query, key = (int(i) for i in np.argwhere(wrong)[0])
            verb = "sees" if full[row, head, query, key] else "does not see"
            return f"with {probe[2]} past tokens, query {query} {verb} key {key}"
    return ""

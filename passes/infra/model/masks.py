"""What an attention mask means: its subgraph is run on probes and compared with causal + padding, window and slopes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir import DType, Graph, Literal, Node, Value
from vacc_opt.ir.copy import extract
from vacc_opt.ir.errors import VaccError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.passes.infra.base import ancestors
from vacc_opt.passes.infra.patterns.values import shown

BLOCKED = -1e4  # a float mask below this hides a key: exporters write finfo.min or -inf
# (batch, new tokens, past tokens, left pads of each row, right pads of each row)
PROBES = (
    (1, 5, 0, (0,), (0,)),
    (2, 4, 3, (0, 2), (0, 0)),
    (2, 6, 0, (3, 0), (0, 2)),
    (1, 1, 7, (2,), (0,)),
    (1, 40, 37, (0,), (0,)),
)


@dataclass(frozen=True)
class Meaning:
    """A mask that is causal, bottom-right aligned, over the keys that ``attention_mask`` admits.

    ``window``: a query sees so many keys at most, its own included; 0 is all of them. ``slopes`` [heads]: each score
    falls with the distance to its key by the head's slope (ALiBi). ``why``: why the mask is none of this, else empty.
    """

    window: int = 0
    slopes: npt.NDArray[np.floating[Any]] | None = None
    why: str = ""

    @property
    def is_plain(self) -> bool:
        """Causal with padding, and no more."""
        return not self.window and self.slopes is None


def recognize_mask(graph: Graph, mask: Value, context: int) -> Meaning:
    """What a mask means, found by running its subgraph on probes.

    The probes cover several lengths, a past, and padding on both sides; one has ``context`` keys, so that a sliding
    window shorter than the buffers is seen. Rows of queries that are padding, or whose keys are all hidden, are not
    compared: nothing reads them, and models differ in what they let them see.
    """
    if mask.producer is None:
        return Meaning(why=f"{shown(mask)} says nothing of its meaning")
    nodes = list(ancestors(graph, mask))
    region = extract(graph, nodes, "mask", keep=[mask])
    fitting = [probe for probe in PROBES if probe[1] + probe[2] <= context]  # beyond it a window may hide keys
    try:
        run = Executable(region)
        probes = [(probe, *_feeds(region, probe)) for probe in ((1, 1, context - 1, (0,), (0,)), *fitting)]
        missing = [v.name for v in region.inputs if v.name not in probes[0][1]]
        if missing:
            return Meaning(why=f"it depends on the input {missing[0]!r}")
        found = [(probe, seen, run.run(feeds)[0][mask.name]) for probe, feeds, seen in probes]
        longest = found[0][2]
        window = int(_allowed(longest).reshape(-1, longest.shape[-1])[0].sum())
        window = 0 if window >= context else window
        # one length cannot tell a window from a chunk that ends there
        for past in {window, window + window // 2, (window + context) // 2} if window else ():
            if 0 < past < context - 1:
                feeds, seen = _feeds(region, (1, 1, past, (0,), (0,)))
                found.append(((1, 1, past, (0,), (0,)), seen, run.run(feeds)[0][mask.name]))
    except VaccError as error:
        return Meaning(why=f"it cannot be evaluated: {error.message}")
    slopes = _slopes(longest, graph, nodes)
    found.append(found.pop(0))  # short calls make short reasons

    def compare(window: int) -> str:
        reasons = (_compare(array, _within(seen, window, probe[2]), probe, slopes) for probe, seen, array in found)
        return next((why for why in reasons if why), "")

    if not compare(window):
        return Meaning(window, slopes)
    return Meaning(why=compare(0))


def _allowed(found: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    return found.astype(np.bool_) if found.dtype == DType.BOOL.numpy else found.astype(np.float32) > BLOCKED


def _slopes(longest: npt.NDArray[np.generic], graph: Graph, nodes: Sequence[Node]) -> npt.NDArray[Any] | None:
    """What the mask of one query adds a key of distance, by head; None when it adds nothing.

    Where the graph holds a constant of these numbers, that one, which is exact.
    """
    if longest.dtype == DType.BOOL.numpy or longest.ndim != 4:
        return None
    rows, shown = longest[0, :, 0].astype(np.float64), _allowed(longest)[0, :, 0]
    keys = np.flatnonzero(shown[0])
    if len(keys) < 2 or not np.any(rows[:, keys]):
        return None
    slopes = (rows[:, keys[-1]] - rows[:, keys[0]]) / (keys[-1] - keys[0])
    if not slopes.any():
        return None
    for value in {v: None for node in nodes for v in node.inputs if v is not None and v.const is not None}:
        if isinstance(value.const, Literal) and value.const.array.size == slopes.size:
            exact = value.const.array.reshape(-1)
            if exact.dtype.kind == "f" and np.allclose(exact, slopes, rtol=1e-5):
                return np.asarray(exact)
    return np.asarray(slopes, np.float32)


def _within(seen: npt.NDArray[np.bool_], window: int, past: int) -> npt.NDArray[np.bool_]:
    if not window:
        return seen
    _, queries, keys = seen.shape
    near = np.arange(keys)[None, :] > np.arange(queries)[:, None] + past - window
    return seen & near


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


def _compare(
    found: npt.NDArray[np.generic],
    expected: npt.NDArray[np.bool_],
    probe: Sequence[Any],
    slopes: npt.NDArray[Any] | None,
) -> str:
    allowed = _allowed(found)
    batch, seq, total = expected.shape
    heads = found.shape[-3] if found.ndim > 2 else 1
    try:
        full = np.broadcast_to(allowed, (batch, heads, seq, total))
        added = np.broadcast_to(found, full.shape).astype(np.float64) if found.dtype != DType.BOOL.numpy else None
    except ValueError:
        return f"its shape is {list(found.shape)} for {batch} rows, {seq} queries and {total} keys"
    for head in range(heads):
        wrong = (full[:, head] != expected) & expected.any(axis=2, keepdims=True)
        if wrong.any():
            row, query, key = (int(i) for i in np.argwhere(wrong)[0])
            verb = "sees" if full[row, head, query, key] else "does not see"
            return f"with {probe[2]} past tokens, query {query} {verb} key {key}"
    if added is not None and not _linear(added, full & expected[:, None], slopes):
        return "it adds a bias to the scores that is no slope of the distance"
    return ""


def _linear(added: npt.NDArray[Any], shown: npt.NDArray[np.bool_], slopes: npt.NDArray[Any] | None) -> bool:
    """Each row of what is added is slope * key, up to a constant of the row, which softmax cancels."""
    line = np.zeros(added.shape[1]) if slopes is None else slopes.astype(np.float64)
    rest = np.where(shown, added - line[:, None, None] * np.arange(added.shape[-1]), np.nan)
    rows = rest[shown.any(axis=-1)]
    if not rows.size:
        return True
    spread = np.nanmax(rows, axis=-1) - np.nanmin(rows, axis=-1)
    largest = float(np.max(np.abs(added), where=shown, initial=0.0))
    # a mask without slopes adds nothing at all; rounding of slope * key is that of the largest product
    return bool(np.all(spread <= 1e-5 * largest)) if slopes is not None else largest == 0

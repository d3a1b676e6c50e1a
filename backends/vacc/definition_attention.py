"""What an attention kernel computes: every query row, softmax over exactly the keys that it sees, each with its value.

Query row i of a call stands at key `pos + i` of the cache, or at `i` among the keys of the call itself where those are
given apart (`KN`, `VN`; then only rows before `pos` count in the cache). It sees keys up to its own, with a window only
the last ones. Blocks may be cut anywhere and come in any order; keys that no row of a tile sees may be left out or
masked. Scales of an int8 cache are folded: K's into Q, V's and its zero into the sum over the blocks of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vacc_opt.backends.vacc.definitions import Wanted
from vacc_opt.backends.vacc.expressions import Node
from vacc_opt.backends.vacc.regions import first_overlap, first_uncovered

Problem = tuple[str, str]
Folded = tuple[Node, Node]  # a scale and a zero applied to values


@dataclass(frozen=True, slots=True)
class _Block:
    """One block of keys: its link in the chain, the values, the type of the weights, and what was folded in after."""

    link: Node
    values: Node
    weights: str
    folded: tuple[Folded, ...]

    @property
    def scores(self) -> Node:
        return self.link.parts[0 if self.link.data[0] == "first" else 1]

    @property
    def added(self) -> tuple[Node, ...]:
        return self.link.parts[1 if self.link.data[0] == "first" else 2 :]

    @property
    def attributes(self) -> dict[str, float]:
        return dict(self.link.data[2:])  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class _Source:
    """Where keys come from: row `base + i` of `keys` is that of query row i; rows from `end` on do not count."""

    keys: str
    values: str
    base: int
    end: int
    codes: bool


def attention_problem(w: Wanted, node: Node) -> Problem | None:
    """What is wrong with the value of a box Y[h, g, m, d] of an attention; None when nothing is."""
    if node.kind == "round":
        node = node.parts[0]
    if node.kind != "attention":
        return "meaning", f"{str(node)[:80]} is not a softmax over blocks of keys"
    blocks = list(_blocks(node.parts[0]))
    (head, after), rows = w.box[0], w.box[2]
    if after != head + 1:
        return "coverage", f"heads {head}:{after} are stored as one"
    seen: dict[str, list[tuple[int, int]]] = {}
    for block in blocks:
        problem = _block_problem(w, block, head, seen) or _agrees(block, blocks[0])
        if problem:
            return problem
    for source in _sources(w):
        problem = _keys_problem(source, blocks[0], seen.get(source.keys, []), rows, w.kernel.param[w.name].shape[2])
        if problem:
            return problem
    return None


def _sources(w: Wanted) -> list[_Source]:
    param, pos = w.kernel.param, w.scalars["pos"]
    tokens = param["Q"].shape[2]
    codes = "KS" in param
    if "KN" in param:
        return [_Source("K", "V", pos, pos, codes), _Source("KN", "VN", 0, tokens, False)]
    return [_Source("K", "V", pos, pos + tokens, codes)]


def _blocks(node: Node) -> Iterator[_Block]:
    """The blocks of a sum, last first."""
    folded: tuple[Folded, ...] = ()
    current: Node | None = node
    while current is not None:
        if current.kind == "scaled":
            folded = (*folded, (current.parts[1], current.parts[2]))
            current = current.parts[0]
            continue
        yield _Block(current.parts[0], current.parts[1], str(current.data[0]), folded)
        current = current.parts[2] if len(current.parts) > 2 else None


def _agrees(block: _Block, other: _Block) -> Problem | None:
    if block.attributes != other.attributes:
        return "meaning", f"one block has the scores {block.attributes}, another {other.attributes}"
    return None


def _block_problem(w: Wanted, block: _Block, head: int, seen: dict[str, list[tuple[int, int]]]) -> Problem | None:
    """Whether a block multiplies the right queries, keys and values; notes its keys in `seen`."""
    scores, values = block.scores, block.values
    if scores.kind != "dot" or not scores.data[0] or scores.parts[1].kind != "in" or values.kind != "in":
        return "meaning", f"scores {str(scores)[:80]} are not products of queries and keys"
    keys = scores.parts[1]
    source = next((one for one in _sources(w) if one.keys == keys.data[0]), None)
    if source is None:
        return "coverage", f"{keys} are multiplied as keys"
    first, last = keys.start[1], keys.start[1] + keys.shape[1]
    due = w.of(source.keys, (head, head + 1), (first, last), None)
    if keys is not due:
        return "coverage", f"keys {keys} in place of {due}"
    due = w.of(source.values, (head, head + 1), (first, last), w.box[3])
    if values is not due:
        return "coverage", f"values {values} in place of {due}"
    query = _query(w, source)
    if scores.parts[0] is not query:
        return "coverage", f"queries {str(scores.parts[0])[:80]} in place of {str(query)[:80]}"
    added = _added(w, source, block)
    if block.added != added:
        found = ", ".join(map(str, block.added))
        return (
            "meaning",
            f"{found or 'nothing'} is added to the scores, due is {', '.join(map(str, added)) or 'nothing'}",
        )
    if block.weights != w.kernel.param["Q"].dtype:
        return "dtype", f"weights are rounded to {block.weights}"
    tables = [tuple(w.of(name, (head, head + 1), None, w.box[3]) for name in ("VS", "VZ"))] if source.codes else []
    if list(block.folded) != tables:
        found = "; ".join(f"{a}, {b}" for a, b in block.folded)
        return "meaning", f"values {values} are scaled by {found or 'nothing'}"
    place = int(str(block.link.data[1])) + first
    if place != source.base + w.box[2][0]:
        return (
            "coverage",
            f"row {w.box[2][0]} is put at key {place} of {source.keys}, it is {source.base + w.box[2][0]}",
        )
    seen.setdefault(source.keys, []).append((first, last))
    return None


def _query(w: Wanted, source: _Source) -> Node:
    heads, group, rows, _ = w.box
    query = w.of("Q", heads, group, rows, None)
    if not source.codes:
        return query
    scaled = w.make.apply("mul", (query, w.of("KS", heads, None, None)), (), query.shape)
    return w.stored(scaled, "Q")


def _added(w: Wanted, source: _Source, block: _Block) -> tuple[Node, ...]:
    heads, group, rows, _ = w.box
    added = []
    if source.codes and "KZ" in w.kernel.param:
        query = w.of("Q", heads, group, rows, None)
        parts = query, w.of("KZ", heads, None, None)
        added.append(w.make.apply("row_dot", parts, (), (*query.shape[:-1], 1)))
    if "SLOPES" in w.kernel.param and block.attributes.get("slopes"):
        added.append(w.of("SLOPES", heads, group, None, None))
    return tuple(added)


def _keys_problem(
    source: _Source, block: _Block, seen: Sequence[tuple[int, int]], rows: tuple[int, int], tokens: int
) -> Problem | None:
    """Every key that a row of the tile sees is in one block, and none that no row of the call may see."""
    window = int(block.attributes.get("window", 0))
    first = max(0, source.base + rows[0] - window + 1) if window else 0
    stop = min(source.base + rows[1], source.end)
    intervals = [((a,), (b,)) for a, b in seen]
    twice = first_overlap(intervals)
    if twice:
        return "coverage", f"keys {twice[0][0]}:{twice[1][0]} of {source.keys} are attended twice"
    inside = [(max(a, first) - first, min(b, stop) - first) for a, b in seen]
    cut = [((a,), (b,)) for a, b in inside if a < b]
    gap = first_uncovered([stop - first], cut) if stop > first else None
    if gap:
        lost = f"{gap[0][0] + first}:{gap[1][0] + first}"
        return "uncovered", f"keys {lost} of {source.keys}, which rows {rows[0]}:{rows[1]} see, are not attended"
    beyond = [b for _, b in seen if b > source.end]
    if beyond:
        return "RAW", f"keys up to {max(beyond)} of {source.keys} are attended, of which {source.end} are written"
    return None

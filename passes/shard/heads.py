"""Which rank computes which heads: any number of query heads, KV heads and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vacc_opt.ir.errors import UserError

PAD = -1


@dataclass(frozen=True)
class HeadPlan:
    """Heads of each rank; ``PAD`` is a head of zeros. Query head i of a rank uses its KV head ``i // group``."""

    query: tuple[tuple[int, ...], ...]
    kv: tuple[tuple[int, ...], ...]

    @property
    def query_per_rank(self) -> int:
        """Query heads a rank, padding included."""
        return len(self.query[0])

    @property
    def kv_per_rank(self) -> int:
        """KV heads a rank, replicas and padding included."""
        return len(self.kv[0])

    @property
    def even(self) -> bool:
        """Heads divide over the ranks as they are: nothing is padded or held twice."""
        query, kv = ([h for rank in part for h in rank] for part in (self.query, self.kv))
        return PAD not in (*query, *kv) and len(set(kv)) == len(kv)

    def cost(self) -> int:
        """Head-sized slices a rank holds: q and o for a query head, k and v and their cache for a KV head."""
        return 2 * self.query_per_rank + 4 * self.kv_per_rank

    def __str__(self) -> str:
        text = f"{self.query_per_rank} query + {self.kv_per_rank} KV heads a rank"
        padded = sum(h == PAD for rank in self.query for h in rank)
        real = [h for rank in self.kv for h in rank if h != PAD]
        notes = [f"{padded} query heads of padding"] if padded else []
        notes += [f"KV heads held {len(real)} times instead of {len(set(real))}"] if len(real) > len(set(real)) else []
        return f"{text} ({', '.join(notes)})" if notes else text


def plan_heads(query: int, kv: int, tp: int) -> HeadPlan:
    """The cheapest way to give ``query`` heads over ``kv`` KV heads to ``tp`` ranks.

    Candidates: each KV group over s ranks for every divisor s of tp (s = 1: whole groups), and, with at least as many
    ranks as KV heads, an uneven number of ranks a group. Query heads are padded inside their group, groups with zeros.

    Raises:
        UserError: more ranks than query heads.

    >>> plan_heads(9, 3, 3).query
    ((0, 1, 2), (3, 4, 5), (6, 7, 8))
    >>> str(plan_heads(28, 4, 8))
    '4 query + 1 KV heads a rank (4 query heads of padding, KV heads held 8 times instead of 4)'
    """
    if tp > query:
        raise UserError(f"tp = {tp}, but the model has {query} query heads", f"the largest tp is {query}")
    plans = [_even(query, kv, tp, s) for s in range(1, tp + 1) if tp % s == 0]
    if tp >= kv:
        plans.append(_uneven(query, kv, tp))
    return min(plans, key=HeadPlan.cost)


def _even(query: int, kv: int, tp: int, split: int) -> HeadPlan:
    """``split`` ranks share a KV group; the groups are dealt to ``tp / split`` teams in order."""
    size = query // kv
    group = -(-size // split)
    per_team = -(-kv // (tp // split))
    queries: list[tuple[int, ...]] = []
    kvs: list[tuple[int, ...]] = []
    for rank in range(tp):
        team, part = divmod(rank, split)
        groups = [g if g < kv else PAD for g in range(team * per_team, (team + 1) * per_team)]
        queries.append(tuple(h for g in groups for h in _members(g, size, part * group, group)))
        kvs.append(tuple(groups))
    return HeadPlan(tuple(queries), tuple(kvs))


def _uneven(query: int, kv: int, tp: int) -> HeadPlan:
    """One KV head a rank; group g gets ``tp // kv`` ranks or one more."""
    size = query // kv
    group = -(-size // (tp // kv))
    queries: list[tuple[int, ...]] = []
    kvs: list[tuple[int, ...]] = []
    for g in range(kv):
        ranks = tp // kv + (g < tp % kv)
        share = -(-size // ranks)
        for part in range(ranks):
            mine = _members(g, size, part * share, share)
            queries.append(mine + (PAD,) * (group - share))
            kvs.append((g,))
    return HeadPlan(tuple(queries), tuple(kvs))


def _members(group: int, size: int, first: int, count: int) -> tuple[int, ...]:
    inside = range(first, first + count)
    return tuple(group * size + i if group != PAD and i < size else PAD for i in inside)


def head_rows(heads: Sequence[int], width: int) -> tuple[int, ...]:
    """Rows of a weight that hold the heads, ``width`` rows each; a padded head is rows of ``PAD``."""
    return tuple(PAD if h == PAD else h * width + i for h in heads for i in range(width))

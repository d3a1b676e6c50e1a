"""One graph for one rank  ->  one SPMD graph for n ranks: weights PerRank, collectives where ranks must meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Graph, Node, TensorType
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.ir.infer import elements_of
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option, where
from vacc_opt.passes.infra.check.adapters import Adapter, Ranks, continued
from vacc_opt.passes.infra.model.attention import attentions
from vacc_opt.passes.infra.model.slices import even_shares
from vacc_opt.passes.infra.registry import register
from vacc_opt.passes.shard.block import Attention, attention_block, check_read_inside
from vacc_opt.passes.shard.constants import SplitConstants
from vacc_opt.passes.shard.feed_forward import FeedForward, feed_forward_blocks
from vacc_opt.passes.shard.heads import PAD, HeadPlan, head_rows, plan_heads
from vacc_opt.passes.shard.merge_reduces import merge_reduces
from vacc_opt.passes.shard.vocabulary import split_vocabulary


def _of_a_rank(rw: Rewriter, node: Node, axis: int, sizes: dict[int, int]) -> None:
    """Let the target of a Reshape name the heads of a rank: -1 where that is free, else their number."""
    target = node.inputs[1]
    entries = list(elements_of(target) or ()) if target is not None else []
    size = entries[axis] if len(entries) >= -axis else None
    if size in (0, -1):
        return
    numbers = [e for e in entries if isinstance(e, int)]
    if target is None or target.const is None or not isinstance(size, int) or size not in sizes:
        raise CheckError(f"{where(node)} does not say how many heads it makes", "run simplify before split-tp")
    numbers[axis] = sizes[size] if -1 in numbers else -1
    with rw.on_behalf_of(node):
        rw.set_input(node, 1, rw.ints(*numbers))


@register
@dataclass(frozen=True)
class SplitTp(Pass):
    """Split attention by heads, feed-forward by channels and the vocabulary by rows over ``tp`` ranks.

    Heads that do not divide are padded inside their KV group or by whole groups, KV heads replicated: the cheapest, and
    said. Two AllReduce a layer (one where attention and feed-forward are added side by side), one for the embedding,
    one AllGather for the logits. Nothing is read or copied. The ids of an embedding count from 0.
    Source: Shoeybi et al. 2019, "Megatron-LM", section 3.

    Before:
        g (float[B,S,4] x) => (float[B,S,4] y) <int64[4] heads = {0, 0, -1, 2}, int64[3] joined = {0, 0, -1}> {
            qkv = Transpose <perm = [1, 0]> (w)
            projected = MatMul (x, qkv)
            parted = Reshape (projected, heads)
            turned = Transpose <perm = [0, 2, 1, 3]> (parted)
            attended = Attention (turned, turned, turned)
            back = Transpose <perm = [0, 2, 1, 3]> (attended)
            hidden = Reshape (back, joined)
            out = Transpose <perm = [1, 0]> (o)
            y = MatMul (hidden, out)
        }
        # const "w" = Seeded('w', 'float', (4, 4))
        # const "o" = Seeded('o', 'float', (4, 4))
    After split-tp{tp=2}:
        g (float[B,S,4] x) => (float[B,S,4] y) <int64[4] heads = {0, 0, -1, 2}, int64[3] joined = {0, 0, -1}> {
            qkv = Transpose <perm = [1, 0]> (w)
            projected = MatMul (x, qkv)
            parted = Reshape (projected, heads)
            turned = Transpose <perm = [0, 2, 1, 3]> (parted)
            attended = Attention (turned, turned, turned)
            back = Transpose <perm = [0, 2, 1, 3]> (attended)
            hidden = Reshape (back, joined)
            out = Transpose <perm = [1, 0]> (o)
            part = MatMul (hidden, out)
            y = Vastai.AllReduce <ranks = 2> (part)
        }
        # meta ranks = 2
        # const "w" = PerRank((Sliced(Seeded('w', 'float', (4, 4)), (0, 0), (2, 4)), Sliced(Seeded('w', 'float', (4, 4)), (2, 0), (4, 4))))
        # const "o" = PerRank((Sliced(Seeded('o', 'float', (4, 4)), (0, 0), (4, 2)), Sliced(Seeded('o', 'float', (4, 4)), (0, 2), (4, 4))))
    """  # noqa: E501

    name: ClassVar[str] = "split-tp"
    kind: ClassVar[Kind] = Kind.INTERFACE
    runs_after: ClassVar[tuple[str, ...]] = ("fuse-gqa", "fuse-swiglu", "kv-cache")

    tp: int = option(1, "number of ranks, at most the number of query heads")
    logits: str = option("logits", "name of the output that lm_head makes")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Split, or leave the graph as it is for tp = 1.

        Raises:
            UserError: tp below 1 or above the number of query heads.
            CheckError: a layer whose structure is not recognized, named.
        """
        if self.tp < 1:
            raise UserError(f"tp = {self.tp}, at least 1 rank is needed")
        if graph.ranks > 1:
            raise CheckError(f"the graph is split over {graph.ranks} ranks already")
        found = attentions(graph)
        if not found:
            raise CheckError("the graph has no Attention node", "run fuse-gqa before split-tp")
        if self.tp == 1:
            return Outcome("tp 1: nothing to split")
        blocks = [attention_block(node) for node in found]
        plans = {b.heads: plan_heads(*b.heads, self.tp) for b in blocks}
        parts = [linear for b in blocks for linear in (b.query, b.key, b.value)]
        ends = [b.out for b in blocks]
        forward = list(feed_forward_blocks(graph, {linear.node for linear in (*parts, *ends)}))
        parts += [linear for block in forward for linear in block.inputs]
        ends += [block.down for block in forward]
        inside = {node for b in blocks for node in b.inside} | {node for block in forward for node in block.inside}
        check_read_inside(graph, parts, inside, {linear.node for linear in ends})
        before = len(graph.by_op("AllReduce", "Vastai"))
        remarks = [
            Remark("analysis", self.name, str(plan), f"{q} query, {kv} KV heads") for (q, kv), plan in plans.items()
        ]
        with rw.applying():
            rw.set_ranks(self.tp)
            split = SplitConstants(rw, self.tp)
            for attention in blocks:
                _split_attention(split, attention, plans[attention.heads])
            for channels in forward:
                _split_channels(split, channels)
            remarks += split_vocabulary(graph, split, self.logits, self.name)
            split.check_readers()
            merged = merge_reduces(graph, rw)
            rw.infer_again()
        reduces = len(graph.by_op("AllReduce", "Vastai")) - before
        plan = next(iter(plans.values()))
        remarks.append(Remark("analysis", self.name, f"{len(forward)} feed-forward blocks split by channels"))
        if merged:
            remarks.append(Remark("analysis", self.name, f"{merged} all-reduces saved: their parts are added first"))
        return Outcome(f"tp {self.tp}: {plan}, {reduces} all-reduces", remarks)

    def adapter(self, before: Graph) -> Adapter:
        """Every rank gets its heads of the KV buffers."""
        blocks = [attention_block(node) for node in attentions(before)] if self.tp > 1 else []
        heads = {cache.name: plan_heads(*block.heads, self.tp).kv for block in blocks for cache in block.caches}
        return Ranks(heads, continued(before), self.tp) if blocks else Adapter()


def head_plans(graph: Graph, tp: int) -> list[HeadPlan]:
    """How split-tp would give the heads of each kind of attention in ``graph`` to ``tp`` ranks.

    Raises:
        UserError: more ranks than query heads.
        CheckError: an attention whose block is not understood, named.
    """
    heads = dict.fromkeys(attention_block(node).heads for node in attentions(graph))
    return [plan_heads(query, kv, tp) for query, kv in heads]


def _split_attention(split: SplitConstants, block: Attention, plan: HeadPlan) -> None:
    for linear, heads, width, bias in (
        (block.query, plan.query, block.width, block.query_bias),
        (block.key, plan.kv, block.width, block.key_bias),
        (block.value, plan.kv, block.value_width, block.value_bias),
    ):
        split.outputs(linear, tuple(head_rows(of_rank, width) for of_rank in heads), bias)
    split.inputs(block.out, tuple(head_rows(of_rank, block.value_width) for of_rank in plan.query))
    split.readers.update((block.node, *block.inside))
    for which, heads in ((block.query_headwise, plan.query), (block.kv_headwise, plan.kv)):
        for one in which:
            split.along(one.value, one.axis, heads)
    sizes = {block.heads[1]: plan.kv_per_rank, block.heads[0]: plan.query_per_rank}
    joined = {h * block.value_width: n * block.value_width for h, n in sizes.items()}
    for node, axis in block.reshapes:
        _of_a_rank(split.rw, node, axis, sizes if axis == -2 else joined)
    # a padded KV head writes zeros; any finite scale will do, the first head's is one
    real = tuple(tuple(max(h, 0) for h in heads) for heads in plan.kv)
    for value in block.kv_constants:
        split.along(value, 0, real)
    if block.slopes is not None:
        split.along(block.slopes, 0, plan.query)
    for cache in block.caches:
        assert cache.shape is not None
        batch, _, *rest = cache.shape
        split.rw.set_type(cache, TensorType(cache.type.dtype, (batch, plan.kv_per_rank, *rest)))


def _split_channels(split: SplitConstants, block: FeedForward) -> None:
    shares = even_shares(block.channels, split.tp)
    for linear in block.inputs:
        split.outputs(linear, shares)
    for vector in block.vectors:
        split.along(vector, 0, shares)
    split.inputs(block.down, shares)
    split.readers.update(block.inside)


assert PAD < 0  # take_rows and take_columns read a negative row as zeros

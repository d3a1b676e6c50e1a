"""One graph for one rank  ->  one SPMD graph for n ranks: weights PerRank, collectives where ranks must meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from vacc_opt.ir import Graph, Literal, Node, PerRank, TensorType, Value
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.ir.infer import elements_of
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option, where
from vacc_opt.passes.infra.check.adapters import Adapter, Ranks, continued
from vacc_opt.passes.infra.model.attention import attentions
from vacc_opt.passes.infra.model.linear import Linear, as_linear, flipped
from vacc_opt.passes.infra.model.slices import Rows, columns_per_rank, even_shares, rows_per_rank
from vacc_opt.passes.infra.registry import register
from vacc_opt.passes.shard.block import (
    Attention,
    FeedForward,
    attention_block,
    check_read_inside,
    feed_forward_blocks,
)
from vacc_opt.passes.shard.heads import PAD, HeadPlan, head_rows, plan_heads
from vacc_opt.passes.shard.merge_reduces import merge_reduces

VOCABULARY_MULTIPLE = 16  # rows of the vocabulary a rank, as the accelerator's sequence lengths


_KV_OPS = ("Vastai::QuantizeKV", "Vastai::DequantizeKV")


@dataclass
class _Split:
    """The constants that were split so far, so that a shared one is split once and the same way."""

    rw: Rewriter
    tp: int
    done: dict[Value, object] = field(default_factory=dict)
    readers: set[Node] = field(default_factory=set)  # that know what to do with a part

    def set(self, value: Value, key: object, expr: PerRank) -> None:
        if self.done.setdefault(value, key) != key:
            raise CheckError(f"{value.name} is shared by layers that split it differently")
        self.rw.set_const(value, expr)

    def again(self, value: Value, key: object) -> None:
        """A constant that was split already must have been split the same way."""
        if self.done[value] != key:
            raise CheckError(f"{value.name} is shared by layers that split it differently")

    def check_readers(self) -> None:
        """Nothing else may read a constant of which every rank holds a part."""
        for value in self.done:
            if self.rw.graph.is_output(value):
                raise CheckError(f"{value.name!r} is an output, and every rank would hold a part of it")
            for user in value.users():
                turned = user.op == "Transpose" and self.readers.issuperset(user.output.users())
                if user not in self.readers and user.op not in _KV_OPS and not turned:
                    raise CheckError(f"{where(user)} reads {value.name!r} too, of which every rank would hold a part")

    def outputs(self, linear: Linear, rows: tuple[Rows, ...], biases: tuple[Value, ...] = ()) -> None:
        """Each rank computes ``rows`` of the outputs."""
        self.readers.add(linear.node)
        if linear.weight in self.done:
            self.again(linear.weight, ("rows", rows))
        else:
            split = rows_per_rank(linear.rows, rows)
            flip = linear.rows is not linear.weight.const
            self.set(linear.weight, ("rows", rows), _flip(split) if flip else split)
        for vector in (*((linear.scale,) if linear.scale is not None else ()), *biases):
            if vector.const is not None:
                done = vector.const if isinstance(vector.const, PerRank) else rows_per_rank(vector.const, rows)
                self.set(vector, ("rows", rows), done)

    def inputs(self, linear: Linear, columns: tuple[Rows, ...]) -> None:
        """Each rank sums over ``columns`` of the inputs; the sums meet in an AllReduce."""
        self.readers.add(linear.node)
        if linear.weight in self.done:
            self.again(linear.weight, ("columns", columns))
        else:
            split = columns_per_rank(linear.rows, columns)
            flip = linear.rows is not linear.weight.const
            self.set(linear.weight, ("columns", columns), _flip(split) if flip else split)
        with self.rw.on_behalf_of(linear.node):
            self.rw.insert_after(linear.node.output, lambda v: self.rw.vastai.AllReduce(v, ranks=self.tp))


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


def _flip(expr: PerRank) -> PerRank:
    turned = flipped(expr)
    assert isinstance(turned, PerRank)
    return turned


def head_plans(graph: Graph, tp: int) -> list[HeadPlan]:
    """How split-tp would give the heads of each kind of attention in ``graph`` to ``tp`` ranks.

    Raises:
        UserError: more ranks than query heads.
        CheckError: an attention whose block is not understood, named.
    """
    heads = dict.fromkeys(attention_block(node).heads for node in attentions(graph))
    return [plan_heads(query, kv, tp) for query, kv in heads]


@register
@dataclass(frozen=True)
class SplitTp(Pass):
    """Split attention by heads, feed-forward by channels and the vocabulary by rows over ``tp`` ranks.

    Heads that do not divide are padded inside their KV group or by whole groups, KV heads replicated: the cheapest, and
    said. Two AllReduce a layer (one where attention and feed-forward are added side by side), one for the embedding,
    one AllGather for the logits. Nothing is read or copied.
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
        forward = feed_forward_blocks(graph)
        parts = [linear for b in blocks for linear in (b.query, b.key, b.value)]
        parts += [linear for f in forward for linear, _ in f.ups]
        last = {*(b.out.node for b in blocks), *(f.down.node for f in forward)}
        check_read_inside(graph, parts, last, {node for b in blocks for node in b.adds})
        before = len(graph.by_op("AllReduce", "Vastai"))
        remarks = [
            Remark("analysis", self.name, str(plan), f"{q} query, {kv} KV heads") for (q, kv), plan in plans.items()
        ]
        with rw.applying():
            rw.set_ranks(self.tp)
            split = _Split(rw, self.tp)
            for block in blocks:
                self._attention(split, block, plans[block.heads])
            for mlp in forward:
                self._feed_forward(split, mlp)
            remarks += self._vocabulary(graph, split)
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

    def _attention(self, split: _Split, block: Attention, plan: HeadPlan) -> None:
        query = tuple(head_rows(heads, block.width) for heads in plan.query)
        kv = tuple(head_rows(heads, block.width) for heads in plan.kv)
        split.outputs(block.query, query, block.query_bias)
        for linear, bias in ((block.key, block.key_bias), (block.value, block.value_bias)):
            split.outputs(linear, kv, bias)
        split.inputs(block.out, query)
        split.readers.update(block.adds)
        heads = {block.heads[1]: plan.kv_per_rank, block.heads[0]: plan.query_per_rank}
        for node, axis in block.reshapes:
            sizes = heads if axis == -2 else {h * block.width: n * block.width for h, n in heads.items()}
            _of_a_rank(split.rw, node, axis, sizes)
        # a padded KV head writes zeros; any finite scale will do, the first head's is one
        real = tuple(tuple(max(h, 0) for h in heads) for heads in plan.kv)
        for value in block.kv_constants:
            if value.const is not None and value not in split.done:
                split.set(value, ("kv", real), rows_per_rank(value.const, real))
        split.readers.add(block.node)
        if block.slopes is not None and block.slopes.const is not None and block.slopes not in split.done:
            split.set(block.slopes, ("heads", plan.query), rows_per_rank(block.slopes.const, plan.query))
        weighted = ((block.query_weights, plan.query), (block.key_weights, plan.kv))
        for weight, heads_of in ((w, heads_of) for weights, heads_of in weighted for w in weights):
            if weight.const is not None and weight not in split.done:
                split.set(weight, ("heads", heads_of), rows_per_rank(weight.const, heads_of))
            else:
                split.again(weight, ("heads", heads_of))
        for cache in block.caches:
            assert cache.shape is not None
            batch, _, context, width = cache.shape
            split.rw.set_type(cache, TensorType(cache.type.dtype, (batch, plan.kv_per_rank, context, width)))

    def _feed_forward(self, split: _Split, block: FeedForward) -> None:
        shares = even_shares(block.down.in_features, self.tp)
        for linear, biases in block.ups:
            split.outputs(linear, shares, biases)
        split.readers.update(block.adds)
        split.inputs(block.down, shares)

    def _vocabulary(self, graph: Graph, split: _Split) -> list[Remark]:
        """Embedding and lm_head by rows of the vocabulary, tied or not."""
        rw, remarks = split.rw, []
        sizes: dict[Value, int] = {}
        head = self._lm_head(graph)
        if head is not None:
            size = sizes[head.weight] = head.out_features
            shares = even_shares(size, self.tp, VOCABULARY_MULTIPLE)
            split.outputs(head, shares)
            with rw.on_behalf_of(head.node):
                rw.insert_after(head.node.output, lambda v: self._gather_logits(rw, v, size, len(shares[0])))
            remarks.append(Remark("passed", self.name, f"{len(shares[0])} rows of logits a rank", where(head.node)))
        for node in graph.by_op("Gather"):
            table, ids = node.inputs[:2]
            if table is None or table.const is None or len(table.const.shape) != 2 or node.attributes.get("axis", 0):
                continue
            if table not in split.done and any(user.op != "Gather" for user in table.users()):
                continue  # no embedding, or one with other readers: every rank keeps all of it
            rows = sizes.setdefault(table, table.const.shape[0])
            shares = even_shares(rows, self.tp, VOCABULARY_MULTIPLE)
            if table in split.done:
                split.again(table, ("rows", shares))
            else:
                split.set(table, ("rows", shares), rows_per_rank(table.const, shares))
            width = len(shares[0])
            firsts = PerRank(tuple(Literal(np.array(r * width, np.int64)) for r in range(self.tp)))
            remarks.append(Remark("passed", self.name, f"{width} rows of the embedding a rank", where(node)))
            with rw.on_behalf_of(node):
                rank_first = rw.const(firsts, f"{table.name}.first")
                part = rw.vastai.EmbeddingShard(table, ids, rank_first)
                split.readers.update(rw.made[-1:])
                rw.replace(node.output, rw.vastai.AllReduce(part, ranks=self.tp))
        return remarks

    def _gather_logits(self, rw: Rewriter, part: Value, size: int, share: int) -> Value:
        joined = rw.vastai.AllGather(part, ranks=self.tp, axis=-1)
        if share * self.tp == size:
            return joined
        return rw.op.Slice(joined, rw.ints(0), rw.ints(size), rw.ints(-1))

    def _lm_head(self, graph: Graph) -> Linear | None:
        value = graph.outputs.get(self.logits)
        node: Node | None = value.producer if value is not None else None
        while node is not None and as_linear(node) is None:
            node = node.inputs[0].producer if node.inputs and node.inputs[0] is not None else None
        return as_linear(node) if node is not None else None


assert PAD < 0  # take_rows and take_columns read a negative row as zeros

"""lm_head(x)  ->  lm_head(x at the last valid token): the prefill computes one row of logits instead of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import DType, Graph, Node, TensorType, Value
from vacc_opt.ir.errors import CheckError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option, where
from vacc_opt.passes.infra.check.adapters import Adapter, LastToken
from vacc_opt.passes.infra.model.linear import as_linear
from vacc_opt.passes.infra.model.views import arranged
from vacc_opt.passes.infra.registry import register

VALID = "valid"
SWAPPED = (1, 0, 2)
AFTER_HEAD = ("Add", "Cast", "Mul", "Div", "Tanh")


@register
@dataclass(frozen=True)
class SliceLastToken(Pass):
    """Let lm_head see only the last valid token: logits become [batch, 1, vocab].

    Adds the input ``valid`` [batch] int64, the number of tokens of this call up to and including the last real one;
    row ``valid - 1`` is kept, so right padding is correct, and with left padding ``valid`` is the whole length. A model
    that works on [seq, batch, hidden] and turns its logits is turned before lm_head instead.

    Before:
        g (float[B,S,8] x) => (float[B,S,3] logits) {
            t = Transpose <perm = [1, 0]> (w)
            logits = MatMul (x, t)
        }
        # const "w" = Seeded('w', 'float', (3, 8))
    After:
        g (float[B,S,8] x, int64[B] valid) => (float[B,1,3] logits)
        <int64 one = {1}, int64[1] axis = {1}, int64[1] tokens = {1}> {
            index = Sub (valid, one)
            row = Unsqueeze (index, axis)
            token = GatherND <batch_dims = 1> (x, row)
            last = Unsqueeze (token, tokens)
            t = Transpose <perm = [1, 0]> (w)
            logits = MatMul (last, t)
        }
        # const "w" = Seeded('w', 'float', (3, 8))
    """

    name: ClassVar[str] = "slice-last-token"
    kind: ClassVar[Kind] = Kind.INTERFACE

    logits: str = option("logits", "name of the output to slice")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Insert the gather before the last linear; raises CheckError when the output does not come from one, or when
        something else reads it."""
        head, turns = self._head(graph)
        linear = as_linear(head)
        assert linear is not None
        x = linear.x
        if x.shape is None or len(x.shape) != 3:
            raise CheckError(f"the input of lm_head is {x.type}, [batch,seq,hidden] is expected")
        if x.shape[0 if turns else 1] == 1:
            return Outcome("lm_head reads one token already")
        with rw.applying([head]):
            for turn in turns:
                x = arranged(rw, x, SWAPPED)
                rw.set_attribute(turn, "perm", (0, 1, 2))
            assert x.shape is not None
            valid = graph.input_named(VALID) or rw.add_input(VALID, TensorType(DType.INT64, (x.shape[0],)))
            row = rw.op.Unsqueeze(rw.op.Sub(valid, rw.const(1, "one", "int64")), rw.ints(1))
            last = rw.op.Unsqueeze(rw.op.GatherND(x, row, batch_dims=1), rw.ints(1))
            rw.set_input(head, 0, last)
            rw.infer_again()
            found = graph.outputs[self.logits].type
            if found.shape is not None and found.shape[1] != 1:
                raise CheckError(f"{self.logits!r} is {found} after slicing: something adds all tokens back to it")
        remark = Remark("passed", self.name, f"{head.op} reads row valid - 1", where(head))
        return Outcome("lm_head reads the last valid token", [remark])

    def adapter(self, before: Graph) -> Adapter:
        """The kept row of the logits is what it was."""
        return LastToken(self.logits, VALID)

    def _head(self, graph: Graph) -> tuple[Node, list[Node]]:
        """The linear behind the logits, and the nodes after it that swap batch and sequence."""
        value: Value | None = graph.outputs.get(self.logits)
        if value is None:
            raise CheckError(f"the graph has no output {self.logits!r}", f"outputs: {', '.join(graph.outputs)}")
        node = value.producer
        turns: list[Node] = []
        reader: Node | None = None
        # a bias, a cast or a logit scale may follow the linear
        while node is not None and as_linear(node) is None and (node.op in AFTER_HEAD or _swaps(node)):
            self._check_one_reader(graph, node, reader)
            turns, reader = turns + ([node] if _swaps(node) else []), node
            node = next((v.producer for v in node.inputs if v is not None and v.producer is not None), None)
        if node is None or as_linear(node) is None:
            raise CheckError(f"{self.logits!r} does not come from a linear layer")
        self._check_one_reader(graph, node, reader)
        return node, turns

    def _check_one_reader(self, graph: Graph, node: Node, reader: Node | None) -> None:
        """Nothing but the way to the logits may read what is to be of one token."""
        others = [f"{where(user)} reads" for user in node.output.users() if user is not reader]
        others += [f"the output {name!r} is" for name in graph.output_names(node.output) if name != self.logits]
        if others:
            raise CheckError(f"lm_head cannot be cut: {others[0]} all tokens of {node.output.name!r}")


def _swaps(node: Node) -> bool:
    return node.op == "Transpose" and node.attributes.get("perm") == SWAPPED

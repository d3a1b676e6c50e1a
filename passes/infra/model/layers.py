"""Where the layers of a decoder begin and end: the residual stream between them."""

from __future__ import annotations

from collections import deque

from vacc_opt.ir import Graph, Value
from vacc_opt.passes.infra.model.attention import attentions
from vacc_opt.passes.infra.model.linear import as_linear


def layer_ends(graph: Graph, logits: str = "logits") -> list[Value | None]:
    """The residual stream behind each layer, one value an attention; None where it is not found.

    It is the nearest sum of two computed tensors of rank 3 above the queries of the next attention, alone or in one
    operator with the norm behind it; behind the last layer the nearest one above the logits.
    """
    nodes = attentions(graph)
    nexts = [node.inputs[0] for node in nodes[1:]] + [graph.outputs.get(logits)] if nodes else []
    return [_residual(value) for value in nexts]


def _residual(value: Value | None) -> Value | None:
    seen: set[Value] = set()
    pending = deque([value])
    while pending:
        one = pending.popleft()
        if one is None or one in seen or one.producer is None:
            continue
        seen.add(one)
        node = one.producer
        if node.op == "Vastai::AddRMSNormalization":
            return node.outputs[1]
        if node.op == "Add" and one.rank == 3 and all(v is not None and not v.is_const for v in node.inputs):
            return one
        linear = as_linear(node)
        pending += [linear.x] if linear is not None else [v for v in node.inputs if v is not None and not v.is_const]
    return None

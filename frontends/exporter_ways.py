"""Shorter ways through the ONNX exporter to the same graph: what its runs of a program find is known already.

It runs a program once before it decomposes it, to learn what it mutates: ours mutate nothing that they are given, and
one that does is left to torch. And it runs it once more to promote types, of which every value holds its own.

This rests on functions that torch does not promise to keep: torch is pinned, and a test compares with its own way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch._aot_autograd.functional_utils import from_fun, has_data_mutation, to_fun
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.export import _trace
from torch.fx.experimental.proxy_tensor import make_fx, maybe_enable_thunkify
from torch.onnx._internal.fx.passes import type_promotion
from torch.utils._pytree import tree_map

Decompositions = Mapping[Any, Callable[..., Any]]


class _Mutates(Exception):
    """A program writes to what it was given."""


@contextmanager
def shorter_export() -> Iterator[None]:
    """Within the block ``torch.onnx.export`` of a module takes the shorter ways."""
    with _decomposed_in_one_pass(), _replaced(type_promotion._TypePromotionInterpreter, "run_node", _known_or_run):
        yield


@contextmanager
def _decomposed_in_one_pass() -> Iterator[None]:
    of_torch = _trace._export_to_aten_ir

    def export_to_aten_ir(*given: Any, decomp_table: Decompositions, **settings: Any) -> Any:
        try:
            with _replaced(_trace, "make_fx", functools.partial(_functional_make_fx, decomp_table)):
                return _trace._export_to_aten_ir_make_fx(*given)
        except _Mutates:
            return of_torch(*given, decomp_table=decomp_table, **settings)

    with _replaced(_trace, "_export_to_aten_ir", export_to_aten_ir):
        yield


def _functional_make_fx(decompositions: Decompositions, run: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    """In place of ``make_fx``: the graph has no operation in place, and is that of the operators' decompositions."""

    def trace(*given: Any) -> torch.fx.GraphModule:
        with torch.no_grad(), FunctionalTensorMode(pre_dispatch=False, export=True, _allow_token_discovery=True):
            graph = make_fx(_functional(run), decomposition_table=decompositions, record_module_stack=True)(*given)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph

    return trace


def _functional(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def functional(*given: Any) -> Any:
        above = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize))
        with maybe_enable_thunkify(), above:
            wrapped = tree_map(to_fun, given)
            result = run(*wrapped)
        if any(has_data_mutation(one) for one in wrapped if isinstance(one, torch.Tensor)):
            raise _Mutates
        return tree_map(from_fun, result)

    return functional


def _known_or_run(self: Any, node: torch.fx.Node) -> Any:
    """In place of ``run_node``: the value of a node is computed only behind the first one whose types were promoted."""
    nodes, known = self.module.graph.nodes, (node.target, node.args, node.kwargs, len(self.module.graph.nodes))
    with self._set_current_node(node):
        if rule := type_promotion.get_type_promotion_rule(node, self.type_promotion_table):
            self._maybe_promote_node(node, rule)
    promoted = known != (node.target, node.args, node.kwargs, len(nodes))
    self.promoted = promoted or getattr(self, "promoted", False)
    if node.op == "call_function" and "val" in node.meta and not self.promoted:
        return node.meta["val"]
    return torch.fx.Interpreter.run_node(self, node)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)

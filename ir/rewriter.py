"""The only way to change a graph: every step is checked, recorded as provenance, and can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import vacc_opt.ir.infer_rules  # noqa: F401 - registers the type rules
from vacc_opt.ir import ops
from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.infer import RULES_OPSET, Elements, InferenceError, Result, infer
from vacc_opt.ir.journal import Application, ApplicationLimit, Journal
from vacc_opt.ir.provenance import Provenance, merge
from vacc_opt.ir.schema import RewriteError, check_schema
from vacc_opt.ir.tensor import Literal, TensorExpr
from vacc_opt.ir.types import Shape, TensorType, is_opaque

__all__ = ["Application", "ApplicationLimit", "OpBuilder", "RewriteError", "Rewriter"]


class OpBuilder:
    """``rw.op.MatMul(a, b)`` adds a node and gives its first output; keyword arguments are attributes."""

    def __init__(self, rewriter: Rewriter, domain: str = "") -> None:
        self._rewriter = rewriter
        self._domain = domain

    def __getattr__(self, op_type: str) -> Callable[..., Value]:
        def build(*inputs: Value | None, **attributes: Any) -> Value:
            return self._rewriter.add(op_type, inputs, attributes, domain=self._domain).output

        return build


class Rewriter(Journal):
    """Checked mutation of one graph on behalf of one pass.

    Args:
        graph: the graph to change.
        by: the pass, for provenance and messages.
        limit: the largest number of applications; the next one raises ApplicationLimit.

    ``modified`` counts the changes; ``made`` lists the nodes that the present application made, or the last one when
    there is none, and ``erased`` counts the nodes removed so far; :meth:`take_changed` gives what a worklist driver
    visits next.
    """

    def __init__(self, graph: Graph, by: str = "", *, limit: int | None = None) -> None:
        super().__init__(graph, by, limit=limit)
        self.timed = False  # asks passes to measure each of their rules
        self.op: OpBuilder = OpBuilder(self)
        self.vastai: OpBuilder = OpBuilder(self, ops.DOMAIN)

    # building

    def add(
        self,
        op_type: str,
        inputs: Sequence[Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
        name: str = "",
        declared: Sequence[TensorType] | None = None,
    ) -> Node:
        """Add a node whose operator, arity, attributes and operand types are checked.

        ``declared`` are the types of the outputs of an operator that has no type rule.

        Raises:
            RewriteError: unknown operator or attribute, wrong arity, an operand that is not in the graph.
            InferenceError: operand types that do not fit.
        """
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        kept = {k: _plain(v) for k, v in (attributes or {}).items() if v is not None}
        node = Node(op_type, given, kept, domain=domain)
        for value in given:
            if value is not None:
                self._check_own(value, node.op)
        check_schema(node, outputs, self.graph.opset, self.by)
        stem = name or self._stem(node)
        label = self.graph.fresh_name(stem)
        try:
            results = infer(node.op, given, kept, outputs, opset=self.graph.opset, label=label)
        except InferenceError:
            if declared is None or domain in ("", ops.DOMAIN):
                raise
            results = [Result(type) for type in declared]
        values = [self._value(label if i == 0 else f"{label}_{i}", r) for i, r in enumerate(results)]
        node.name = label
        node.provenance = self._heritage()
        self.graph._add_node(node, values, gap=1)
        self._changed[node] = True
        self.made.append(node)
        self._log(Graph._remove_node, node)
        return node

    def _check_own(self, value: Value, user: str) -> None:
        if self.graph.values.get(value.name) is not value:
            raise RewriteError(f"{self.by}: {user} uses {value.name!r}, which is not in the graph")

    def _stem(self, node: Node) -> str:
        if not self._sources:
            return node.op_type
        # a node that stands for a made one is called after what that one stood for: names do not grow from step to step
        root = self._sources[0]
        stem = self._stems[node] = self._stems.get(root, root.output.name)
        return f"{stem}_{node.op_type}"

    def _value(self, name: str, result: Result) -> Value:
        value = Value(self.graph.fresh_name(name), result.type)
        value.elements = result.elements
        return value

    def const(
        self,
        data: npt.ArrayLike | TensorExpr,
        name: str = "const",
        dtype: npt.DTypeLike | None = None,
        *,
        of: Provenance | None = None,
    ) -> Value:
        """Add a constant: an array becomes a literal, an expression stays lazy.

        ``of`` is the provenance of what it is made of, by default that of the sources of the application.
        """
        expr = data if isinstance(data, TensorExpr) else Literal(np.array(data, dtype=dtype))
        value = Value(self.graph.fresh_name(name), expr.type, expr)
        value.provenance = self._heritage() if of is None else merge([of], self.by)
        self.graph._add_value(value)
        self._log(Graph._remove_value, value)
        return value

    def shared_const(self, data: npt.NDArray[Any], name: str) -> Value:
        """A literal under exactly this name, made once: a later call with the same array gives the same value."""
        literal = Literal(data)
        for attempt in range(len(self.graph.values) + 1):
            have = self.graph.values.get(name if attempt == 0 else f"{name}_{attempt}")
            if have is None:
                return self.const(literal, name if attempt == 0 else f"{name}_{attempt}")
            if have.const == literal:
                return have
        raise RewriteError(f"{self.by}: no name is left for the constant {name!r}")

    def ints(self, *numbers: int) -> Value:
        """An int64 vector constant."""
        return self.const(np.array(numbers, np.int64), "ints")

    # rewiring

    def replace(self, old: Value, new: Value) -> None:
        """Let every user of ``old``, graph outputs included, read ``new``; then drop what is dead behind ``old``.

        Raises:
            RewriteError: the types differ, or this application computed ``new`` from ``old``.
        """
        if old is new:
            return
        graph, producer = self.graph, new.producer
        if graph.values.get(new.name) is not new:
            self._check_own(new, "a replacement")
        if old.type is not new.type:
            self._check_types(old, new)
        if producer is not None:
            place = producer.place
            for user, _ in old.uses:
                if user.place <= place:
                    self._check_order(old.uses, new, old)
                    break
        if graph.is_output(old):
            for name in graph.output_names(old):
                self.set_output(name, new)
        if old.uses:
            moved = graph._move_uses(old, new)
            self._journal.append((Graph._restore_uses, old, moved))
            for user, _ in moved:
                self._changed[user] = True
        self._drop_unread(old)

    def _check_order(self, uses: Iterable[tuple[Node, int]], new: Value, old: Value | None) -> None:
        """Let ``new`` be computed before those that will use it instead of ``old``; refused when it is behind one."""
        producer = new.producer
        if producer is None:
            return
        users = [user for user, _ in uses if user.place <= producer.place]
        moved = self.graph._lift(users, producer) if users else []
        if moved is None:
            what = (
                f"{users[0].output.name!r} and cannot be its operand"
                if old is None
                else f"{old.name!r} and cannot replace it"
            )
            raise RewriteError(f"{self.by}: {new.name!r} is computed from {what}")
        if moved:
            self._log(Graph._restore_places, moved)

    def _check_types(self, old: Value, new: Value) -> None:
        if old.type == new.type:
            return
        if old.type.dtype is not new.type.dtype or not fits(old.type.shape, new.type.shape):
            raise RewriteError(f"{self.by}: {old.name} has type {old.type}, its replacement {new.name} has {new.type}")
        if _more_known(old.type.shape, new.type.shape):
            self.set_type(new, old.type)

    def set_type(self, value: Value, type: TensorType) -> None:
        """Refine the type of a value."""
        self._log(_restore_type, value, value.type, value.elements)
        value.type = type
        self._unchecked.update((node, None) for node, _ in value.uses)

    def set_input(self, node: Node, position: int, value: Value) -> None:
        """Let one operand of ``node`` be ``value``, and drop what is dead behind the one that it was.

        The pass is recorded as one that changed ``node``.

        Raises:
            RewriteError: ``value`` is not in the graph, or is computed from ``node``.
        """
        self._check_own(value, node.op)
        self._check_order([(node, position)], value, None)
        before = node.inputs[position]
        self._rewire(node, position, before, value)
        self.touch(node)
        if before is None or before.type != value.type:
            self._unchecked[node] = None
        if before is not None and before is not value:
            self._drop_unread(before)

    def _drop_unread(self, value: Value) -> None:
        producer = value.producer
        if producer is not None:
            if self.graph.is_read(producer):
                self._changed.setdefault(producer, False)
            elif producer in self.graph and (dead := self._erase(producer)):
                self.erase_dead(*dead)
        elif value.const is not None and not self.graph.use_count(value):
            self._erase_const(value)

    def _rewire(self, node: Node, position: int, before: Value | None, value: Value) -> None:
        stamp = self.graph._set_input(node, position, value)
        self._changed[node] = True
        if before is not None and before.producer is not None:
            self._changed.setdefault(before.producer, False)
        self._journal.append((Graph._restore_use, node, position, before, stamp))

    def set_attribute(self, node: Node, name: str, value: Any) -> None:
        """Change one attribute of ``node``, whose types must still hold at the end of the application."""
        self._log(_restore_slot, node, "attributes", node.attributes)
        self.touch(node)
        node.attributes = {**node.attributes, name: _plain(value)}
        self._changed[node] = True
        self._unchecked[node] = None
        check_schema(node, len(node.outputs), self.graph.opset, self.by)

    def set_output(self, name: str, value: Value) -> None:
        """Let the interface output ``name`` be ``value``; a new name is appended."""
        self._check_own(value, f"the output {name!r}")
        before = self.graph.outputs.get(name)
        self.graph._set_output(name, value)
        self._log(Graph._set_output, name, before)

    def erase_dead(self, *nodes: Node) -> int:
        """Remove those nodes that nothing reads, and what only they kept alive; gives the number removed."""
        removed = 0
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node in self.graph and not self.graph.is_read(node):
                pending += self._erase(node)
                removed += 1
        return removed

    def _erase(self, node: Node) -> list[Node]:
        """Take out a node that nothing reads, and constants that only it read; gives what may be dead now."""
        graph, changed = self.graph, self._changed
        self._journal.append((Graph._restore_node, node, graph._remove_node(node)))
        changed.pop(node, None)
        self._gone.append(node)
        self.erased += 1
        dead: list[Node] = []
        for value in node.inputs:
            if value is None:
                continue
            producer = value.producer
            if producer is not None:
                changed.setdefault(producer, False)
                if not value.uses:
                    dead.append(producer)
            elif not value.uses and value.const is not None and value.name in graph.values:  # gone if read twice
                self._drop_unread(value)
        return dead

    def _erase_const(self, value: Value) -> None:
        self.graph._remove_value(value)
        self._log(Graph._restore_value, value)

    def erase_unused_constants(self) -> None:
        """Remove constants that nothing reads."""
        for value in self.graph.constants():
            if not self.graph.use_count(value):
                self._erase_const(value)

    def insert_after(self, value: Value, make: Callable[[Value], Value]) -> Value:
        """Let all present users of ``value`` read ``make(value)`` instead."""
        users, names = list(value.uses), self.graph.output_names(value)
        new = make(value)
        for name in names:
            self.set_output(name, new)
        self._check_order(users, new, None)
        for node, position in users:
            self._rewire(node, position, value, new)
            if new.type != value.type:
                self._unchecked[node] = None
        return new

    # interface: only passes of kind INTERFACE call these

    def add_input(self, name: str, type: TensorType) -> Value:
        """Append a graph input."""
        if name in self.graph.values:
            raise RewriteError(f"{self.by}: the name {name!r} of a new input is taken")
        value = Value(name, type)
        self.graph._add_input(value)
        self._log(Graph._remove_input, value)
        return value

    def drop_output(self, name: str) -> None:
        """Remove an output from the interface."""
        before, order = self.graph.outputs[name], list(self.graph.outputs)
        self.graph._set_output(name, None)
        self._log(Graph._restore_output, name, before, order)

    def remove_input(self, value: Value) -> None:
        """Remove an input that nothing reads any more."""
        if self.graph.use_count(value):
            readers = ", ".join(n.op for n in value.users()[:3])
            raise RewriteError(f"{self.by}: input {value.name!r} is still read by {readers or 'an output'}")
        position = self.graph._remove_input(value)
        self._log(Graph._restore_input, value, position)

    def infer_again(self) -> None:
        """Infer all types anew, after a change of an input's type or a weight; raises InferenceError on a misfit.

        The pass is recorded as one that changed the nodes whose types are new.
        """
        for node in self.graph.nodes():
            if node.domain not in ("", ops.DOMAIN):
                continue
            label = node.output.name
            found = infer(node.op, node.inputs, node.attributes, len(node.outputs), opset=self.graph.opset, label=label)
            for value, result in zip(node.outputs, found, strict=True):
                if value.type != result.type:
                    self.touch(node)
                if value.type != result.type or value.elements != result.elements:
                    self._log(_restore_type, value, value.type, value.elements)
                    value.type, value.elements = result.type, result.elements
        self._unchecked.clear()

    def set_const(self, value: Value, expr: TensorExpr) -> None:
        """Let a constant hold another expression, of another type too; :meth:`infer_again` follows.

        The pass is recorded as one that changed the constant and the nodes that read it.
        """
        self._log(_restore_type, value, value.type, value.elements)
        self._log(_restore_slot, value, "const", value.const)
        value.const, value.type, value.elements = expr, expr.type, None
        self.touch(value)
        for user in value.users():
            self.touch(user)
        self._unchecked.update((node, None) for node, _ in value.uses)

    def set_ranks(self, ranks: int) -> None:
        """Make the graph one for so many ranks."""
        self._log(setattr, "ranks", self.graph.ranks)
        self.graph.ranks = ranks

    def import_domain(self, domain: str, version: int) -> None:
        """Import the operators of a foreign domain, unless some version of it is imported."""
        if domain not in self.graph.domains:
            self._log(_restore_domains, dict(self.graph.domains))
            self.graph.domains[domain] = version

    def raise_opset(self, opset: int) -> None:
        """Import at least this version of the standard operators (23 to 24 only adds types and inputs).

        Raises:
            RewriteError: the graph was left below opset 18, where operators mean other things than they do later.
        """
        if self.graph.opset < min(RULES_OPSET, opset):
            message = f"{self.by}: the graph has opset {self.graph.opset}, which ONNX cannot raise to {opset}"
            raise RewriteError(message, f"export the model at opset {RULES_OPSET} or newer")
        if self.graph.opset < opset:
            self._log(setattr, "opset", self.graph.opset)
            self.graph.opset = opset

    def touch(self, one: Node | Value) -> None:
        """Record that this pass changed a node or constant in place."""
        found = merge([one.provenance], self.by)
        if found != one.provenance:
            self._log(_restore_slot, one, "provenance", one.provenance)
            one.provenance = found


def _restore_domains(graph: Graph, domains: dict[str, int]) -> None:
    graph.domains = domains


def _restore_type(graph: Graph, value: Value, type: TensorType, elements: Elements | None) -> None:
    value.type, value.elements = type, elements


def _restore_slot(graph: Graph, target: Node | Value, slot: str, before: object) -> None:
    setattr(target, slot, before)


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return tuple(value) if isinstance(value, list) else value


def fits(old: Shape | None, new: Shape | None) -> bool:
    """True when a value of shape ``new`` can stand for one of shape ``old``."""
    if old is None or new is None:
        return True
    if len(old) != len(new):
        return False
    return all(a == b or is_opaque(a) or is_opaque(b) for a, b in zip(old, new, strict=True))


def _more_known(old: Shape | None, new: Shape | None) -> bool:
    if new is None:
        return old is not None
    return old is not None and any("." in str(n) and "." not in str(o) for o, n in zip(old, new, strict=True))

"""The only way to change a graph: every step is checked, recorded as provenance, and undone if a rewrite raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

import vacc_opt.ir.infer_rules  # noqa: F401 - registers the type rules
from vacc_opt.ir import ops
from vacc_opt.ir.errors import CheckError, did_you_mean
from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.infer import Result, infer, shape_text
from vacc_opt.ir.provenance import Provenance, merge
from vacc_opt.ir.tensor import Literal, TensorExpr
from vacc_opt.ir.types import Dim, Shape, TensorType


class RewriteError(CheckError):
    """A rewrite asked for something that would make the graph invalid."""


class OpBuilder:
    """``rw.op.MatMul(a, b)`` adds a node and gives its first output; keyword arguments are attributes."""

    def __init__(self, rewriter: Rewriter, domain: str = "") -> None:
        self._rewriter = rewriter
        self._domain = domain

    def __getattr__(self, op_type: str) -> Callable[..., Value]:
        def build(*inputs: Value | None, **attributes: Any) -> Value:
            return self._rewriter.add(op_type, inputs, attributes, domain=self._domain).output

        return build


class Rewriter:
    """Checked mutation of one graph on behalf of one pass.

    ``modified`` counts the changes; ``changed`` holds the nodes made or rewired since the last :meth:`take_changed`,
    which is what a worklist driver visits next.
    """

    def __init__(self, graph: Graph, by: str = "") -> None:
        self.graph = graph
        self.by = by
        self.modified = 0
        self.op = OpBuilder(self)
        self.vastai = OpBuilder(self, ops.DOMAIN)
        self._journal: list[Callable[[], None]] | None = None
        self._sources: tuple[Node, ...] = ()
        self._changed: dict[Node, None] = {}
        self._made: dict[Node, None] = {}  # by the present application

    # transactions and provenance

    @contextmanager
    def applying(self, sources: Sequence[Node] = ()) -> Iterator[None]:
        """One application of a rule: new nodes inherit ``sources``' provenance, an exception undoes everything."""
        if self._journal is not None:
            raise RewriteError(f"{self.by}: a rewrite is already being applied")
        self._journal, self._sources, self._made = [], tuple(sources), {}
        before = self.modified
        try:
            yield
        except BaseException:
            for undo in reversed(self._journal):
                undo()
            self.modified = before
            self._changed.clear()
            raise
        finally:
            self._journal, self._sources = None, ()

    @contextmanager
    def on_behalf_of(self, *sources: Node) -> Iterator[None]:
        """Within an application, let new nodes inherit the provenance of these nodes only."""
        before, self._sources = self._sources, sources
        try:
            yield
        finally:
            self._sources = before

    def take_changed(self) -> list[Node]:
        """Nodes that were made or rewired since the last call and are still in the graph."""
        nodes = [n for n in self._changed if n in self.graph]
        self._changed = {}
        return nodes

    def _log(self, undo: Callable[[], None]) -> None:
        self.modified += 1
        if self._journal is not None:
            self._journal.append(undo)

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
    ) -> Node:
        """Add a node whose operator, arity, attributes and operand types are checked.

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
        _check_schema(node, outputs, self.graph.opset, self.by)
        stem = name or self._stem(node)
        label = self.graph.fresh_name(stem)
        results = infer(node.op, given, kept, outputs, opset=self.graph.opset, label=label)
        values = [self._value(label if i == 0 else f"{label}_{i}", r) for i, r in enumerate(results)]
        node.name = label
        node.provenance = merge((s.provenance for s in self._sources), self.by)
        self.graph._add_node(node, values)
        self._changed[node] = self._made[node] = None
        self._log(lambda: self.graph._remove_node(node))
        return node

    def _check_own(self, value: Value, user: str) -> None:
        if self.graph.values.get(value.name) is not value:
            raise RewriteError(f"{self.by}: {user} uses {value.name!r}, which is not in the graph")

    def _stem(self, node: Node) -> str:
        return f"{self._sources[0].output.name}_{node.op_type}" if self._sources else node.op_type

    def _value(self, name: str, result: Result) -> Value:
        value = Value(self.graph.fresh_name(name), result.type)
        value.elements = result.elements
        return value

    def const(self, data: npt.ArrayLike | TensorExpr, name: str = "const", dtype: npt.DTypeLike | None = None) -> Value:
        """Add a constant: an array becomes a literal, an expression stays lazy."""
        expr = data if isinstance(data, TensorExpr) else Literal(np.array(data, dtype=dtype))
        value = Value(self.graph.fresh_name(name), expr.type, expr)
        self.graph._add_value(value)
        self._log(lambda: self.graph._remove_value(value))
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
        self._check_own(new, "a replacement")
        self._check_types(old, new)
        self._check_order(old, new)
        for name in self.graph.output_names(old):
            self.set_output(name, new)
        for node, position in list(old.uses):
            self.set_input(node, position, new)
        if old.producer is not None:
            self.erase_dead(old.producer)
        elif old.const is not None and not self.graph.use_count(old):
            self._erase_const(old)

    def _check_order(self, old: Value, new: Value) -> None:
        # nodes older than the application are left to the verifier: a search through all of them costs the graph
        pending, seen = [new], {new}
        while pending:
            value = pending.pop()
            if value is old:
                raise RewriteError(f"{self.by}: {new.name!r} is computed from {old.name!r} and cannot replace it")
            if value.producer in self._made:
                fresh = [v for v in value.producer.inputs if v is not None and v not in seen]
                seen.update(fresh)
                pending += fresh

    def _check_types(self, old: Value, new: Value) -> None:
        if old.type.dtype is not new.type.dtype or not _fits(old.type.shape, new.type.shape):
            raise RewriteError(f"{self.by}: {old.name} has type {old.type}, its replacement {new.name} has {new.type}")
        if _more_known(old.type.shape, new.type.shape):
            self.set_type(new, old.type)

    def set_type(self, value: Value, type: TensorType) -> None:
        """Refine the type of a value."""
        before = value.type
        value.type = type
        self._log(lambda: setattr(value, "type", before))

    def set_input(self, node: Node, position: int, value: Value) -> None:
        """Let one operand of ``node`` be ``value``."""
        self._check_own(value, node.op)
        before = node.inputs[position]
        self.graph._set_input(node, position, value)
        self._changed[node] = None
        if before is not None and before.producer is not None:
            self._changed[before.producer] = None
        self._log(lambda: self.graph._set_input(node, position, before))

    def set_attribute(self, node: Node, name: str, value: Any) -> None:
        """Change one attribute of a node; the operator's rule sees it at the next inference."""
        before = node.attributes
        node.attributes = {**before, name: _plain(value)}
        self._log(lambda: setattr(node, "attributes", before))
        _check_schema(node, len(node.outputs), self.graph.opset, self.by)

    def set_output(self, name: str, value: Value) -> None:
        """Let the interface output ``name`` be ``value``; a new name is appended."""
        self._check_own(value, f"the output {name!r}")
        before = self.graph.outputs.get(name)
        self.graph._set_output(name, value)
        self._log(lambda: self.graph._set_output(name, before))

    def erase_dead(self, *nodes: Node) -> int:
        """Remove those nodes that nothing reads, and what only they kept alive; gives the number removed."""
        removed = 0
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node not in self.graph or any(self.graph.use_count(v) for v in node.outputs):
                continue
            self._erase(node)
            removed += 1
            for value in dict.fromkeys(v for v in node.inputs if v is not None):
                if value.producer is not None:
                    pending.append(value.producer)
                elif value.const is not None and not self.graph.use_count(value):
                    self._erase_const(value)
        return removed

    def _erase(self, node: Node) -> None:
        outputs = node.outputs
        self.graph._remove_node(node)
        self._changed.pop(node, None)
        self._log(lambda: self.graph._add_node(node, outputs))

    def _erase_const(self, value: Value) -> None:
        self.graph._remove_value(value)
        self._log(lambda: self.graph._add_value(value))

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
        for node, position in users:
            self.set_input(node, position, new)
        return new

    # interface: only passes of kind INTERFACE call these

    def add_input(self, name: str, type: TensorType) -> Value:
        """Append a graph input."""
        if name in self.graph.values:
            raise RewriteError(f"{self.by}: the name {name!r} of a new input is taken")
        value = Value(name, type)
        self.graph._add_input(value)
        self._log(lambda: self.graph._remove_input(value))
        return value

    def drop_output(self, name: str) -> None:
        """Remove an output from the interface."""
        before, order = self.graph.outputs[name], list(self.graph.outputs)
        self.graph._set_output(name, None)

        def undo() -> None:
            self.graph._set_output(name, before)
            self.graph.outputs = {n: self.graph.outputs[n] for n in order}

        self._log(undo)

    def remove_input(self, value: Value) -> None:
        """Remove an input that nothing reads any more."""
        if self.graph.use_count(value):
            readers = ", ".join(n.op for n in value.users()[:3])
            raise RewriteError(f"{self.by}: input {value.name!r} is still read by {readers or 'an output'}")
        position = self.graph.inputs.index(value)
        self.graph._remove_input(value)
        self._log(lambda: self.graph._add_input(value, position))

    def infer_again(self) -> None:
        """Infer all types anew, after a change of an input's type or a weight; raises InferenceError on a misfit."""
        for node in self.graph.nodes():
            if node.domain not in ("", ops.DOMAIN):
                continue
            label = node.output.name
            found = infer(node.op, node.inputs, node.attributes, len(node.outputs), opset=self.graph.opset, label=label)
            for value, result in zip(node.outputs, found, strict=True):
                if value.type != result.type or value.elements != result.elements:
                    self._retype(value, result)

    def _retype(self, value: Value, result: Result) -> None:
        before = Result(value.type, value.elements)
        value.type, value.elements = result.type, result.elements

        def undo() -> None:
            value.type, value.elements = before.type, before.elements

        self._log(undo)

    def set_const(self, value: Value, expr: TensorExpr) -> None:
        """Let a constant hold another expression, of another type too; :meth:`infer_again` follows."""
        before, type_before = value.const, value.type
        value.const, value.type, value.elements = expr, expr.type, None

        def undo() -> None:
            value.const, value.type = before, type_before

        self._log(undo)

    def set_ranks(self, ranks: int) -> None:
        """Make the graph one for so many ranks."""
        before = self.graph.ranks
        self.graph.ranks = ranks
        self._log(lambda: setattr(self.graph, "ranks", before))

    def raise_opset(self, opset: int) -> None:
        """Import at least this version of the standard operators (23 to 24 only adds types and inputs)."""
        before = self.graph.opset
        if before < opset:
            self.graph.opset = opset
            self._log(lambda: setattr(self.graph, "opset", before))

    def touch(self, node: Node, provenance: Provenance | None = None) -> None:
        """Record that this pass changed ``node`` in place."""
        before = node.provenance
        node.provenance = provenance or merge([before], self.by)
        self._log(lambda: setattr(node, "provenance", before))


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return tuple(value) if isinstance(value, list) else value


def _fits(old: Shape | None, new: Shape | None) -> bool:
    if old is None or new is None:
        return True
    if len(old) != len(new):
        return False
    return all(a == b or _opaque(a) or _opaque(b) for a, b in zip(old, new, strict=True))


def _opaque(dim: Dim) -> bool:
    """A dimension that inference could only name after the value that has it."""
    return not isinstance(dim, int) and "." in str(dim)


def _more_known(old: Shape | None, new: Shape | None) -> bool:
    if new is None:
        return old is not None
    return old is not None and any("." in str(n) and "." not in str(o) for o, n in zip(old, new, strict=True))


@cache
def _standard_schema(op_type: str, opset: int) -> onnx.defs.OpSchema:
    try:
        return onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        names = {s.name for s in onnx.defs.get_all_schemas()}
        if op_type in names:
            newest = onnx.defs.get_schema(op_type).since_version
            raise RewriteError(
                f"{op_type} is an operator of opset {newest}, the graph imports {opset}",
                f"call rw.raise_opset({newest}) first",
            ) from None
        raise RewriteError(f"ONNX has no operator {op_type!r} at opset {opset}", did_you_mean(op_type, names)) from None


def _check_schema(node: Node, outputs: int, opset: int, by: str) -> None:
    """Arity and attribute names against the declaration of the operator."""
    count = len(node.inputs)
    if node.domain == ops.DOMAIN:
        op = ops.get(node.op_type)
        if op is None:
            raise RewriteError(f"{by}: no operator Vastai::{node.op_type}", did_you_mean(node.op_type, ops.OPS))
        low = high = len(op.inputs)
        allowed, most = {a for a, _ in op.attributes}, len(op.outputs)
    else:
        schema = _standard_schema(node.op_type, opset)
        _check_attributes(node, schema, by)
        low, high, most = schema.min_input, schema.max_input, schema.max_output
        allowed = set(schema.attributes)
    if not low <= count <= high:
        wanted = str(low) if low == high else f"{low} to {high}"
        raise RewriteError(f"{by}: {node.op} takes {wanted} inputs, got {count}")
    if outputs > most:
        raise RewriteError(f"{by}: {node.op} has at most {most} outputs, {outputs} were asked for")
    for name in node.attributes:
        if name not in allowed:
            raise RewriteError(f"{by}: {node.op} has no attribute {name!r}", did_you_mean(name, allowed or {"(none)"}))


_KINDS: dict[str, tuple[type, ...]] = {
    "INT": (int,),
    "FLOAT": (float,),
    "STRING": (str, bytes),
    "TENSOR": (np.ndarray,),
    "INTS": (int,),
    "FLOATS": (float,),
    "STRINGS": (str, bytes),
}


def _check_attributes(node: Node, schema: onnx.defs.OpSchema, by: str) -> None:
    """Required attributes are there, and each has the declared type."""
    for name, declared in schema.attributes.items():
        if name not in node.attributes:
            if declared.required:
                raise RewriteError(f"{by}: {node.op} needs the attribute {name!r}")
            continue
        kind, value = declared.type.name, node.attributes[name]
        items = value if kind.endswith("S") and isinstance(value, tuple) else (value,)
        listed = kind.endswith("S") == isinstance(value, tuple)
        if kind in _KINDS and not (listed and all(isinstance(i, _KINDS[kind]) for i in items)):
            raise RewriteError(f"{by}: attribute {name!r} of {node.op} is {value!r}, {kind.lower()} is expected")


def describe(value: Value) -> str:
    """``name float[batch,4]`` for messages."""
    return f"{value.name} {value.type.dtype.value}{shape_text(value.shape)}"

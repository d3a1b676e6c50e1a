"""What the lowering rules share: graph values as strided tensors, calls of kernels, checks of index operands."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import prod

import numpy as np

from vacc_opt.backends.vacc.assemble import Assembler, Operand
from vacc_opt.backends.vacc.fusion import EVERY, Fusion, Normed, Sums, store, waits
from vacc_opt.backends.vacc.index_values import is_affine
from vacc_opt.backends.vacc.kernels.move import copy
from vacc_opt.backends.vacc.refs import Ref
from vacc_opt.backends.vacc.schedule import Kernel
from vacc_opt.backends.vacc.target import Target
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.graph import Graph, Node, Value
from vacc_opt.ir.onnx_proto import export_names
from vacc_opt.ir.types import DType

_DTYPES = {DType.FLOAT: "f32", DType.FLOAT16: "f16", DType.INT8: "i8", DType.INT32: "i32", DType.INT64: "i64"}
_CACHE = re.compile(r"past_key_values\.\d+\.(key|value)")


@dataclass(frozen=True, slots=True)
class Quantized:
    """`values` seen through a scale and zero [H, D] each: codes to be written, or codes to be read as floats."""

    values: Ref
    scale: Ref
    zero: Ref


@dataclass(frozen=True, slots=True)
class Joined:
    """An int8 cache whose rows from `pos` on are replaced by the float `new` [B, H, S, D] of this call."""

    cache: Quantized
    new: Ref


Known = Ref | Quantized | Joined | Sums | Normed


def is_cache(name: str) -> bool:
    """Whether a graph input is a KV buffer."""
    return _CACHE.fullmatch(name) is not None


class Lowering:
    """The state of one lowering: `known` says where each value lies, `out` collects the calls.

    `fusions` are the operators that may be fused into the linear before them.
    """

    def __init__(self, graph: Graph, target: Target, fusions: Collection[Fusion] = EVERY) -> None:
        self.graph = graph
        self.target = target
        self.fusions = fusions
        self.out: Assembler = Assembler(target)
        self.known: dict[Value, Known] = {}
        self.pays: dict[str, bool] = {}  # fusions that were tried, by what they do to which types
        self._names = export_names(graph)
        self._waiting: dict[Value, tuple[str, ...]] = {}  # nodes behind a value that no call implements yet
        self._node: Node | None = None  # the node that is lowered at present
        self._nodes: tuple[str, ...] = ()  # what its calls implement
        self._called = False
        for value in graph.inputs:
            role = "cache" if is_cache(value.name) else "input"
            self.known[value] = self.out.tensor(value.name, *self.type(value), role)

    def begin(self, node: Node) -> None:
        """Calls from now on implement `node`, and the nodes before it that are strides or wait for it."""
        self._node, self._nodes, self._called = node, self._behind(node), False

    def _behind(self, node: Node) -> tuple[str, ...]:
        """A node and those that wait for it."""
        waiting = (name for value in node.inputs if value is not None for name in self._waiting.get(value, ()))
        return tuple(dict.fromkeys((self._names[node.output], *waiting)))

    def taken(self) -> None:
        """What waited for the node that is lowered is called: calls from now on implement that node alone."""
        for value in self._node.inputs if self._node else ():
            if value is not None:
                self._waiting.pop(value, None)
        self._nodes = self._behind(self._node) if self._node else ()

    def end(self, node: Node, found: tuple[Known, ...]) -> None:
        """The outputs of `node` lie in `found`; without a call of its own it waits for whoever reads them."""
        self.known.update(zip(node.outputs, found, strict=False))
        if not self._called:
            self._waiting.update(dict.fromkeys(node.outputs, self._nodes))

    def type(self, value: Value) -> tuple[str, tuple[int, ...]]:
        """Tile dtype and static shape; UserError for a type that the machine has not, or a symbolic shape."""
        shape, dtype = value.type.static_shape, _DTYPES.get(value.type.dtype)
        if shape is None or dtype is None:
            raise UserError(f"`{value.name}` has type {value.type}", "bind all sizes; types are float, float16, int8")
        return dtype, shape

    def dtype(self, node: Node) -> str:
        """Tile dtype of what a node gives; what it reads may lie in memory in another one."""
        return self.type(node.outputs[0])[0]

    def ref(self, value: Value | None) -> Ref:
        """The stored tensor of a value."""
        if value is None:
            raise UserError("an operand that is needed is absent", "is the graph legalized?")
        if value.const is not None and value not in self.known:
            self.known[value] = self.out.tensor(value.name, *self.type(value), "weight")
        found = self.known[value]
        if isinstance(found, Sums):
            found = self.known[value] = self._stored(value, found)
        if not isinstance(found, Ref):
            raise UserError(f"`{value.name}`: (de)quantized KV is read outside of attention and cache writes")
        return found

    def _stored(self, value: Value, sums: Sums) -> Ref:
        """Sums whose reader does not take them: the call is for the nodes before it."""
        called, self._nodes = self._called, self._waiting.pop(value, ())
        found = store(self, sums)
        self._called, self._nodes = called, self._behind(self._node) if self._node else ()
        return found

    def waiting(self, value: Value, sums: Sums) -> Known:
        """Sums as they are where the reader of `value` may take them, else stored."""
        return sums if waits(self, value) else store(self, sums)

    def view(self, ref: Ref, shape: tuple[int, ...]) -> Ref:
        """`ref` with another shape: by strides, else through a copy."""
        found = ref.reshaped(shape)
        if found is not None:
            return found
        source = ref.reshaped((-1, *ref.shape[2:])) or ref if len(ref.shape) > 2 else ref
        whole = self.out.temp(ref.dtype, source.shape)
        operands = [Operand("X", "in", source), Operand("Y", "out", whole)]
        self.emit("copy", lambda x, y: copy(x, y, self.target), operands)
        found = whole.reshaped(shape)
        assert found is not None
        return found

    def rows(self, ref: Ref) -> Ref:
        """`ref` as a matrix of its last axis."""
        return self.view(ref, (prod(ref.shape[:-1]), ref.shape[-1]))

    def by_layout(self, ref: Ref) -> tuple[int, ...]:
        """The order of axes, the last one last, in which `ref` lies in memory: rows in that order need no copy."""
        last = len(ref.shape) - 1
        return (*sorted(range(last), key=lambda axis: -ref.strides[axis]), last)

    def emit(
        self,
        key: object,
        build: Callable[..., Kernel],
        operands: list[Operand],
        first: Node | None = None,
        **scalars: tuple[str, int],
    ) -> None:
        """Call the kernel that `build` makes of the operands' parameters; `first` is the node that it computes."""
        params = [one.param for one in operands]
        named = (self._names[first.output],) if first else ()
        nodes = tuple(dict.fromkeys((*named, *self._nodes)))
        self.out.call(repr(key), lambda: build(*params), operands, scalars, nodes)
        self._called = True

    def expect(self, node: Node, value: Value | None, name: str, offset: object, what: str) -> None:
        """Raise UserError unless `value` is runtime input `name` plus `offset`."""
        if value is None or not is_affine(self.graph, value, name, np.asarray(offset)):
            raise UserError(f"`{node.name}` ({node.op}): {what} is not {name} + {np.asarray(offset).tolist()}"[:300])

    def heads(self, dtype: str, shape: tuple[int, ...]) -> Ref:
        """A new tensor [B, H, S, D] that lies as [B, S, H, D], so that heads merge without a copy."""
        batch, heads, length, width = shape
        return self.out.temp(dtype, (batch, length, heads, width)).transposed((0, 2, 1, 3))

    def table(self, ref: Ref) -> Ref:
        """Scale or zero [H, D] as [H, 1, D]."""
        found = ref.reshaped((ref.shape[0], 1, ref.shape[1]))
        assert found is not None
        return found

    def integers(self, node: Node, index: int) -> tuple[int, ...] | None:
        """A constant operand as integers, None when absent."""
        value = node.input(index)
        if value is None:
            return None
        if value.const is None:
            raise UserError(f"operand {index} of `{node.name}` ({node.op}) is not constant")
        return tuple(int(one) for one in value.const.read().reshape(-1))

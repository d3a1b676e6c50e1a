"""The call of the C library for each primitive of :mod:`vacc_opt.backends.vacc.ops`, and the memory it works in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from vacc_opt.backends.vacc.schedule import Kernel, Op, View
from vacc_opt.backends.vacc.tiling import round_up

AXES = 4


@dataclass(frozen=True, slots=True)
class Operand:
    """A tile in C: its type, the address of its first element, and sizes and strides (elements) of its axes."""

    dtype: str
    at: str
    sizes: tuple[str, ...]
    strides: tuple[int, ...]

    def __str__(self) -> str:
        missing = AXES - len(self.sizes)
        sizes = ("1",) * missing + self.sizes
        strides = (0,) * missing + self.strides
        return f"box({self.dtype.upper()}, {self.at}, {', '.join(sizes)}, {', '.join(map(str, strides))})"

    def first(self, index: str) -> Operand:
        """Element `index` of the first axis."""
        size = {"f32": 4, "f16": 2, "i8": 1, "i32": 4, "i64": 8}[self.dtype]
        return Operand(self.dtype, f"{self.at} + {size * self.strides[0]} * {index}", self.sizes[1:], self.strides[1:])


Operands = Sequence[Operand]
Attributes = Mapping[str, str]
Writer = Callable[[Operands, Operands, Attributes], list[str]]  # lines; the last one is the call, 1 when it went well


def _need(condition: bool, what: str) -> None:
    """ValueError for what numpy could do and this library cannot: no kernel of this backend asks for it."""
    if not condition:
        raise ValueError(f"the native engine expects {what}")


def _list(operands: Operands) -> str:
    return f"(tile[]){{{', '.join(map(str, operands))}}}" if operands else "0"


def _move(outs: Operands, ins: Operands, _: Attributes) -> list[str]:
    _need("i64" not in (outs[0].dtype, ins[0].dtype) or outs[0].dtype == ins[0].dtype, "integers to stay integers")
    return [f"copy({outs[0]}, {ins[0]})"]


def _gather(outs: Operands, ins: Operands, _: Attributes) -> list[str]:
    axes = tuple(len(one.sizes) for one in (outs[0], *ins))
    _need(axes[:3] == (2, 2, 1) and axes[3:] in ((), (0,)), "a table of two axes and a list of rows")
    _need(ins[1].dtype == "i64" and all(one.dtype == "i64" for one in ins[2:]), "rows in i64")
    first = _list(ins[2:]) if len(ins) > 2 else "0"
    return [f"gather({outs[0]}, {ins[0]}, {ins[1]}, {first})"]


def _product(name: str) -> Writer:
    def write(outs: Operands, ins: Operands, attributes: Attributes) -> list[str]:
        _need(outs[0].dtype == "f32", "sums of products in f32")
        _need(all(one.dtype in ("f32", "f16", "i8") for one in ins), "products of floats or int8")
        return [f"{name}({outs[0]}, {ins[0]}, {ins[1]}, {attributes['first']}, r->work)"]

    return write


def _constant(outs: Operands, _: Operands, attributes: Attributes) -> list[str]:
    return [f"constant({outs[0]}, {attributes['value']})"]


def _map(name: str, attribute: str = "") -> Writer:
    def write(outs: Operands, ins: Operands, attributes: Attributes) -> list[str]:
        value = attributes[attribute] if attribute else "0"
        return [f"map_{name}({outs[0]}, {_list(ins)}, {value})"]

    return write


def _reduce(kind: str) -> Writer:
    def write(outs: Operands, ins: Operands, attributes: Attributes) -> list[str]:
        other = _list(ins[1:]) if len(ins) > 1 else "0"
        return [f"reduce({outs[0]}, {ins[0]}, {other}, {kind}, {attributes.get('eps', '0')}, r->work)"]

    return write


def _rotary(outs: Operands, ins: Operands, attributes: Attributes) -> list[str]:
    x, cos, sin = ins
    return [f"rotary({outs[0]}, {x}, {cos}, {sin}, {attributes['interleaved']}, r->work)"]


def _softmax(outs: Operands, ins: Operands, attributes: Attributes) -> list[str]:
    given = {"scale": "1", "clamp": "0", "softcap": "0", "window": "0", "slopes": "0"} | dict(attributes)
    order = ("diagonal", "window", "scale", "clamp", "softcap", "slopes")
    return [
        f"scoring how = {{{', '.join(given[name] for name in order)}}};",
        f"softmax_step({_list(outs)}, {ins[0]}, {_list(ins[1:])}, {len(ins) - 1}, how, r->work)",
    ]


def _exchange(call: str) -> Writer:
    def write(outs: Operands, ins: Operands, _: Attributes) -> list[str]:
        return [
            "tile to[r->ranks], from[r->ranks];",
            "for (long d = 0; d < r->ranks; d++) {",
            f"    to[d] = {outs[0]};",
            f"    from[d] = {ins[0]};",
            "}",
            call,
        ]

    return write


def _reduce_scatter(outs: Operands, ins: Operands, _: Attributes) -> list[str]:
    """Part `p` of the sum goes to rank `p`."""
    return [
        "int fine = 1;",
        f"if ({ins[0].sizes[0]} != r->ranks) fine = 0;",
        "for (long p = 0; p < r->ranks && fine; p++) {",
        "    tile to[r->ranks], from[r->ranks];",
        "    for (long d = 0; d < r->ranks; d++) {",
        f"        to[d] = {outs[0]};",
        f"        from[d] = {ins[0].first('p')};",
        "    }",
        "    fine = sum_ranks(&to[p], 1, from, r->ranks);",
        "}",
        "fine",
    ]


def _all_gather(outs: Operands, ins: Operands, attributes: Attributes) -> list[str]:
    _need(len(outs[0].sizes) == 3 and len(ins[0].sizes) == 2, "rows of two axes")
    return _exchange("gather_ranks(to, from, r->ranks)")(outs, ins, attributes)


OPERATIONS: Mapping[str, Writer] = {
    "load": _move,
    "multicast": _move,
    "store": _move,
    "cast": _move,
    "gather": _gather,
    "mma": _product("mma"),
    "mma_nn": _product("mma_nn"),
    "constant": _constant,
    **{name: _map(name) for name in ("add", "sub", "mul", "div", "tanh", "mul_add", "silu_mul", "quantize")},
    "dequantize": _map("mul_add"),
    "add_share": _map("add_share", "parts"),
    "gelu": _map("gelu", "tanh"),
    "gelu_mul": _map("gelu_mul", "tanh"),
    "row_mean": _reduce("MEAN"),
    "inverse_rms": _reduce("INVERSE_RMS"),
    "row_dot": _reduce("DOT"),
    "rotary": _rotary,
    "softmax_step": _softmax,
    "all_reduce": _exchange("sum_ranks(to, r->ranks, from, r->ranks)"),
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
}


def work_floats(kernel: Kernel) -> int:
    """Floats that the largest operation of a kernel works in, by the shapes of its buffers and parameters.

    A product widens its left tile and its right one (eight rows of it, or all), a reduction two rows.
    """
    return max((_work(kernel, op) for _, op in kernel.operations()), default=0)


def _work(kernel: Kernel, op: Op) -> int:
    shapes = [_shape(kernel, view) for view in (*op.ins, *op.outs)]
    if op.kind in ("mma", "mma_nn"):
        (*rows, depth), (*_, deep, wide) = shapes[0], shapes[1]
        if op.kind == "mma":
            return (prod(rows) + 8) * round_up(max(depth, wide), 8)
        return prod(rows) * depth + deep * round_up(wide, 32)
    return 2 * max((shape[-1] for shape in shapes if shape), default=0)


def _shape(kernel: Kernel, view: View) -> tuple[int, ...]:
    where = kernel.param.get(view.ref) or kernel.buffer[view.ref]
    return where.shape

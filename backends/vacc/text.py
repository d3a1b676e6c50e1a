"""The text form of schedules: what the verifier and the simulators accept; printing and parsing are exact inverses.

Indentation, blank lines and `# comments` on lines of their own are free on input. A statement is one line; `{` opens a
block at the end of a line, `}` closes it on a line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from urllib.parse import quote, unquote

from vacc_opt.backends.vacc.schedule import (
    DTYPES,
    ENGINES,
    Affine,
    Argument,
    Buffer,
    Call,
    Kernel,
    Loop,
    Op,
    Output,
    Param,
    Program,
    Scope,
    Span,
    Statement,
    Tensor,
    View,
    affine,
    row_major,
)
from vacc_opt.ir.errors import UserError

VERSION = 1


def print_program(program: Program) -> str:
    """The canonical text of a program."""
    p = program
    lines = [
        f"schedule {VERSION}",
        f"program {p.name} phase={p.phase} ranks={p.ranks} cores={p.cores} target={p.target} sha={p.target_sha}"
        f" ddr={p.ddr_bytes} ddr_bound={p.ddr_bound}",
    ]
    lines += [f"tensor {t.name} {t.dtype}{_shape(t.shape)} {t.role} @{t.offset}" for t in p.tensors]
    lines += [f"output {o.name} {_strided(o.shape, o.strides)} = {o.tensor}[{o.offset}]" for o in p.outputs]
    for kernel in p.kernels:
        lines += ["", *_kernel(kernel)]
    lines.append("")
    lines += [
        f"call {c.index} {c.kernel}({', '.join(map(_argument, c.arguments))})"
        + (f" with {', '.join(map(_argument, c.scalars))}" if c.scalars else "")
        + (f" from {', '.join(map(_quoted, c.nodes))}" if c.nodes else "")
        for c in p.calls
    ]
    return "\n".join(lines) + "\n"


def print_kernel(kernel: Kernel) -> str:
    """The canonical text of one kernel."""
    return "\n".join(_kernel(kernel)) + "\n"


def print_op(op: Op) -> str:
    """One operation as it stands in the text."""
    inside = [str(view) for view in op.ins] + [f"{key}={_number(value)}" for key, value in op.attributes]
    return f"{', '.join(map(str, op.outs))} <- {op.kind}({', '.join(inside)})"


def _kernel(kernel: Kernel) -> Iterator[str]:
    params = ", ".join(f"{p.mode} {p.name} {p.dtype}{_strided(p.shape, p.strides)}" for p in kernel.params)
    scalars = f" with {', '.join(kernel.scalars)}" if kernel.scalars else ""
    yield f"kernel {kernel.name}({params}){scalars} {{"
    for b in kernel.buffers:
        head = f"  {'ring' if b.is_ring else 'scratch'} {b.name} {b.dtype}{_shape(b.shape)} x{b.depth} @{b.offset}"
        yield f"{head} {b.producer}" + (f" -> {', '.join(b.consumers)}" if b.is_ring else "")
    for engine, tree in kernel.trees:
        yield f"  engine {engine} {{"
        yield from _statements(tree, "    ")
        yield "  }"
    yield "}"


def _statements(body: tuple[Statement, ...], indent: str) -> Iterator[str]:
    for one in body:
        if isinstance(one, Op):
            yield indent + print_op(one)
            continue
        if isinstance(one, Loop):
            word = "par" if one.parallel else "for"
            start = f"max(0, {one.start})" if one.clipped else one.start
            yield f"{indent}{word} {one.var} in {start}:{one.stop}:{one.step} {{"
        else:
            yield f"{indent}{one.mode} {', '.join(one.rings)} {{"
        yield from _statements(one.body, indent + "  ")
        yield indent + "}"


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _strided(shape: tuple[int, ...], strides: tuple[int, ...]) -> str:
    text = _shape(shape)
    return text if strides == row_major(shape) else f"{text}/{_shape(strides)}"


def _argument(argument: Argument) -> str:
    offset = f"[{argument.offset}]" if argument.offset else ""
    return f"{argument.name}={argument.tensor}{offset}"


def _quoted(node: str) -> str:
    """The name of a graph node, which may hold any character, as one word."""
    return _UNSAFE.sub(lambda found: quote(found[0], safe=""), node)


def _number(value: Affine | float) -> str:
    return str(value) if isinstance(value, Affine) else repr(float(value))


_UNSAFE = re.compile(r"[%\s,=()\[\]{}]")
_N = r"[^\s,=()\[\]{}]+"
_DIMS = r"\[([\d, ]*)\]"
_PROGRAM = re.compile(
    rf"program ({_N}) phase=({_N}) ranks=(\d+) cores=(\d+) target=(\S+) sha=({_N}) ddr=(\d+) ddr_bound=(\d+)"
)
_TENSOR = re.compile(rf"tensor ({_N}) (\w+){_DIMS} (input|weight|cache|temp) @(\d+)")
_OUTPUT = re.compile(rf"output ({_N}) {_DIMS}(?:/{_DIMS})? = ({_N})\[(\d+)\]")
_KERNEL = re.compile(rf"kernel ({_N})\((.*)\)(?: with ([\w, ]+))? \{{")
_PARAM = re.compile(rf"(inout|in|out) (\w+) (\w+){_DIMS}(?:/{_DIMS})?(?:, |$)")
_BUFFER = re.compile(rf"(ring|scratch) (\w+) (\w+){_DIMS} x(\d+) @(\d+) (\w+)(?: -> ([\w, ]+))?")
_LOOP = re.compile(r"(for|par) (\w+) in (max\(0, )?([^:]+?)(?(3)\)):([^:]+):(\d+) \{")
_SCOPE = re.compile(r"(fill|use) ([\w, ]+) \{")
_OP = re.compile(r"(\S.*?) <- (\w+)\((.*)\)")
_CALL = re.compile(rf"call (\d+) ({_N})\(([^()]*)\)(?: with (.+?))?(?: from ({_N}(?:, {_N})*))?")
_ARGUMENT = re.compile(rf"({_N})=({_N})(?:\[(\d+)\])?(?:, |$)")
_ITEM = re.compile(r"\s*(?:(\w+)=([^,\[\]]+)|(\w+)\[([^\]]*)\])\s*(?:,|$)")
_TERM = re.compile(r"([+-]?)(?:(\d+)\*)?(?:(\d+)|(\w+|\|\w+\|))")
_FLOAT = re.compile(r"-?(?:\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+|inf|nan)")


class _Lines:
    """The meaningful lines of a text, with a cursor; `fail` raises a UserError that names the present line."""

    def __init__(self, text: str) -> None:
        numbered = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
        self._lines = [(number, line) for number, line in numbered if line and not line.startswith("#")]
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._lines)

    def peek(self) -> str:
        return self._lines[self._at][1] if self else ""

    def take(self) -> str:
        if not self:
            raise UserError("schedule text: ends too early", "is a `}` missing?")
        self._at += 1
        return self._lines[self._at - 1][1]

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.fullmatch(self.peek())
        if found:
            self._at += 1
        return found

    def fail(self, reason: str, back: int = 0) -> UserError:
        number, line = self._lines[min(self._at - back, len(self._lines) - 1)] if self._lines else (1, "")
        return UserError(f"schedule text line {number}: {reason}: `{line[:100]}`")


def parse_program(text: str) -> Program:
    """Read the text of a program; raises UserError naming the line that cannot be read."""
    lines = _Lines(text)
    if not lines.match(re.compile(f"schedule {VERSION}")):
        raise lines.fail(f"expected `schedule {VERSION}`")
    head = lines.match(_PROGRAM)
    if not head:
        raise lines.fail("expected `program NAME phase= ranks= cores= target= sha= ddr= ddr_bound=`")
    tensors, outputs, kernels, calls = [], [], [], []
    while found := lines.match(_TENSOR):
        _dtype(found[2], lines)
        tensors.append(Tensor(found[1], found[2], _ints(found[3], lines), found[4], int(found[5])))
    while found := lines.match(_OUTPUT):
        outputs.append(Output(found[1], found[4], int(found[5]), *_window(found[2], found[3], lines)))
    while lines.peek().startswith("kernel "):
        kernels.append(_parse_kernel(lines))
    while found := lines.match(_CALL):
        arguments, scalars = _arguments(found[3], lines), _arguments(found[4] or "", lines)
        nodes = tuple(unquote(one) for one in found[5].split(", ")) if found[5] else ()
        calls.append(Call(int(found[1]), found[2], arguments, scalars, nodes))
    if lines:
        raise lines.fail("not understood")
    _check_names(tensors, kernels, calls)
    return Program(
        head[1], head[2], int(head[3]), int(head[4]), head[5], head[6],
        tuple(tensors), tuple(kernels), tuple(calls), tuple(outputs), int(head[7]), int(head[8]),
    )  # fmt: skip


def parse_kernel(text: str) -> Kernel:
    """Read the text of one kernel; raises UserError."""
    lines = _Lines(text)
    kernel = _parse_kernel(lines)
    if lines:
        raise lines.fail("text after the kernel")
    return kernel


def _check_names(tensors: list[Tensor], kernels: list[Kernel], calls: list[Call]) -> None:
    known = {one.name for one in tensors}
    params = {kernel.name: (set(kernel.param), set(kernel.scalars)) for kernel in kernels}
    if len(known) < len(tensors) or len(params) < len(kernels):
        raise UserError("schedule text: a tensor or kernel is declared twice")
    for call in calls:
        where = f"schedule text: call {call.index}"
        if call.kernel not in params:
            raise UserError(f"{where}: unknown kernel `{call.kernel}`")
        for one in (*call.arguments, *call.scalars):
            if one.tensor not in known:
                raise UserError(f"{where}: unknown tensor `{one.tensor}`")
        given = {one.name for one in call.arguments}, {one.name for one in call.scalars}
        if given != params[call.kernel]:
            raise UserError(f"{where}: arguments do not match the parameters of `{call.kernel}`")


def _parse_kernel(lines: _Lines) -> Kernel:
    head = lines.match(_KERNEL)
    if not head:
        raise lines.fail("expected `kernel NAME(PARAMETERS) {`")
    params = []
    for found in _every(_PARAM, head[2], lines):
        dtype = _dtype(found[3], lines)
        params.append(Param(found[2], dtype, *_window(found[4], found[5], lines), found[1]))
    scalars = _words(head[3] or "")
    names = [*(one.name for one in params), *scalars]
    if len({*names}) < len(names):
        raise lines.fail("a parameter or scalar is declared twice", 1)
    buffers = []
    while match := lines.match(_BUFFER):
        consumers = _words(match[8] or "")
        place = int(match[5]), int(match[6]), match[7], consumers
        if match[2] in names:
            raise lines.fail(f"`{match[2]}` is declared twice", 1)
        names.append(match[2])
        buffers.append(Buffer(match[2], _dtype(match[3], lines), _ints(match[4], lines), *place))
        if (match[1] == "ring") != bool(consumers) or not {match[7], *consumers} <= set(ENGINES):
            raise lines.fail("a ring has consumers, scratch has none; engines are " + ", ".join(ENGINES), 1)
    trees: list[tuple[str, tuple[Statement, ...]]] = []
    while match := lines.match(re.compile(r"engine (\w+) \{")):
        if match[1] not in ENGINES:
            raise lines.fail("unknown engine", 1)
        if match[1] in dict(trees):
            raise lines.fail("this engine has a tree already", 1)
        trees.append((match[1], _block(lines)))
    if lines.take() != "}":
        raise lines.fail("expected `engine NAME {` or `}`", 1)
    return Kernel(head[1], tuple(params), scalars, tuple(buffers), tuple(trees))


def _block(lines: _Lines) -> tuple[Statement, ...]:
    """Statements up to the closing brace, which is taken."""
    body: list[Statement] = []
    while lines.peek() != "}":
        if found := lines.match(_LOOP):
            start, stop = _affine(found[4], lines), _affine(found[5], lines)
            inside = _block(lines)
            body.append(Loop(found[2], start, stop, int(found[6]), inside, found[1] == "par", bool(found[3])))
        elif found := lines.match(_SCOPE):
            body.append(Scope(found[1], _words(found[2]), _block(lines)))
        elif found := lines.match(_OP):
            body.append(_operation(found, lines))
        else:
            lines.take()
            raise lines.fail("not a loop, scope or operation", 1)
    lines.take()
    return tuple(body)


def _operation(found: re.Match[str], lines: _Lines) -> Op:
    outs = [_view(item, lines) for item in _every(_ITEM, found[1], lines)]
    ins: list[View] = []
    attributes: list[tuple[str, Affine | float]] = []
    for item in _every(_ITEM, found[3], lines):
        if item[1]:
            value = item[2].strip()
            attributes.append((item[1], float(value) if _FLOAT.fullmatch(value) else _affine(value, lines)))
        else:
            ins.append(_view(item, lines))
    return Op(found[2], tuple(outs), tuple(ins), tuple(attributes))


def _view(item: re.Match[str], lines: _Lines) -> View:
    if item[3] is None:
        raise lines.fail("expected a tile such as `A[0:4, k:k+|k|]`", 1)
    spans = []
    for text in item[4].split(",") if item[4].strip() else []:
        start, colon, stop = text.partition(":")
        if not colon:
            raise lines.fail("expected START:STOP", 1)
        spans.append(Span(_affine(start, lines), _affine(stop, lines)))
    return View(item[3], tuple(spans))


def _affine(text: str, lines: _Lines) -> Affine:
    value = _parse_affine(text.replace(" ", ""))
    if value is None:
        raise lines.fail(f"`{text}` is not a sum of variables and numbers", 1)
    return value


@lru_cache(maxsize=4096)
def _parse_affine(text: str) -> Affine | None:
    total, at = affine(0), 0
    while at < len(text):
        found = _TERM.match(text, at)
        if not found or (at and not found[1]):
            return None
        sign = -1 if found[1] == "-" else 1
        total += affine(found[4] or int(found[3])) * (sign * int(found[2] or 1))
        at = found.end()
    return total if text else None


def _arguments(text: str, lines: _Lines) -> tuple[Argument, ...]:
    return tuple(Argument(one[1], one[2], int(one[3] or 0)) for one in _every(_ARGUMENT, text, lines))


def _every(pattern: re.Pattern[str], text: str, lines: _Lines) -> Iterator[re.Match[str]]:
    """Consecutive matches that cover the whole text."""
    at = 0
    while at < len(text):
        found = pattern.match(text, at)
        if not found or found.end() == at:
            raise lines.fail(f"cannot read `{text[at:]}`", 1)
        yield found
        at = found.end()


def _dtype(name: str, lines: _Lines) -> str:
    if name not in DTYPES:
        raise lines.fail(f"unknown type `{name}`", 1)
    return name


def _ints(text: str, lines: _Lines) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in text.split(",")) if text.strip() else ()
    except ValueError:
        raise lines.fail(f"`[{text}]` is not a list of sizes", 1) from None


def _window(sizes: str, steps: str | None, lines: _Lines) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides, row-major where none are given."""
    shape = _ints(sizes, lines)
    strides = row_major(shape) if steps is None else _ints(steps, lines)
    if len(strides) != len(shape):
        raise lines.fail(f"`[{steps}]` are not strides of {len(shape)} axes", 1)
    return shape, strides


def _words(text: str) -> tuple[str, ...]:
    return tuple(one.strip() for one in text.split(",")) if text.strip() else ()

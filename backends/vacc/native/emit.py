"""C text of the kernels of a program: loops stay loops, engines become functions that wait for their rings.

The text is a function of the kernels alone: calls, addresses of tensors and the values of run-time scalars are data.
The engines of a kernel run in turn, each until its ring stops it, as in the value simulator; a schedule without a legal
order says so when it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

from vacc_opt.backends.vacc.binding import is_parallel
from vacc_opt.backends.vacc.native.engine import Engine
from vacc_opt.backends.vacc.native.expressions import check_name, comment_text, error, loop_head, loop_variables
from vacc_opt.backends.vacc.native.operations import work_floats
from vacc_opt.backends.vacc.ops import PRIMITIVES
from vacc_opt.backends.vacc.schedule import Kernel, Op, Program, Scope, Statement


@dataclass(frozen=True, slots=True)
class Source:
    """C text of a program, and of the library that it calls, which is the same for all programs.

    `operations[kernel][i]` is what a fault in operation i of a kernel is about.
    """

    text: str
    library: str
    work_floats: int
    operations: tuple[tuple[Op, ...], ...]


def emit(program: Program) -> Source:
    """The C text of all kernels; ScheduleError for a kernel that has no meaning or no C names."""
    kernels = [_Kernel(kernel, index) for index, kernel in enumerate(program.kernels)]
    parts = [_file("interface.h"), "#include <pthread.h>\n", *("\n".join(one.lines()) + "\n" for one in kernels)]
    parts += ["static const struct kernel KERNELS[] = {", *(one.entry() for one in kernels), "};\n", _file("program.c")]
    library = "\n".join(map(_file, ("interface.h", "tiles.c", "products.c", "vectors.c")))
    work = max(map(work_floats, program.kernels), default=0)
    operations = tuple(tuple(op for _, op in one.operations()) for one in program.kernels)
    return Source("\n".join(parts), library, work, operations)


def _file(name: str) -> str:
    return files("vacc_opt.backends.vacc.native").joinpath(name).read_text(encoding="utf-8")


class _Kernel:
    """One kernel: the state of its engines, a function for each, and the function that runs them in turn."""

    def __init__(self, kernel: Kernel, index: int) -> None:
        self.kernel, self.name = kernel, f"kernel_{index}"
        self.parallel = any(is_parallel(tree) for _, tree in kernel.trees)
        kinds = [(engine, PRIMITIVES.get(op.kind)) for engine, op in kernel.operations()]
        self.collective = any(one is not None and one.collective for _, one in kinds)
        for one in (*kernel.param, *kernel.buffer, *kernel.scalars):
            check_name(kernel, one)
        for buffer in kernel.buffers:
            if buffer.offset < 0:
                raise error(kernel, "bounds", f"`{buffer.name}` starts at byte {buffer.offset} of SRAM")
        self.engines, first = [], 0
        for engine, tree in kernel.trees:
            self.engines.append(Engine(kernel, engine, tree, first, self.collective))
            first += sum(1 for one, _ in kernel.operations() if one == engine)

    def entry(self) -> str:
        """Its line in the table of kernels."""
        return f"    {{{self.name}, {len(self.kernel.params)}, {self.parallel:d}, {self.collective:d}}},"

    def lines(self) -> Iterator[str]:
        yield f"/* {self.name}: {comment_text(self.kernel.name)} */"
        yield from self._state()
        for engine in self.engines:
            yield from self._function(engine)
        yield from self._works()
        yield from self._run()

    def _state(self) -> Iterator[str]:
        """Token counters of the rings, and where each engine stands."""
        yield f"struct {self.name} {{"
        yield "    struct run *r;"
        for buffer in self.kernel.buffers:
            if buffer.is_ring:
                yield f"    long acquired_{buffer.name}, committed_{buffer.name};"
            for engine in buffer.consumers:
                yield f"    long waited_{buffer.name}_{engine}, released_{buffer.name}_{engine};"
        for one in self.engines:
            variables = "".join(f", v_{name}, n_{name}, c_{name}" for name in one.variables)
            yield f"    struct {self.name}_{one.name} {{ long at{variables}; }} {one.name};"
        yield "};"

    def _function(self, engine: Engine) -> Iterator[str]:
        """Runs an engine until it waits (returns 0) or is done (`at` is -1)."""
        name = f"{self.name}_{engine.name}"
        yield f"static int {name}(struct {self.name} *s)"
        yield "{"
        yield "    struct run *r = s->r;"
        yield f"    struct {name} *e = &s->{engine.name};"
        yield from self._scalars()
        yield "    switch (e->at) {"
        yield "    case 0:;"
        yield from engine.body()
        yield "    }"
        yield "    e->at = -1;"
        yield "    return 1;"
        yield "}"

    def _scalars(self) -> Iterator[str]:
        for position, scalar in enumerate(self.kernel.scalars):
            yield f"    const long v_{scalar} = *r->scalars[{position}];"
            yield f"    (void)v_{scalar};"

    def _works(self) -> Iterator[str]:
        """Whether a core does anything but load: one to which no parallel iteration falls takes no part."""
        yield f"static int {self.name}_works(struct run *r)"
        yield "{"
        yield "    (void)r;"
        yield from self._scalars()
        for engine, tree in self.kernel.trees:
            if engine != "dma_in":
                yield "    {"
                for name in sorted(set(loop_variables(tree))):
                    yield f"        long v_{name}, n_{name}, c_{name};"
                    yield f"        (void)n_{name}, (void)c_{name};"
                yield from self._any(tree, "        ")
                yield "    }"
        yield "    return 0;"
        yield "}"

    def _any(self, body: tuple[Statement, ...], indent: str) -> Iterator[str]:
        for one in body:
            if isinstance(one, Op):
                yield f"{indent}return 1;"
                return
            if isinstance(one, Scope):
                yield from self._any(one.body, indent)
                continue
            yield from loop_head(one, indent, lambda kind, name: f"{kind}_{name}")
            yield from self._any(one.body, indent + "    ")
            yield f"{indent}}}"

    def _run(self) -> Iterator[str]:
        yield f"static void {self.name}(struct run *r)"
        yield "{"
        yield f"    struct {self.name} s = {{.r = r}};"
        yield f"    if (!{self.name}_works(r)) return;"
        yield "    long moves;"
        yield "    do {"
        yield "        moves = r->moves;"
        for one in self.engines:
            yield f"        if (s.{one.name}.at >= 0 && !{self.name}_{one.name}(&s) && r->fault) return;"
        yield "    } while (moves != r->moves);"
        waiting = " || ".join(f"s.{one.name}.at >= 0" for one in self.engines) or "0"
        yield f"    if ({waiting}) fail(r, STUCK, -1);"
        for buffer in self.kernel.buffers:
            for engine in buffer.consumers:
                left = f"s.released_{buffer.name}_{engine} != s.committed_{buffer.name}"
                yield f"    if (!r->fault && {left}) fail(r, UNREAD, -1);"
        yield "}"

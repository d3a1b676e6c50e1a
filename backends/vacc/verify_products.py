"""Checks of what the array multiplies: every multiply-accumulate of a product is done once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vacc_opt.backends.vacc.binding import Lanes
from vacc_opt.backends.vacc.expand import Step
from vacc_opt.backends.vacc.products import MatrixProduct, Untraceable, computed, fills, matrix_products, uses
from vacc_opt.backends.vacc.regions import Region, first_overlap, first_uncovered
from vacc_opt.backends.vacc.schedule import Kernel
from vacc_opt.backends.vacc.text import print_op
from vacc_opt.backends.vacc.verify_routes import misplaced

Problem = tuple[str, str]  # (kind, message)


def product_problems(kernel: Kernel, lanes: Lanes) -> Iterator[Problem]:
    """Loaded operands: the products fill M x N x K exactly. Computed ones: each accumulator sums its k exactly once."""
    if computed(kernel):
        yield from _accumulators(kernel, lanes)
        return
    try:
        products = matrix_products(kernel, lanes)
    except Untraceable as error:
        yield "coverage", f"`{error}` cannot be followed: its operands are not loaded from one axis of one parameter"
        return
    for product in products:
        yield from _volume(product)
        yield from misplaced(kernel, lanes, product)


def _volume(product: MatrixProduct) -> Iterator[Problem]:
    """The MAC boxes of a matrix product fill M x N x K exactly."""
    for one in product.macs:
        if one.row_k != one.column_k:
            ranges = f"k {one.row_k[0]}:{one.row_k[1]} with k {one.column_k[0]}:{one.column_k[1]}"
            yield "coverage", f"`{print_op(one.step.op)}` multiplies {ranges}"
            return
    regions = [
        ((*one.rows[0], *one.columns[0], one.row_k[0]), (*one.rows[1], *one.columns[1], one.row_k[1]))
        for one in product.macs
    ]
    whole = (*product.row_shape, *product.column_shape, product.size.k)
    size = f"M x N x K = {product.size.m} x {product.size.n} x {product.size.k}"
    gap, twice = first_uncovered(whole, regions), first_overlap(regions)
    if gap:
        yield "uncovered", f"no mma covers {_named(gap)} of {size}"
    if twice:
        yield "coverage", f"two mma cover {_named(twice)} of {size}"


@dataclass(frozen=True, slots=True)
class _Sum:
    """An accumulator slot with the tiles that are multiplied into it: (core, ring, number of the fill) of each."""

    accumulator: tuple[int, str, int]
    first: tuple[int, str, int]
    second: tuple[int, str, int]


def _accumulators(kernel: Kernel, lanes: Lanes) -> Iterator[Problem]:
    """For each pair of tiles multiplied into a slot, the k of its mma steps fill those of the first tile once."""
    written = fills(lanes)
    sums: dict[_Sum, list[tuple[Step, Region]]] = {}
    for core, engine, step, entered in uses(lanes):
        if engine != "matrix":
            continue
        out, (a, b) = step.outs[0], step.ins
        k, other = (a.start[-1], a.stop[-1]), (b.start, b.stop)
        axis = -1 if step.op.kind == "mma" else -2
        if k != (other[0][axis], other[1][axis]):
            ranges = f"k {k[0]}:{k[1]} with k {other[0][axis]}:{other[1][axis]} of their tiles"
            yield "coverage", f"`{print_op(step.op)}` multiplies {ranges}"
        slots = [(core, box.ref, entered.get(box.ref, 0)) for box in (out, a, b)]
        sums.setdefault(_Sum(*slots), []).append((step, ((*out.start, k[0]), (*out.stop, k[1]))))
    for one, steps in sums.items():
        core, ring, number = one.first
        regions = [region for _, region in steps]
        op, low, high = print_op(steps[0][0].op), regions[0][0][:-1], regions[0][1][:-1]
        twice = first_overlap(regions)
        if twice:
            yield "coverage", f"`{op}`: two mma add k {twice[0][-1]}:{twice[1][-1]} to {_named((low, high))}"
        slot = written[core, ring][number] if (core, ring) in written else []
        depth = max((box.stop[-1] for step in slot for box in step.outs if box.ref == ring), default=0)
        for place in dict.fromkeys((region[0][:-1], region[1][:-1]) for region in regions):
            intervals = [((r[0][-1],), (r[1][-1],)) for r in regions if (r[0][:-1], r[1][:-1]) == place]
            gap = first_uncovered([depth], intervals)
            if gap:
                yield "uncovered", f"`{op}`: no mma adds k {gap[0][0]}:{gap[1][0]} to {_named(place)}"


def _named(region: Region) -> str:
    return f"[{', '.join(f'{a}:{b}' for a, b in zip(*region, strict=True))}]"

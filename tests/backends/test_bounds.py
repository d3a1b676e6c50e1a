"""Lower bounds, recomputed here from sizes and target numbers, and never above the simulated time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import pytest

from vacc_opt.backends.vacc.binding import lanes
from vacc_opt.backends.vacc.costs import link_cost
from vacc_opt.backends.vacc.kernels.builder import param
from vacc_opt.backends.vacc.kernels.collectives import all_reduce
from vacc_opt.backends.vacc.products import matrix_product
from vacc_opt.backends.vacc.regions import covers, first_overlap, first_uncovered, union_volume
from vacc_opt.backends.vacc.schedule import Kernel
from vacc_opt.backends.vacc.simulate_time import time_kernel
from vacc_opt.backends.vacc.target import Links, Target, load_target
from vacc_opt.backends.vacc.text import parse_kernel
from vacc_opt.backends.vacc.verify_kernel import kernel_violations
from vacc_opt.tests.backends.peer import LINEARS, TARGETS, Peer


class Example(Protocol):
    kernel: Kernel
    target: Target
    scalars: Sequence[dict[str, int]]


SIZES = [(1024, 4096, 1280), (1, 4096, 1280), (17, 107, 3402), (1, 1009, 131)]


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("weights", ["f16", "i8"])
def test_the_bound_of_a_product_follows_from_its_sizes(
    make_gemm: Callable[..., Kernel], m: int, n: int, k: int, weights: str
) -> None:
    """On the peer machine: 64x64 passes of m cycles, and every byte once at 64 bytes a cycle."""
    target = load_target("peer-64x64-2mib-64bpc")
    timing = time_kernel(make_gemm(target, m, n, k, weights), target, {})
    passes = -(-k // 64) * -(-n // 64)
    scales = 4 * n if weights == "i8" else 0
    size = 2 * m * k + (1 if weights == "i8" else 2) * n * k + 2 * m * n + scales
    assert timing.bound.compute == passes * max(m, 1)
    assert timing.bound.ddr == math.ceil(size / 64)
    assert timing.macs == m * n * k


def test_a_kernel_never_beats_its_bound(example: Example) -> None:
    for scalars in example.scalars:
        for ranks in (1, 4):
            timing = time_kernel(example.kernel, example.target, scalars, ranks)
            assert timing.cycles >= timing.bound.cycles > 0


ZEROS = """
kernel zeros(in X f32[64], out Z f32[64], out Y f32[100, 1472]) {
  ring x f32[64] x1 @0 dma_in -> dma_out
  ring start f32[1] x1 @256 dma_in -> vector
  ring y f32[1, 1472] x2 @320 vector -> dma_out
  engine dma_in {
    fill start {
    }
    fill x {
      x[0:64] <- load(X[0:64])
    }
  }
  engine vector {
    use start {
      for m in 0:100:1 {
        fill y {
          y[0:1, 0:1472] <- constant(value=0.0)
        }
      }
    }
  }
  engine dma_out {
    for m in 0:100:1 {
      use y {
        Y[m:m+1, 0:1472] <- store(y[0:1, 0:1472])
      }
    }
    use x {
      Z[0:64] <- store(x[0:64])
    }
  }
}
"""


@pytest.mark.parametrize("signalled", [False, True])
def test_what_needs_no_load_does_not_wait_for_the_first(signalled: bool) -> None:
    """Tiles of zeros are stored while the DDR still looks for X; an empty slot of the loads may set that off."""
    target, text = load_target("vacc-reference"), ZEROS
    if not signalled:
        text = text.replace("  ring start f32[1] x1 @256 dma_in -> vector\n", "").replace(
            "    fill start {\n    }\n", ""
        )
        text = text.replace("use start", "for once in 0:1:1")
    kernel = parse_kernel(text)
    assert kernel_violations(kernel, target, [{}]) == []
    timing = time_kernel(kernel, target, {})
    assert timing.bound.latency == 0
    assert timing.cycles < timing.bound.cycles + target.core.dma.issue + target.die.ddr.latency


def test_constants_that_an_engine_keeps_to_itself_do_not_shorten_the_wait(
    make_attention: Callable[..., Kernel],
) -> None:
    target = load_target("vacc-reference")
    kernel = make_attention(target, 13, 64, "f32", False)
    assert "constant" in {op.kind for _, op in kernel.operations()}
    bound = time_kernel(kernel, target, {"pos": 0}).bound
    assert bound.latency == target.core.dma.issue + target.die.ddr.latency


def test_the_product_of_a_kernel_is_read_from_its_tiles(make_gemm: Callable[..., Kernel]) -> None:
    target = load_target("vacc-reference")
    kernel = make_gemm(target, 70, 203, 129)
    product = matrix_product(kernel, lanes(kernel, target.die.cores, {}))
    assert product is not None
    assert (product.size.m, product.size.n, product.size.k) == (70, 203, 129)
    macs = [math.prod(one.step.outs[0].shape) * (one.row_k[1] - one.row_k[0]) for one in product.macs]
    assert sum(macs) == 70 * 203 * 129


def test_the_bound_names_what_binds(make_gemm: Callable[..., Kernel]) -> None:
    target = load_target("peer-64x64-2mib-64bpc")
    assert time_kernel(make_gemm(target, 1024, 1280, 512), target, {}).bound.binds == "compute"
    assert time_kernel(make_gemm(target, 1, 1280, 512), target, {}).bound.binds == "DDR"


@pytest.mark.parametrize("weight", [1, 2])
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("k", "n"), [*LINEARS.values(), (3402, 107), (4096, 16)])
def test_what_does_not_fit_on_the_chip_crosses_the_port_again(
    make_gemm: Callable[..., Kernel], k: int, n: int, name: str, weight: int
) -> None:
    """The bound is that of the formula; the least traffic of a tiling and what the kernel moves are no less."""
    peer, target = Peer(1024, n, k, weight, name), load_target(name)
    timing = time_kernel(make_gemm(target, 1024, n, k, "i8" if weight == 1 else "f16"), target, {})
    least = max(peer.capacity, peer.compulsory)
    assert timing.bound.capacity == math.ceil(least / peer.rate)
    assert timing.bound.ddr <= timing.bound.capacity
    assert timing.bytes >= least
    assert peer.least_bytes() >= peer.capacity


def slow(**numbers: float) -> Target:
    """The peer machine of 1 MiB with other numbers of its DDR or, as `port`, of its DMA."""
    target = load_target("peer-64x64-1mib-200bpc")
    core = target.core.model_copy(
        update={"dma": target.core.dma.model_copy(update={"bytes_per_cycle": numbers.get("port", 1e6)})}
    )
    ddr = target.die.ddr.model_copy(update={"bytes_per_cycle": numbers.get("ddr", 200)})
    return target.model_copy(update={"core": core, "die": target.die.model_copy(update={"ddr": ddr})})


@pytest.mark.parametrize(("binds", "target"), [("capacity", slow(ddr=16)), ("port", slow(port=4))])
def test_memory_that_is_too_small_or_a_port_that_is_too_narrow_binds(
    make_gemm: Callable[..., Kernel], binds: str, target: Target
) -> None:
    timing = time_kernel(make_gemm(target, 1024, 6848, 4096), target, {})
    assert timing.bound.binds == binds
    assert sum(timing.account.values()) == timing.cycles > timing.bound.cycles
    assert timing.account["DDR"] > timing.cycles / 2


LINKS = Links(bytes_per_cycle=32, hop_latency=700, engines=2)


def test_a_large_reduction_takes_the_ring() -> None:
    """4 ranks, 64 bytes a cycle both ways: 6 steps of a quarter, 6 hops."""
    assert link_cost("all_reduce", 1 << 20, 4, LINKS) == (6 * (1 << 18) // 64, 6 * 700)


def test_a_small_reduction_is_exchanged_directly() -> None:
    """4 ranks: each die's bytes take 1 + 1 + 2 hops in total, the farthest is 2 hops away."""
    assert link_cost("all_reduce", 1024, 4, LINKS) == (4 * 1024 // 64, 2 * 700)


def test_many_small_steps_of_a_reduction_take_the_ring() -> None:
    """The hops of a step pass while the links are busy with the next one, so what counts is how long they are busy."""
    assert link_cost("all_reduce", 1024, 4, LINKS, steps=1000) == (6 * 256 // 64, 6 * 700)


def test_one_rank_needs_no_link() -> None:
    assert link_cost("all_reduce", 1024, 1, LINKS) == (0, 0)


def test_the_time_of_a_collective_is_that_of_the_links_and_its_bytes_that_of_the_ddr() -> None:
    """One step: 4 x 8192 bytes pass over the links, which takes most of the time; then each byte moves in and out."""
    card = load_target("vacc-card4")
    assert card.links is not None
    kernel = all_reduce(param("X", "in", "f32", (2048,)), param("Y", "out", "f32", (2048,)))
    timing = time_kernel(kernel, card, {}, 4)
    busy, hops = link_cost("all_reduce", 8192, 4, card.links)
    moving = math.ceil(2 * 8192 / min(card.core.dma.bytes_per_cycle, card.die.ddr.effective_bytes_per_cycle))
    assert timing.account == {"link": busy, "DDR": moving, "compute": 0, "vector": 0, "latency": hops}


def test_volumes_of_overlapping_boxes_count_elements_once() -> None:
    boxes = [((0, 0), (4, 4)), ((2, 2), (6, 6)), ((0, 0), (4, 4))]
    assert union_volume(boxes) == 16 + 16 - 4
    assert first_overlap(boxes[:1]) is None
    assert first_overlap(boxes[:2]) == ((2, 2), (4, 4))


def test_a_gap_of_one_element_is_found() -> None:
    halves = [((0, 0), (5, 3)), ((0, 3), (4, 7))]
    assert first_uncovered((5, 7), halves) == ((4, 3), (5, 7))
    assert first_uncovered((5, 7), [*halves, ((4, 3), (5, 7))]) is None


def test_a_box_can_be_covered_by_several() -> None:
    assert covers([((0,), (3,)), ((3,), (8,))], ((1,), (7,)))
    assert not covers([((0,), (3,)), ((4,), (8,))], ((1,), (7,)))

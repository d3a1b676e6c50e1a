"""One kernel of every kind, small and of odd sizes, for tests of the verifier and of the time simulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from vacc_opt.backends.vacc.kernels.attention import AttentionParams, Quantization, Scores, attention
from vacc_opt.backends.vacc.kernels.builder import param
from vacc_opt.backends.vacc.kernels.collectives import all_gather, all_reduce
from vacc_opt.backends.vacc.kernels.elementwise import elementwise
from vacc_opt.backends.vacc.kernels.embedding import embedding
from vacc_opt.backends.vacc.kernels.kv_append import kv_append
from vacc_opt.backends.vacc.kernels.layer_norm import layer_norm
from vacc_opt.backends.vacc.kernels.linear import linear
from vacc_opt.backends.vacc.kernels.move import copy, select_row
from vacc_opt.backends.vacc.kernels.rms_norm import rms_norm
from vacc_opt.backends.vacc.kernels.rotary import rotary
from vacc_opt.backends.vacc.kernels.row_scale import row_scale
from vacc_opt.backends.vacc.schedule import Kernel
from vacc_opt.backends.vacc.target import Target, load_target

Scalars = Sequence[dict[str, int]]
PLAIN = Scores(0.125)
TARGETS = ("vacc-reference", "peer-64x64-1mib-64bpc", "tiny")


def gemm(target: Target, m: int, n: int, k: int, weights: str = "f16", activations: str = "f16") -> Kernel:
    """Y[m, n] = X[m, k] @ W[n, k]^T, with a scale a column for int8 weights."""
    scale = param("S", "in", "f32", (n,)) if weights == "i8" else None
    x, w = param("X", "in", activations, (m, k)), param("W", "in", weights, (n, k))
    return linear(x, w, scale, param("Y", "out", activations, (m, n)), target)


def attend(
    target: Target,
    tokens: int,
    capacity: int,
    cache: str,
    new: bool,
    scores: Scores = PLAIN,
    alibi: bool = False,
    group: int = 3,
    width: int = 32,
) -> Kernel:
    """Two KV heads, `group` query heads each, of `width` channels."""
    heads = 2
    q, y = (param(name, mode, "f32", (heads, group, tokens, width)) for name, mode in (("Q", "in"), ("Y", "out")))
    k, v = (param(name, "in", cache, (heads, capacity, width)) for name in "KV")
    tables = Quantization(*(param(name, "in", "f32", (heads, 1, width)) for name in ("KS", "KZ", "VS", "VZ")))
    fresh = tuple(param(name, "in", "f32", (heads, tokens, width)) for name in ("KN", "VN"))
    slopes = param("SLOPES", "in", "f32", (heads, group, 1, 1)) if alibi else None
    folded, apart = tables if cache == "i8" else None, (fresh[0], fresh[1]) if new else None
    return attention(AttentionParams(q, k, v, y, folded, apart, slopes), scores, target)


def zoo(target: Target) -> dict[str, tuple[Kernel, Scalars]]:
    """Kernels by name, each with values of its run-time scalars that are legal."""
    rows = [param(name, mode, "f32", (13, 100)) for name, mode in (("A", "in"), ("B", "in"), ("Y", "out"))]
    norm = param("X", "in", "f32", (13, 100)), param("W", "in", "f32", (100,)), param("Y", "out", "f32", (13, 100))
    turn = (
        param("X", "in", "f32", (3, 13, 32)),
        param("COS", "in", "f32", (64, 16)),
        param("SIN", "in", "f32", (64, 16)),
    )
    new = param("NEW", "in", "f32", (2, 13, 32))
    tables = [param(name, "in", "f32", (2, 1, 32)) for name in ("SCALE", "ZERO")]
    ids = param("IDS", "in", "i64", (13,))
    embed = param("T", "in", "f32", (500, 96)), ids, None, param("Y", "out", "f32", (13, 96))
    positions = [{"pos": pos} for pos in (0, 1, 51)]
    none: Scalars = [{}]
    kernels: dict[str, tuple[Kernel, Scalars]] = {
        "gemm": (gemm(target, 70, 203, 129), none),
        "gemv_w8": (gemm(target, 1, 1003, 130, "i8"), none),
        "gemm_w8": (gemm(target, 130, 1003, 1300, "i8", "f32"), none),
        "attention": (attend(target, 13, 64, "f32", False), positions),
        "attention_i8": (attend(target, 13, 64, "i8", False), positions),
        "attention_i8_new": (attend(target, 13, 64, "i8", True), positions),
        "attention_decode": (attend(target, 1, 64, "i8", True), [{"pos": pos} for pos in (0, 1, 63)]),
        "attention_window": (attend(target, 13, 64, "f32", False, Scores(0.125, window=9)), positions),
        "attention_limits": (
            attend(target, 13, 64, "i8", True, Scores(0.125, 20, clamp=2.0, softcap=3.0), alibi=True),
            positions,
        ),
        "kv_append": (kv_append(new, param("CACHE", "inout", "f32", (2, 64, 32)), None, None, target), positions),
        "kv_append_i8": (
            kv_append(new, param("CACHE", "inout", "i8", (2, 64, 32)), tables[0], tables[1], target),
            positions,
        ),
        "add": (elementwise("add", rows[0], rows[1], rows[2], target), none),
        "swiglu": (elementwise("silu_mul", rows[0], rows[1], rows[2], target), none),
        "gelu": (elementwise("gelu", rows[0], None, rows[2], target, tanh=0), none),
        "geglu": (elementwise("gelu_mul", *rows, target, tanh=1), none),
        "layer_norm": (layer_norm(norm[0], norm[1], param("C", "in", "f32", (100,)), norm[2], 1e-5, target), none),
        "layer_norm_plain": (layer_norm(norm[0], norm[1], None, norm[2], 1e-5, target), none),
        "rms_norm": (rms_norm(*norm, 1e-5, target), none),
        "row_scale": (row_scale(norm[0], param("Y", "out", "f32", (norm[0].shape[0], 1)), 1e-5, target), none),
        "rotary": (rotary(*turn, param("Y", "out", "f32", (3, 13, 32)), False, target), positions),
        "embedding": (embedding(*embed, target), none),
        "copy": (copy(rows[0], rows[2], target), none),
        "select_row": (
            select_row(rows[0], param("Y", "out", "f32", (1, 100)), target),
            [{"valid": n} for n in (1, 7, 13)],
        ),
        "all_reduce": (all_reduce(param("X", "in", "f32", (20000,)), param("Y", "out", "f32", (20000,))), none),
        "all_gather": (all_gather(param("X", "in", "f32", (3, 20000)), param("Y", "out", "f32", (3, 3, 20000))), none),
    }
    return kernels


@dataclass(frozen=True)
class Example:
    """A kernel, the machine it is made for, and legal values of its run-time scalars."""

    name: str
    kernel: Kernel
    target: Target
    scalars: Scalars


def machine(name: str) -> Target:
    """A shipped target, or `tiny`: the reference with 3 cores of 96 KiB, where everything needs several tiles."""
    if name != "tiny":
        return load_target(name)
    reference = load_target("vacc-reference")
    sram = reference.core.sram.model_copy(update={"bytes": 96 << 10})
    core = reference.core.model_copy(update={"sram": sram})
    return reference.model_copy(update={"core": core, "die": reference.die.model_copy(update={"cores": 3})})


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return machine(request.param)


@pytest.fixture(params=sorted(zoo(load_target(TARGETS[0]))))
def example(request: pytest.FixtureRequest, target: Target) -> Example:
    kernel, scalars = zoo(target)[request.param]
    return Example(request.param, kernel, target, scalars)


@pytest.fixture
def make_gemm() -> Callable[..., Kernel]:
    return gemm


@pytest.fixture
def make_attention() -> Callable[..., Kernel]:
    return attend

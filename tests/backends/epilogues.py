"""Linears with something fused behind them, for tests of kernels, of their time and of the verifier."""

from __future__ import annotations

from vacc_opt.backends.vacc.epilogue import Epilogue, Gate, Turn
from vacc_opt.backends.vacc.kernels.builder import param
from vacc_opt.backends.vacc.schedule import Param

HEAD, CONTEXT = 12, 40
Params = tuple[Param, Param, Param | None, Param]


def fused(
    steps: list[str],
    m: int,
    n: int,
    k: int,
    weights: str = "f16",
    dtype: str = "f16",
    head: int = HEAD,
    context: int = CONTEXT,
) -> tuple[Params, Epilogue]:
    """A linear [m, k] x [n, k]^T, and what is fused into it."""
    given_n = [("B", dtype), ("S", "f32"), ("SU", "f32"), ("BU", dtype), ("SCALE", "f32"), ("ZERO", "f32")]
    row = {name: param(name, "in", kind, (n,)) for name, kind in given_n}
    scaled, bias = weights == "i8", "bias" in steps
    gate = None
    if {"swiglu", "geglu"} & set(steps):
        other = param("U", "in", weights, (n, k))
        gate = Gate(steps[-1], other, row["SU"] if scaled else None, row["BU"] if bias else None, 1)
    tables = [param(name, "in", dtype, (context, head // 2 - 1)) for name in ("COS", "SIN")]
    after = Epilogue(
        bias=row["B"] if bias else None,
        gate=gate,
        factor=param("RS", "in", "f32", (m, 1)) if "row scale" in steps else None,
        residual=param("RES", "in", dtype, (m, n)) if "residual" in steps else None,
        turn=Turn(tables[0], tables[1], True) if "rotary" in steps else None,
        codes=(row["SCALE"], row["ZERO"]) if "codes" in steps else None,
        append="append" in steps,
        head=head if {"rotary", "heads"} & set(steps) else 0,
    )
    rows = context if after.append else m
    shape = (n // head, rows, head) if after.head else (rows, n)
    name, mode = ("CACHE", "inout") if after.append else ("Y", "out")
    y = param(name, mode, "i8" if after.codes else dtype, shape)
    given_params = (
        param("X", "in", dtype, (m, k)), param("W", "in", weights, (n, k)), row["S"] if scaled else None, y,
    )  # fmt: skip
    return given_params, after

"""Operators of the ``Vastai`` domain, one file each (pairs that only make sense together share one)."""

from vacc_opt.ir.ops import (
    add_rms_norm,
    attention,
    collectives,
    embedding_shard,
    geglu,
    kv_quant,
    quantized_linear,
    swiglu,
)
from vacc_opt.ir.ops.base import DOMAIN, OPS, OpDef, facets_of, get, overload

__all__ = [
    "DOMAIN",
    "OPS",
    "OpDef",
    "add_rms_norm",
    "attention",
    "collectives",
    "embedding_shard",
    "facets_of",
    "geglu",
    "get",
    "kv_quant",
    "overload",
    "quantized_linear",
    "swiglu",
]

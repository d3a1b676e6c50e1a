"""Operators of the ``Vastai`` domain, one file each (pairs that only make sense together share one)."""

from vacc_opt.ir.ops import collectives, embedding_shard, kv_quant, quantized_linear, swiglu
from vacc_opt.ir.ops.base import DOMAIN, OPS, OpDef, get

__all__ = ["DOMAIN", "OPS", "OpDef", "collectives", "embedding_shard", "get", "kv_quant", "quantized_linear", "swiglu"]

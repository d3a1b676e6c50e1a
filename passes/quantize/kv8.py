"""KV buffers in float  ->  int8 buffers, quantized when written and dequantized when read."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vacc_opt.ir import DType, Graph, Literal, Node, TensorType, Value
from vacc_opt.ir.errors import CheckError, UserError, did_you_mean
from vacc_opt.ir.provenance import Provenance
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.storage import read_safetensors_header
from vacc_opt.ir.tensor import Source
from vacc_opt.ir.weights import weight_origins
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option, where
from vacc_opt.passes.infra.check.adapters import Adapter, Quantized, continued
from vacc_opt.passes.infra.registry import register

NEW_TOKENS = ("float", "quantized")
_LAYER = re.compile(r"(\d+)\.(key|value)$")


@register
@dataclass(frozen=True)
class Kv8(Pass):
    """Keep the KV cache in int8 with static scales, one (scale, zero) a KV head and channel.

    Only new tokens are quantized, once: the cache is never requantized. With ``new_tokens=float`` (the default) the
    tokens of the current call are attended unquantized, with ``quantized`` as they will be read later.
    ``scales`` names a safetensors file with layers.N.{key,value}.{scale,zero}, each float [kv_heads, head_dim].

    Before:
        g (float[1,1,S,2] k, int64[1] pos, float[1,1,8,2] "past.0.key") => ("present.0.key", keys) {
            "present.0.key" = TensorScatter <axis = 2> ("past.0.key", k, pos)
            keys = Identity ("present.0.key")
        }
    After kv8{scales=kv.safetensors}:
        g (float[1,1,S,2] k, int64[1] pos, int8[1,1,8,2] "past.0.key") => (int8[1,1,8,2] "present.0.key", keys)
        <float[1,2] scale = {0.5, 0.25}, float[1,2] zero = {0, 0}> {
            codes = Vastai.QuantizeKV (k, scale, zero)
            "present.0.key" = TensorScatter <axis = 2> ("past.0.key", codes, pos)
            past = Vastai.DequantizeKV <to = 1> ("past.0.key", scale, zero)
            attended = TensorScatter <axis = 2> (past, k, pos)
            keys = Identity (attended)
        }
    """

    name: ClassVar[str] = "kv8"
    kind: ClassVar[Kind] = Kind.LOSSY
    runs_after: ClassVar[tuple[str, ...]] = ("kv-cache",)
    runs_before: ClassVar[tuple[str, ...]] = ("split-tp",)

    scales: str = option("", "safetensors file of calibrated scales")
    new_tokens: str = option("float", "how tokens of this call are attended: float or quantized")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Rewrite every KV buffer.

        Raises:
            UserError: no scales file, or one without this model's layers or of another shape.
            CheckError: the graph has no KV buffers.
        """
        if not self.scales:
            raise UserError("kv8 needs calibrated scales", "kv8{scales=FILE}; `vacc-opt compile` calibrates them")
        if self.new_tokens.replace("quantised", "quantized") not in NEW_TOKENS:
            raise UserError(f"new_tokens is {self.new_tokens!r}", did_you_mean(self.new_tokens, NEW_TOKENS))
        if graph.ranks > 1:
            raise CheckError("the graph is split over ranks already", "put kv8 before split-tp: quantize, then split")
        buffers = _writes(graph)
        writes = [write for write in buffers if write.output.type.dtype is not DType.INT8]
        if buffers and not writes:
            return Outcome("the KV buffers are int8 already")
        if not writes:
            raise CheckError("the graph has no KV buffers", "run kv-cache before kv8")
        stored = read_safetensors_header(Path(self.scales))
        outcome = Outcome(f"{len(writes)} KV buffers int8, new tokens {self.new_tokens}")
        with rw.applying():
            for write in writes:
                outcome.remarks.append(Remark("passed", self.name, "int8", where(write)))
                with rw.on_behalf_of(write):
                    self._rewrite(graph, rw, write, stored)
            rw.infer_again()
        return outcome

    def _rewrite(self, graph: Graph, rw: Rewriter, write: Node, stored: dict[str, Source]) -> None:
        cache, new, pos = write.inputs[:3]
        assert cache is not None
        assert new is not None
        scale, zero = (self._constant(rw, cache, stored, what) for what in ("scale", "zero"))
        dtype = cache.type.dtype
        rw.set_type(cache, TensorType(DType.INT8, cache.shape))
        codes = rw.vastai.QuantizeKV(new, scale, zero)
        written = rw.op.TensorScatter(cache, codes, pos, **write.attributes)
        if self.new_tokens == "float":
            old = rw.vastai.DequantizeKV(cache, scale, zero, to=dtype.onnx)
            read = rw.op.TensorScatter(old, new, pos, **write.attributes)
        else:
            read = rw.vastai.DequantizeKV(written, scale, zero, to=dtype.onnx)
        for name in graph.output_names(write.output):
            rw.set_output(name, written)
        rw.replace(write.output, read)

    def adapter(self, before: Graph) -> Adapter:
        """Buffers hold codes; a code stands for the number it was made of within half a step."""
        caches = [write.inputs[0] for write in _writes(before)]
        grids = {cache.name: self._grid(cache) for cache in caches if cache is not None}
        return Quantized(grids, continued(before))

    def reference(self, before: Graph, roots: Collection[str]) -> Graph:
        """With ``new_tokens=quantized``, keys and values are rounded before they are written; past ones always are."""
        rw = Rewriter(before)
        for write in _writes(before) if self.new_tokens != "float" and roots else ():
            cache, new = write.inputs[:2]
            assert cache is not None
            scale, zero = (rw.const(numbers) for numbers in self._grid(cache))
            low, high = rw.const(-127, dtype="float32"), rw.const(127, dtype="float32")
            codes = rw.op.Clip(rw.op.Round(rw.op.Div(rw.op.Sub(new, zero), scale)), low, high)
            rw.set_input(write, 1, rw.op.Add(rw.op.Mul(codes, scale), zero))
        return before

    def _grid(self, cache: Value) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """(scale, zero) of a buffer, [heads, 1, channels]."""
        stored = read_safetensors_header(Path(self.scales))
        scale, zero = (self._numbers(cache, stored, what)[2][:, None, :] for what in ("scale", "zero"))
        return scale, zero

    def _constant(self, rw: Rewriter, cache: Value, stored: dict[str, Source], what: str) -> Value:
        name, source, numbers = self._numbers(cache, stored, what)
        if not np.isfinite(numbers).all() or (what == "scale" and (numbers <= 0).any()):
            raise UserError(
                f"{self.scales}: {name} holds a number that is {'not above 0' if what == 'scale' else 'not finite'}"
            )
        label = f"{cache.name}.{what}"
        return rw.const(Literal(numbers), label, of=Provenance(weight_origins(label, source)))

    def _numbers(
        self, cache: Value, stored: dict[str, Source], what: str
    ) -> tuple[str, Source, npt.NDArray[np.float32]]:
        """A tensor of the file, in fp32 whatever its type there."""
        name, source = self._stored(cache, stored, what)
        return name, source, source.read().astype(np.float32)

    def _stored(self, cache: Value, stored: dict[str, Source], what: str) -> tuple[str, Source]:
        match = _LAYER.search(cache.name)
        if match is None:
            raise CheckError(f"the KV buffer {cache.name!r} does not name its layer")
        name = f"layers.{match[1]}.{match[2]}.{what}"
        assert cache.shape is not None
        if name not in stored:
            raise UserError(f"{self.scales}: no tensor {name!r}", did_you_mean(name, stored))
        source = stored[name]
        if source.shape != (cache.shape[1], cache.shape[3]):
            raise UserError(
                f"{self.scales}: {name} is {list(source.shape)}, the model has {cache.shape[1]} KV heads of "
                f"{cache.shape[3]} channels"
            )
        return name, source


def _writes(graph: Graph) -> list[Node]:
    return [n for n in graph.by_op("TensorScatter") if n.inputs[0] in graph.inputs]

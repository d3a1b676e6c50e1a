"""Named pipelines: a preset is written like a pass, with options, and stands for pipeline text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.passes.infra.options import Named, option


@dataclass(frozen=True)
class Preset(Named, ABC):
    """A name for pipeline text."""

    @abstractmethod
    def text(self) -> str:
        """The pipeline that the name stands for."""


@dataclass(frozen=True)
class Recognize(Preset):
    """Clean an exported model up and fuse norms, rotaries, attentions and gated activations."""

    name: ClassVar[str] = "vacc-recognize"

    context: int = option(8192, "positions that the rotary tables cover, in tokens")

    def text(self) -> str:
        """Recognizers only: the interface stays."""
        rotary = f"fuse-rotary{{positions={self.context}}}"
        norms = "fuse-rms-norm,fuse-head-norms,fold-norm-head"
        return f"simplify,{norms},{rotary},split-packed-linear,fuse-gqa,fuse-swiglu,fuse-quantized-linear"


@dataclass(frozen=True)
class Interface(Preset):
    """Give a recognized model the accelerator's interface: last token only, fixed KV buffers."""

    name: ClassVar[str] = "vacc-interface"

    context: int = option(8192, "capacity of the KV buffers, in tokens")
    several: bool = option(False, "`context` is the largest capacity: each phase says its own")

    def text(self) -> str:
        """Both passes change inputs or outputs."""
        several = ",several=true" if self.several else ""
        return f"slice-last-token,kv-cache{{context={self.context}{several}}}"


@dataclass(frozen=True)
class Default(Preset):
    """The main job without an int8 cache: recognize, fixed KV buffers, int8 weights, split over ranks."""

    name: ClassVar[str] = "vacc-default"

    context: int = option(8192, "capacity of the KV buffers and of the rotary tables, in tokens")
    tp: int = option(1, "number of ranks")

    def text(self) -> str:
        """Quantize first, then split."""
        context, split = f"{{context={self.context}}}", f"split-tp{{tp={self.tp}}},fuse-residual-norm"
        return f"vacc-recognize{context},vacc-interface{context},w8a16,{split},legalize"


@dataclass(frozen=True)
class Kv8(Preset):
    """The main job: int8 weights and an int8 KV cache with calibrated scales."""

    name: ClassVar[str] = "vacc-kv8"

    scales: str = option("", "file of KV scales; needed")
    context: int = option(8192, "capacity of the KV buffers and of the rotary tables, in tokens")
    tp: int = option(1, "number of ranks")

    def text(self) -> str:
        """kv8 itself refuses to run without scales."""
        context = f"{{context={self.context}}}"
        recognized = f"vacc-recognize{context},vacc-interface{context}"
        return f'{recognized},w8a16,kv8{{scales="{self.scales}"}},split-tp{{tp={self.tp}}},fuse-residual-norm,legalize'


PRESETS: dict[str, type[Preset]] = {cls.name: cls for cls in (Recognize, Interface, Default, Kv8)}

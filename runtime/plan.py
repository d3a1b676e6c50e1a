"""The plan of a compilation: what the configuration asks for, checked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from vacc_opt.frontends import load_config, open_checkpoint
from vacc_opt.frontends.checkpoint import resolve_path
from vacc_opt.frontends.vamc_config import BLOCK, CompileConfig, line_of
from vacc_opt.ir.errors import UserError
from vacc_opt.passes.infra import presets
from vacc_opt.runtime.entry_points import PREFILL, EntryPoint, entry_points
from vacc_opt.runtime.files import sha256

POSITIONS = ("max_position_embeddings", "seq_length", "model_max_length")  # what families call it in config.json
SCALES_FILE, CODES_FILE, RANGES_FILE = "kv_scales.safetensors", "gptq_codes.safetensors", "fp16_ranges.safetensors"


@dataclass(frozen=True)
class Places:
    """Where a value of the configuration was given, for messages."""

    file: Path
    overrides: Sequence[str]

    def of(self, dotted: str) -> str:
        """``FILE:LINE`` of a dotted key, or of the nearest section above it; ``-D KEY=VALUE`` when that set it."""
        for override in reversed(self.overrides):
            key = override.partition("=")[0].strip()
            if dotted == key or dotted.startswith(f"{key}."):
                return f"-D {override}"
        node: Any = YAML(typ="rt").load(self.file.read_text(encoding="utf-8"))
        line: int | None = None
        for part in dotted.split("."):
            if not hasattr(node, "lc") or part not in node:  # only a section knows lines
                break
            line = line_of(node.lc, part)
            node = node[part]
        return str(self.file) if line is None else f"{self.file}:{line}"


@dataclass(frozen=True)
class Plan:
    """A configuration that can be compiled."""

    config: CompileConfig
    model: Mapping[str, Any]
    tp: int
    weights_int8: bool
    cache_int8: bool
    half: bool

    @property
    def output(self) -> Path:
        """Directory of the artifact."""
        return self.config.output

    @property
    def entry_points(self) -> tuple[EntryPoint, ...]:
        """What the artifact can be called with, prefill first."""
        shape = self.config.frontend.shape
        return entry_points(shape.prefills, shape.contexts)

    @property
    def contexts(self) -> tuple[int, ...]:
        """Tokens that KV buffers can hold, ascending."""
        return tuple(sorted({one.context for one in self.entry_points}))

    @property
    def context(self) -> int:
        """Tokens that the largest KV buffers hold."""
        return self.contexts[-1]

    @property
    def recognize(self) -> str:
        """The pipeline up to where calibration observes the model."""
        return presets.Recognize(self.context).text()

    @property
    def interface(self) -> str:
        """The pipeline that gives the model fixed buffers."""
        return presets.Interface(self.context, several=len(self.contexts) > 1).text()

    @property
    def gptq(self) -> bool:
        """The int8 codes come from GPTQ."""
        quantize = self.config.frontend.quantize
        return self.weights_int8 and quantize is not None and quantize.gptq

    @property
    def kv_scales(self) -> Path | None:
        """The file of KV scales that the configuration or the model's config.json names."""
        quantize = self.config.frontend.quantize
        if not self.cache_int8 or quantize is None:
            return None
        if quantize.kv_scales is not None:
            return Path(quantize.kv_scales)
        named = self.model.get("kv_cache_path")
        return resolve_path(self.config.frontend.checkpoint) / str(named) if named else None

    @property
    def calibrates(self) -> bool:
        """Something is to be learned from calibration text."""
        return self.gptq or self.guarded or (self.cache_int8 and self.kv_scales is None)

    @property
    def guarded(self) -> bool:
        """Values that would overflow in fp16 are to be found and made smaller."""
        return self.half and self.config.backend.guard_fp16_range

    def quantize(self, scales: str, codes: str = "", ranges: str = "") -> str:
        """The pipeline that lowers precision, after what may change weights before; empty for fp32.

        Without codes weights are rounded to nearest, and without ranges no value is guarded: the sizes are the same.
        """
        passes = ["fold-norm-weight"] if self.config.backend.fold_norm_weights else []
        passes += [f'w8a16{{codes="{codes}"}}' if codes else "w8a16"] if self.weights_int8 else []
        if self.cache_int8:
            assert self.config.frontend.quantize is not None
            new = self.config.frontend.quantize.kv_args.new_tokens.replace("quantised", "quantized")
            passes.append(f'kv8{{scales="{scales}"{"" if new == "float" else f",new_tokens={new}"}}}')
        if ranges:
            passes.append(f'guard-fp16-range{{ranges="{ranges}"}}')
        if self.half:
            passes.append("cast-float")
        return ",".join(passes)

    @property
    def split(self) -> str:
        """The pipeline that splits over ranks and checks for kernels."""
        return f"split-tp{{tp={self.tp}}},fuse-residual-norm,legalize"

    @property
    def specialize(self) -> str:
        """The pipeline that takes a graph for each entry point."""
        return ",".join(self._scope(one) for one in self.entry_points)

    def _scope(self, entry: EntryPoint) -> str:
        prefill = entry.kind == PREFILL
        options = [f"seq={entry.tokens}"] if prefill else []
        options += [f"context={entry.context}"] if len(self.contexts) > 1 else []
        options += [f"label={entry.name}"] if entry.name != entry.kind else []
        passes = ["sequence-parallel"] if prefill and self.tp > 1 and self.config.backend.sequence_parallel else []
        given = f"{{{','.join(options)}}}" if options else ""
        return f"{entry.kind}{given}({','.join([*passes, 'simplify'])})"

    @property
    def pipeline(self) -> str:
        """All of it as one text; the scales are the file of the artifact."""
        parts = (
            self.recognize,
            self.interface,
            self.quantize(SCALES_FILE, CODES_FILE if self.gptq else "", RANGES_FILE if self.guarded else ""),
            self.split,
            self.specialize,
        )
        return ",".join(part for part in parts if part)


def plan_compilation(file: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read and check the configuration against the checkpoint's header and this version's abilities.

    Raises:
        UserError: the checkpoint is missing or damaged, tp exceeds the query heads, a length does not fit the model, or
            the quantization is not supported; the message says where in the file.
    """
    config = load_config(file, list(overrides))
    place = Places(file, overrides)
    quantize = config.frontend.quantize
    model = open_checkpoint(config.frontend.checkpoint).config if config.frontend.type == "huggingface" else {}
    _check_tp(config, model, place)
    _check_support(config, place)
    quantized = config.backend.dtype != "fp32" and quantize is not None
    plan = Plan(
        config=config,
        model=model,
        tp=config.frontend.model_kwargs.tp,
        weights_int8=quantized and quantize is not None and quantize.weights,
        cache_int8=quantized and quantize is not None and quantize.cache,
        half=config.backend.dtype != "fp32",
    )
    _check_folding(plan, place)
    _check_calibration(plan, place)
    _check_context(plan, place)
    return plan


def _check_tp(config: CompileConfig, model: Mapping[str, Any], place: Places) -> None:
    tp, heads = config.frontend.model_kwargs.tp, model.get("num_attention_heads")
    if isinstance(heads, int) and tp > heads:
        where = place.of("frontend.model_kwargs.tp")
        raise UserError(
            f"{where}: frontend.model_kwargs.tp = {tp}, but the model has {heads} query heads",
            f"the largest tp is {heads}",
        )
    uneven = [length for length in config.frontend.shape.prefills if length % tp]
    if config.backend.sequence_parallel and uneven:
        length = uneven[0]
        raise UserError(
            f"{place.of('backend.sequence_parallel')}: {length} tokens of a prefill are not in {tp} equal parts",
            f"the next length that is: {length + tp * 16 - length % (tp * 16)} in frontend.shape.input_ids",
        )


def _check_support(config: CompileConfig, place: Places) -> None:
    quantize = config.frontend.quantize
    if config.backend.dtype == "int8" and quantize is None:
        raise UserError(
            f"{place.of('backend.dtype')}: backend.dtype = int8, but nothing says what to quantize",
            "add `frontend.quantize.type: w8kv8`, or use `backend.dtype: fp32`",
        )


def _check_folding(plan: Plan, place: Places) -> None:
    """GPTQ has seen other weights, and the profile of ranges other values, than folding leaves."""
    if plan.config.backend.fold_norm_weights and (plan.gptq or plan.guarded):
        other = "frontend.quantize.type: w8a16" if plan.gptq else "backend.guard_fp16_range: false"
        what = "GPTQ rounds the weights as they are" if plan.gptq else "guard_fp16_range profiles the norms as they are"
        where = place.of("backend.fold_norm_weights")
        raise UserError(f"{where}: backend.fold_norm_weights = true, but {what}", f"use {other}, or do not fold")


def _check_calibration(plan: Plan, place: Places) -> None:
    dataset, scales = plan.config.dataset, plan.kv_scales
    if scales is not None and not scales.is_file():
        quantize = plan.config.frontend.quantize
        where = place.of("frontend.quantize.kv_scales" if quantize and quantize.kv_scales else "frontend.checkpoint")
        raise UserError(f"{where}: {scales}: no such file of KV scales", "remove the key to calibrate")
    if not plan.calibrates:
        return
    if dataset is None:
        scaled = plan.cache_int8 and plan.kv_scales is None and not plan.gptq
        where = place.of("frontend.quantize.type" if scaled or plan.gptq else "backend.guard_fp16_range")
        what = "an int8 KV cache needs scales" if scaled else "GPTQ needs text" if plan.gptq else "ranges need text"
        raise UserError(
            f"{where}: {what}, and there is no `dataset` to calibrate on",
            "add `dataset.path`" + (", or name a file in `frontend.quantize.kv_scales`" if scaled else ""),
        )
    if not Path(dataset.path).exists():
        raise UserError(
            f"{place.of('dataset.path')}: {dataset.path}: no such file", f"it is text of the form {dataset.name}"
        )


def _check_context(plan: Plan, place: Places) -> None:
    largest = next((plan.model[key] for key in POSITIONS if isinstance(plan.model.get(key), int)), None)
    if largest is not None and plan.context > largest:
        raise UserError(
            f"{place.of('frontend.shape.input_ids')}: context {plan.context}, but the model was trained for "
            f"{largest} positions",
            f"at most {largest // BLOCK * BLOCK}",
        )


def input_facts(plan: Plan) -> dict[str, Any]:
    """What the artifact records of its inputs: no path of this machine, but digests of the small files."""
    config = plan.config.model_dump(mode="json", exclude={"workspace"}, exclude_none=True)
    checkpoint = plan.config.frontend.checkpoint
    if not checkpoint.startswith("package:"):
        config["frontend"]["checkpoint"] = Path(checkpoint).name
    config["backend"]["target"] = Path(plan.config.backend.target).name
    scales = plan.config.frontend.quantize.kv_scales if plan.config.frontend.quantize is not None else None
    if scales is not None:
        config["frontend"]["quantize"]["kv_scales"] = Path(scales).name
    if plan.config.dataset is not None:
        config["dataset"]["path"] = Path(plan.config.dataset.path).name
        if plan.calibrates and Path(plan.config.dataset.path).is_file():
            config["dataset"]["sha256"] = sha256(Path(plan.config.dataset.path))
    return {"config": config, "pipeline": plan.pipeline}

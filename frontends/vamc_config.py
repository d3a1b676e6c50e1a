"""The compile configuration: the upstream YAML schema (every key of it), checked, with file and line in each message.

Ours are ``frontend.attention``, ``frontend.trust_remote_code``, ``frontend.quantize.{kv_scales,kv_args}``, what is in
``calib_args`` beside ``true_sequential``, ``dataset.seed`` and
``backend.{target,guard_fp16_range,sequence_parallel,fold_norm_weights}``; keys that steer only the closed compiler are
accepted, and ``config_notes.py`` says what they mean here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from vacc_opt.frontends.config_errors import Locations, describe_error, describe_errors
from vacc_opt.ir.errors import UserError, first_line

QuantizeType = Literal["w8a16", "w8a16_gptq", "w16kv8", "w8kv8", "w8kv8_gptq"]
BLOCK = 16  # upstream: every sequence length is a multiple of this


def _multiple_of_block(length: int) -> int:
    if length <= 0 or length % BLOCK:
        below = length // BLOCK * BLOCK
        nearest = f"{below} or {below + BLOCK}" if below > 0 else f"{BLOCK}"
        raise ValueError(f"{length} is not a positive multiple of {BLOCK}; the nearest is {nearest}")
    return length


Length = Annotated[int, AfterValidator(_multiple_of_block)]


class _Section(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Shape(_Section):
    """``input_ids: [[prefill lengths], [decode contexts]]``, multiples of 16; ``[[512], []]`` has no decode phase.

    Upstream writes one of each, ``[[1024], [2048]]``. With several, as in ``[[256, 1024], [2048, 4096]]``, there is a
    decode for each context and a prefill for each length and each context that holds it, over the same weights.
    """

    input_ids: list[list[Length]]

    @field_validator("input_ids", mode="after")
    @classmethod
    def _fits(cls, rows: list[list[int]]) -> list[list[int]]:
        if not rows or not rows[0]:
            raise ValueError("input_ids needs a prefill length; as in [[1024], [2048]]")
        if len(rows) > 2:
            nearest = [[n for row in rows[:-1] for n in row], rows[-1]]
            raise ValueError(
                f"{len(rows)} lists, and there are two: prefill lengths and contexts; the nearest is {nearest}"
            )
        for what, row in zip(("prefill length", "decode context"), rows, strict=False):
            twice = next((n for n in row if row.count(n) > 1), None)
            if twice is not None:
                raise ValueError(f"the {what} {twice} is given twice; the nearest is {sorted(set(row))}")
        prefills, contexts = rows[0], rows[1] if len(rows) == 2 else []
        # every length needs a context that holds it, every context a length that it holds
        pairs = [(max(contexts), max(prefills)), (min(contexts), min(prefills))] if contexts else []
        for context, prefill in pairs:
            if context < prefill:
                raise ValueError(
                    f"the decode context {context} is shorter than the prefill length {prefill}; "
                    f"the nearest are a context of {prefill} and a prefill length of {context}"
                )
        return rows

    @property
    def prefills(self) -> tuple[int, ...]:
        """Tokens of one prefill call, ascending."""
        return tuple(sorted(self.input_ids[0]))

    @property
    def contexts(self) -> tuple[int, ...]:
        """Total lengths that decode reaches, ascending; empty for a model without a decode phase."""
        return tuple(sorted(self.input_ids[1])) if len(self.input_ids) == 2 else ()


class ModelKwargs(_Section):
    """How the model is laid out over the ranks.

    ``align_qkv`` is accepted and answered: heads are aligned whenever they do not divide, and ``compile`` says so.
    """

    tp: int = Field(1, ge=1, le=1024)
    b2s: bool = True
    model_arch: Literal["vacc"] = "vacc"
    align_qkv: bool = False
    enable_kv_share: bool = False
    build_visual: bool = False


class CalibArgs(_Section):
    """Options of GPTQ: ``damping`` is a share of the mean diagonal of the Hessian."""

    true_sequential: bool = False
    damping: float = Field(0.01, gt=0, le=1)
    act_order: bool = True


class KvArgs(_Section):
    """Options of the int8 KV cache: see the pass kv8 and ``calibration/kv_scales.py``."""

    symmetric: bool = False
    envelope: bool = True
    new_tokens: Literal["float", "quantised", "quantized"] = "float"


class Quantize(_Section):
    """Quantization of weights (``w8``) and of the KV cache (``kv8``)."""

    type: QuantizeType
    device: str = "cpu"
    calib_args: CalibArgs = CalibArgs()
    kv_args: KvArgs = KvArgs()
    kv_scales: str | None = None

    @property
    def weights(self) -> bool:
        """Weights become int8."""
        return self.type.startswith("w8")

    @property
    def cache(self) -> bool:
        """The KV cache becomes int8."""
        return "kv8" in self.type

    @property
    def gptq(self) -> bool:
        """Codes come from GPTQ and not from rounding to nearest."""
        return self.type.endswith("_gptq")


class Frontend(_Section):
    """Where the model comes from."""

    checkpoint: str
    type: Literal["huggingface", "onnx"] = "huggingface"
    attention: Literal["eager", "sdpa"] = "eager"
    trust_remote_code: bool = False
    shape: Shape
    model_kwargs: ModelKwargs = ModelKwargs()
    quantize: Quantize | None = None


class BackendCompile(_Section):
    """Switches of the closed backend; read and not used."""

    data_type: Literal[0] = 0
    gather_data_vccl_dsp_enable: bool = False
    attention_split_num: int | None = None
    ffn_split_num: int | None = None
    stream_mode: int | bool | None = None
    cluster_mode: int | None = None
    output_layout: list[str] | dict[str, str] | str | None = None
    data_transport_mode: int | None = None
    llm_build: bool | int | None = None
    fullatt_block_indexes: list[int] | None = None


class BackendQuantize(_Section):
    """Activation calibration of encoder models; read and not used."""

    calibrate_mode: Literal["max", "percentile", "kl_divergence", "mse"] = "max"
    quantize_per_channel: bool = False
    overflow_adaptive: bool | int = False
    calibrate_range: float | int | list[float] | None = None
    calibrate_chunk_by: int | None = None
    skip_conv_layers: list[int] | None = None
    weight_scale: str | None = None


class Backend(_Section):
    """What is produced, and for which machine."""

    type: Literal["tvm_vacc"] = "tvm_vacc"
    dtype: Literal["fp16", "int8", "fp32"] = "fp16"
    target: str = "vacc-reference"
    guard_fp16_range: bool = False
    sequence_parallel: bool = False
    fold_norm_weights: bool = False
    merge_params: bool = True
    remove_params: bool = False
    compile: BackendCompile = BackendCompile()
    quantize: BackendQuantize | None = None


class Sampler(_Section):
    """Which files of a data set are taken."""

    suffix: str | None = None
    get_data_num: int | None = Field(None, ge=1)


class Dataset(_Section):
    """Calibration text: ``nsamples`` sequences of ``seqlen`` tokens."""

    type: Literal["huggingface"] = "huggingface"
    name: Literal["alpaca", "c4", "ceval", "text", "jsonl"] = "alpaca"
    path: str
    nsamples: int = Field(128, ge=1)
    seqlen: int = Field(512, ge=1)
    seed: int = 0
    sampler: Sampler | None = None


class PyEnv(_Section):
    """Versions that upstream installs for one model; read and not used."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    transformers: str | float | None = None
    huggingface_hub: str | float | None = Field(None, alias="huggingface-hub")


class Workspace(_Section):
    """Where the artifact goes: ``path/name``."""

    path: Annotated[str, AfterValidator(os.path.expanduser)] = "./vacc_deploy"
    workers: int = Field(2, ge=1)  # prefill and decode; on one core they take turns
    pyenv: PyEnv | None = None
    env_recheck: bool = False


class CompileConfig(_Section):
    """One model to compile."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    frontend: Frontend
    backend: Backend = Backend()
    dataset: Dataset | None = None
    workspace: Workspace = Workspace()

    @property
    def output(self) -> Path:
        """Directory of the artifact."""
        return Path(self.workspace.path) / self.name


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> CompileConfig:
    """Read and check a YAML file; ``overrides`` are ``dotted.key=value`` with a YAML value.

    Raises UserError with ``file:line``, the dotted key, what is wrong, and the nearest valid choice.
    """
    data, locations = read_config(path, overrides)
    try:
        return CompileConfig.model_validate(data)
    except ValidationError as error:
        raise describe_error(error, CompileConfig, locations) from error


def read_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Locations]:
    """The file as plain values, unchecked, and the line of each key; raises UserError for what is no mapping."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such configuration file", "give the path of a .yaml file")
    data, locations = _read(file)
    for override in overrides:
        _apply(data, override, locations)
    return data, locations


def mistakes(data: Mapping[str, Any], locations: Locations) -> list[UserError]:
    """Everything that the schema has against a configuration, by line; empty when it can be used."""
    try:
        CompileConfig.model_validate(data)
    except ValidationError as error:
        return describe_errors(error, CompileConfig, locations)
    return []


def _read(file: Path) -> tuple[dict[str, Any], Locations]:
    try:
        tree = YAML(typ="rt").load(file.read_text())
    except (YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark is not None else str(file)
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{where}: not valid YAML: {problem}", "check the indentation and the quotes") from error
    if not isinstance(tree, Mapping):
        raise UserError(f"{file}: not a configuration: the top level is not a mapping", "it begins with `name: ...`")
    lines: dict[tuple[str | int, ...], int] = {}
    return _plain(tree, (), lines), Locations(str(file), lines)


def _plain(node: Any, path: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int]) -> Any:
    """Plain Python values; the line of every key and list entry goes to ``lines``."""
    position = getattr(node, "lc", None)
    if isinstance(node, Mapping):
        for key in node:
            lines[(*path, str(key))] = line_of(position, key)
        return {str(key): _plain(value, (*path, str(key)), lines) for key, value in node.items()}
    if isinstance(node, list):
        for i in range(len(node)):
            lines[(*path, i)] = line_of(position, i)
        return [_plain(value, (*path, i), lines) for i, value in enumerate(node)]
    for kind in (bool, int, float, str):  # ruamel's scalars are subclasses that remember their spelling
        if isinstance(node, kind):
            return kind(node)
    return node


def line_of(position: Any, key: Any) -> int:
    """The line of a key or entry, from 1; of one that `<<: *anchor` brings in, its mapping's; 0 where none is known."""
    if position is None:
        return 0
    place = (position.data or {}).get(key)
    return int(position.line if place is None else place[0]) + 1


def _apply(data: dict[str, Any], override: str, locations: Locations) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"-D {override}: not of the form `dotted.key=value`", "as in `frontend.model_kwargs.tp=2`")
    try:
        value = _plain(YAML(typ="rt").load(text), (), {})
    except YAMLError as error:
        raise UserError(f"-D {override}: the value is not valid YAML", "quote it") from error
    section = data
    for depth, part in enumerate(parts[:-1]):
        inner = section.setdefault(part, {})
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise UserError(f"-D {override}: {'.'.join(parts[: depth + 1])} is not a section")
        section = inner
    section[parts[-1]] = value
    locations.overridden[tuple(parts)] = override

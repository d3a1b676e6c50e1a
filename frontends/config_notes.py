"""What keys of the upstream schema mean here where they do not mean what they mean upstream: one table, printed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel

from vacc_opt.frontends.vamc_config import CompileConfig

_TILING = "the tiling of each kernel is searched, and the report shows it"
_SCHEDULE = "the schedule decides it from the target file"
_ENCODER = "activations stay in floating point, so nothing of this calibration applies"
_ENVIRONMENT = "one environment serves every family; nothing is installed"
_SEVERAL = "prefill lengths, then contexts: a schedule for each pair, over one file of weights a rank"
# a section stands for all keys below it
MEANINGS = {
    "frontend.model_kwargs.b2s": "batch and sequence are one dimension of each matrix product, with or without it",
    "frontend.model_kwargs.model_arch": "the model's own code is exported; no modeling_vacc.py is looked for",
    "frontend.model_kwargs.enable_kv_share": "query heads share the KV head of their group, always",
    "frontend.model_kwargs.build_visual": "the language model is compiled; a visual part is not built",
    "frontend.quantize.device": "GPTQ runs there where torch finds it, else on the CPU",
    "backend.merge_params": "weights are stored once for both phases, always",
    "backend.remove_params": "an artifact keeps its weights, one file a rank",
    "backend.compile.data_type": "0 is floating point; `backend.dtype` says which",
    "backend.compile.gather_data_vccl_dsp_enable": "all-gather runs on the link engine of the schedule, always",
    "backend.compile.attention_split_num": _TILING,
    "backend.compile.ffn_split_num": _TILING,
    "backend.compile.stream_mode": _SCHEDULE,
    "backend.compile.cluster_mode": _SCHEDULE,
    "backend.compile.data_transport_mode": _SCHEDULE,
    "backend.compile.output_layout": "logits are row-major; layouts are strides of the schedule's copies",
    "backend.compile.llm_build": "what is compiled is a language model, always",
    "backend.compile.fullatt_block_indexes": "blocks of a visual part, which is not built",
    "backend.quantize": _ENCODER,
    "dataset.sampler": "`dataset.nsamples` says how much text is read",
    "workspace.pyenv": _ENVIRONMENT,
    "workspace.env_recheck": _ENVIRONMENT,
}


def keys(model: type[BaseModel] = CompileConfig, above: str = "") -> Iterator[str]:
    """Every dotted key of the schema that takes a value, as a file spells it."""
    for name, info in model.model_fields.items():
        dotted = above + (info.alias or name)
        section = next(
            (
                a
                for a in (info.annotation, *get_args(info.annotation))
                if isinstance(a, type) and issubclass(a, BaseModel)
            ),
            None,
        )
        if section is None:
            yield dotted
        else:
            yield from keys(section, f"{dotted}.")


def meaning(key: str) -> str | None:
    """What a key means here that is accepted with a note; None for one that means what it means upstream."""
    prefixes = [key.rsplit(".", count)[0] for count in range(key.count(".") + 1)]
    return next((MEANINGS[prefix] for prefix in prefixes if prefix in MEANINGS), None)


def notes(config: CompileConfig) -> list[tuple[str, str]]:
    """(``key: value``, meaning) of each key of the file that has a meaning of its own here."""
    shape = config.frontend.shape
    several = len(shape.prefills) > 1 or len(shape.contexts) > 1
    found = [(f"input_ids: {shape.input_ids}", _SEVERAL)] if several else []
    for key, value in _given(config, ""):
        if (text := meaning(key)) is not None:
            found.append((f"{key.rpartition('.')[2]}: {_yaml(value)}", text))
    return found


def _given(section: BaseModel, above: str) -> Iterator[tuple[str, object]]:
    for name, info in type(section).model_fields.items():
        if name not in section.model_fields_set:
            continue
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _given(value, f"{above}{name}.")
        else:
            yield above + (info.alias or name), value


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

"""Models whose code comes with the checkpoint: loaded from its directory alone, and only when a person asked for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vacc_opt.ir.errors import UserError, did_you_mean

_CONFIG = "AutoConfig"
_MODELS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")  # the last two is where ChatGLM2 names its own


def build_remote(config: Mapping[str, Any], attention: str, directory: Path) -> nn.Module:
    """The causal language model that ``auto_map`` of a config.json names, out of Python files in ``directory``.

    Raises:
        UserError: the entry or a file is missing, or the code fails under this version of transformers.
    """
    references = {key: str(value).split("--")[-1] for key, value in dict(config["auto_map"]).items()}
    model = next((references[name] for name in _MODELS if name in references), None)
    if model is None:
        hint = did_you_mean(_MODELS[0], references)
        raise UserError(f"config.json: auto_map names no {_MODELS[0]}, so there is no language model to export", hint)
    for reference in (model, references.get(_CONFIG)):
        file = f"{reference}".partition(".")[0] + ".py"
        if reference is not None and not (directory / file).is_file():
            raise UserError(f"{directory}: no {file}, which auto_map names", "copy it from where the weights are from")
    try:
        with _plain_python():
            parsed = _config_class(config, references, directory).from_dict(_plain(config))
            parsed.auto_map, parsed.name_or_path = {**references, _MODELS[0]: model}, str(directory)
            module: nn.Module = AutoModelForCausalLM.from_config(
                parsed, attn_implementation=attention, dtype=torch.float32, trust_remote_code=True
            )
        module.tie_weights()
    except UserError:
        raise
    except Exception as error:  # whatever foreign code raises
        message = f"{directory.name}: the code of the checkpoint failed: {type(error).__name__}: {error}"
        raise UserError(message, "it may be written for another version of transformers, or attention") from error
    return module


@contextmanager
def _plain_python() -> Iterator[None]:
    """Functions under ``torch.jit.script`` stay Python, which traces with symbolic sizes; ``skip_init`` just builds."""
    script, skip_init = torch.jit.script, nn.utils.skip_init
    torch.jit.script = lambda function, *_, **__: function
    nn.utils.skip_init = lambda module_class, *args, **kwargs: module_class(*args, **kwargs)  # weights are fake
    try:
        yield
    finally:
        torch.jit.script, nn.utils.skip_init = script, skip_init


def _config_class(config: Mapping[str, Any], references: Mapping[str, str], directory: Path) -> Any:
    if _CONFIG in references:
        return get_class_from_dynamic_module(references[_CONFIG], str(directory))
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"config.json: auto_map names no {_CONFIG}, and transformers knows no `{model_type}`")
    return CONFIG_MAPPING[model_type]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype", "dtype")}

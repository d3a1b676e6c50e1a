"""Build the unmodified module of a config: fake float32 parameters, real buffers, evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vacc_opt.frontends.models import find_own
from vacc_opt.frontends.remote_code import build_remote
from vacc_opt.ir.errors import UserError, did_you_mean

ATTENTION = ("eager", "sdpa")


def build_module(
    config: Mapping[str, Any], attention: str = "eager", code: Path | None = None
) -> tuple[nn.Module, FakeTensorMode]:
    """The causal language model of a config.json, and the fake mode that its parameters belong to.

    No weight memory is allocated. Code of the checkpoint runs only out of the directory ``code``; given one, it goes
    before our own definitions wherever ``auto_map`` names it. Raises UserError for an unknown architecture or
    attention.
    """
    if attention not in ATTENTION:
        raise UserError(f"unknown attention `{attention}`", did_you_mean(attention, ATTENTION))
    settings = dict(config)
    model_type = str(settings.pop("model_type", ""))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    if code is not None and "auto_map" in settings:
        with fake_parameters(mode), no_init_weights():
            return build_remote(config, attention, code).eval(), mode
    if (own := find_own(config)) is not None:
        with fake_parameters(mode), no_init_weights(), _fits(model_type):
            return own(config, attention).eval(), mode
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type not in CONFIG_MAPPING:
        hint = did_you_mean(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        if "auto_map" in settings:
            hint = (
                "its code comes with the checkpoint, and remote code is not run unless you say so: "
                "--trust-remote-code, or `frontend.trust_remote_code: true`"
            )
        elif not hint.startswith("did you mean"):
            hint = "transformers has no causal language model of that type"
        raise UserError(f"unknown architecture: model_type `{model_type}`", hint)
    for key in ("auto_map", "quantization_config", "torch_dtype", "dtype"):
        settings.pop(key, None)
    with fake_parameters(mode), no_init_weights(), _fits(model_type):
        parsed = CONFIG_MAPPING[model_type](**settings)
        module: nn.Module = AutoModelForCausalLM.from_config(
            parsed, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
        )
    module.tie_weights()
    return module.eval(), mode


@contextmanager
def _fits(model_type: str) -> Iterator[None]:
    """What building a module raises for sizes that are no sizes is a mistake of config.json."""
    try:
        yield
    except (TypeError, ValueError, KeyError, ArithmeticError, RuntimeError) as error:
        message = f"config.json does not fit a {model_type} model: {type(error).__name__}: {error}"
        raise UserError(message, "compare it with the original") from error


@contextmanager
def fake_parameters(mode: FakeTensorMode) -> Iterator[None]:
    """Every parameter that a module registers inside this block becomes a fake tensor of its shape and dtype."""
    register = nn.Module.register_parameter

    def register_fake(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            with mode:
                param = nn.Parameter(torch.empty(param.shape, dtype=param.dtype), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = register_fake
    try:
        yield
    finally:
        nn.Module.register_parameter = register

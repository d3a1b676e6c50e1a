"""Definitions of architectures that transformers does not ship, with the tensor names of their checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vacc_opt.frontends.models.aquila import Aquila
from vacc_opt.frontends.models.baichuan import Baichuan
from vacc_opt.frontends.models.chatglm import ChatGLM, ChatGLMConfig
from vacc_opt.frontends.models.internlm2 import InternLM2
from vacc_opt.frontends.models.internlm3 import InternLM3
from vacc_opt.frontends.models.mobillama import MobiLlama

__all__ = ["OWN", "Aquila", "Baichuan", "ChatGLM", "ChatGLMConfig", "InternLM2", "InternLM3", "MobiLlama", "find_own"]

Build = Callable[[Mapping[str, Any], str], nn.Module]

# architecture or model_type of config.json -> (config, attention) -> module; raises UserError for another structure
OWN: dict[str, Build] = {
    "InternLM2ForCausalLM": InternLM2.read,  # its first configs call themselves `internlm`, which is another model
    "MobiLlamaForCausalLM": MobiLlama.read,  # and these `llama`
    "aquila": Aquila.read,
    "baichuan": Baichuan.read,
    "chatglm": lambda config, attention: ChatGLM(ChatGLMConfig.read(config, attention)),
    "internlm2": InternLM2.read,
    "internlm3": InternLM3.read,
}


def find_own(config: Mapping[str, Any]) -> Build | None:
    """The definition for a config.json; an architecture goes before a model type, which it may share with another."""
    names = [*(config.get("architectures") or ()), config.get("model_type")]
    return next((OWN[name] for name in names if name in OWN), None)

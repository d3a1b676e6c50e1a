"""Definitions of architectures that transformers does not ship, with the tensor names of their checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vacc_opt.frontends.models.chatglm import ChatGLM, ChatGLMConfig

__all__ = ["OWN", "ChatGLM", "ChatGLMConfig"]

# model_type of config.json -> (config, attention) -> module; raises UserError for a config of another structure
OWN: dict[str, Callable[[Mapping[str, Any], str], nn.Module]] = {
    "chatglm": lambda config, attention: ChatGLM(ChatGLMConfig.read(config, attention)),
}

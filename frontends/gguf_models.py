"""What GGUF calls things, per architecture: config keys, tensor names, and the row order of query and key."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from vacc_opt.frontends.gguf_header import GgufHeader, GgufTensor
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.ir.tensor import Gguf, Source, Taken, TensorExpr

_CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
_TOKEN_KEYS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PLAIN = {"F64": "double", "F32": "float", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class GgufArchitecture:
    """How one GGUF architecture maps to a transformers model."""

    model_type: str
    class_name: str
    head_dim_key: str | None = None
    interleaved: bool = False  # llama.cpp stores query and key rows as (pair, half) for these


ARCHITECTURES = {
    "llama": GgufArchitecture("llama", "LlamaForCausalLM", "rope.dimension_count", interleaved=True),
    "qwen2": GgufArchitecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": GgufArchitecture("qwen3", "Qwen3ForCausalLM", "attention.key_length"),
}


def _architecture(header: GgufHeader) -> GgufArchitecture:
    name = header.architecture
    if name not in ARCHITECTURES:
        raise UserError(f"{header.path}: unknown GGUF architecture `{name}`", did_you_mean(name, ARCHITECTURES))
    return ARCHITECTURES[name]


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """The metadata as a config.json would write it; raises UserError when the file leaves something out."""
    arch = _architecture(header)
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if scaling != "none" or any(t.name.startswith("rope_freqs") for t in header.tensors):
        raise UserError(f"{header.path}: scaled rotary frequencies are not read from GGUF", "use the safetensors form")
    config: dict[str, Any] = {"architectures": [arch.class_name], "model_type": arch.model_type}
    keys = dict(_CONFIG_KEYS)
    if arch.head_dim_key:
        keys[arch.head_dim_key] = "head_dim"
    for key, name in keys.items():
        value = header.metadata.get(f"{header.architecture}.{key}")
        if value is not None:
            config[name] = value
    if "vocab_size" not in config:
        embeddings = [t.shape[0] for t in header.tensors if t.name == "token_embd.weight"]
        config.update(vocab_size=embeddings[0] if embeddings else None)
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    missing = sorted(set(_CONFIG_KEYS.values()) - {"rope_theta"} - {k for k, v in config.items() if v is not None})
    if missing:
        raise UserError(f"{header.path}: the header does not give {missing[0]}", "download the file again")
    config |= {
        name: header.metadata[f"tokenizer.ggml.{key}"]
        for key, name in _TOKEN_KEYS.items()
        if f"tokenizer.ggml.{key}" in header.metadata
    }
    config["tie_word_embeddings"] = all(t.name != "output.weight" for t in header.tensors)
    return config


def gguf_tensors(header: GgufHeader) -> dict[str, TensorExpr]:
    """The tensors by Hugging Face parameter name, dequantized lazily; raises UserError for a name we do not know."""
    arch, config = _architecture(header), gguf_config(header)
    heads = {"q_proj": int(config["num_attention_heads"]), "k_proj": int(config["num_key_value_heads"])}
    tensors: dict[str, TensorExpr] = {}
    for tensor in header.tensors:
        name = _parameter_name(header, tensor.name)
        expr = _expression(header, tensor)
        projection = name.split(".")[-2]
        if arch.interleaved and projection in heads:
            expr = Taken(expr, unpermuted_rows(expr.shape[0], heads[projection]))
        tensors[name] = expr
    return tensors


def _parameter_name(header: GgufHeader, name: str) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP_NAMES and suffix == "weight":
        return f"{_TOP_NAMES[stem]}.{suffix}"
    raise UserError(
        f"{header.path}: tensor {name} has no place in a {header.architecture} model",
        "the model is a variant of this architecture that is not supported",
    )


def _expression(header: GgufHeader, tensor: GgufTensor) -> TensorExpr:
    if tensor.kind in _PLAIN:
        return Source(str(header.path), tensor.offset, _PLAIN[tensor.kind], tensor.shape, tensor.name)
    if not dequantizes(tensor.kind):
        known = [kind for kind in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_1", "Q4_0") if dequantizes(kind)]
        raise UserError(
            f"{header.path}: tensor {tensor.name} is of type {tensor.kind}, which the gguf package cannot dequantize",
            f"use a file of {', '.join(known)}, or the safetensors form",
        )
    return Gguf(str(header.path), tensor.offset, tensor.kind, tensor.shape, tensor.name)


@cache
def dequantizes(kind: str) -> bool:
    """True for a GGML type that the gguf package can turn into float32; it is asked with one block of zeros."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    quantization = GGMLQuantizationType[kind]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[quantization][1]), np.uint8), quantization)
    except NotImplementedError:
        return False
    return True


@cache
def unpermuted_rows(rows: int, heads: int) -> tuple[int, ...]:
    """Where each Hugging Face row lies in a llama.cpp weight: row (head, half, pair) is stored at (head, pair, half).

    llama.cpp rotates neighboring rows, transformers the two halves of a head; its converter reorders accordingly.
    """
    pairs = rows // heads // 2
    return tuple((h * pairs + p) * 2 + half for h in range(heads) for half in range(2) for p in range(pairs))

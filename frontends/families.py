"""The model families that are supported: their published checkpoints, and a small config that keeps each structure.

This list is read by ``vacc-opt models``, by the tests, which export every config and hold the logits against torch,
and by the documentation. Head counts and names are those of the model cards on the checkpoints' pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LAYERS = 2  # of every small config


@dataclass(frozen=True)
class Structure:
    """Models of a family that differ in sizes only.

    ``config`` is a config.json of ``LAYERS`` layers and random weights. The counts say what the passes find in one
    layer: norms, rotated tensors, gated activations and packed projections.
    """

    checkpoints: str
    heads: str
    config: Mapping[str, Any]
    position: str = "rotary"
    norm: str = "RMSNorm"
    norms: int = 2
    gate: str = "SwiGLU"
    packed: int = 0
    also: str = ""

    @property
    def fused(self) -> dict[str, int]:
        """What recognition finds in the small config, by what it is: attention, rotary, norm, gate, packed."""
        found = {
            "attention": LAYERS,
            "rotary": 0 if self.position == "ALiBi" else 2 * LAYERS,
            "norm": self.norms * LAYERS + 1,
            "gate": LAYERS if self.gate.endswith("GLU") else 0,
            "packed": self.packed * LAYERS,
        }
        return {name: count for name, count in found.items() if count}

    @property
    def facts(self) -> dict[str, object]:
        """What the table of families says of the structure."""
        return {
            "checkpoints": self.checkpoints,
            "heads": self.heads,
            "model_type": self.config["model_type"],
            "position": self.position,
            "norm": self.norm,
            "gate": self.gate,
            "also": self.also,
            "fused": self.fused,
        }


@dataclass(frozen=True)
class Family:
    """A family under its upstream name."""

    name: str
    structures: tuple[Structure, ...]


def _config(model_type: str, q: int, kv: int, head_dim: int = 8, **changes: Any) -> dict[str, Any]:
    """A small config in the words of transformers."""
    common = {
        "vocab_size": 99,
        "hidden_size": q * head_dim,
        "intermediate_size": 72,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": q,
        "num_key_value_heads": kv,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return {"model_type": model_type, **common, **changes}


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_CHATGLM = {
    "model_type": "chatglm",
    "num_layers": LAYERS,
    "padded_vocab_size": 99,
    "hidden_size": 64,
    "ffn_hidden_size": 72,
    "kv_channels": 16,
    "num_attention_heads": 8,
    "multi_query_group_num": 2,
    "seq_length": 64,
}
_MISTRAL = _config("mistral", 8, 2, sliding_window=None, rope_theta=1e6)
_QWEN = _config("qwen2", 10, 2, rope_theta=1e6)
_TIED_QWEN = _config("qwen2", 14, 2, rope_theta=1e6, tie_word_embeddings=True)
_SCALED = _config("llama", 8, 2, rope_scaling=_LLAMA3, rope_theta=5e5)

FAMILIES = (
    Family("llama", (Structure("LLaMA-33B", "52/52", _config("llama", 13, 13)),)),
    Family(
        "llama2",
        (
            Structure("Llama-2-7B, 13B", "32/32, 40/40", _config("llama", 5, 5)),
            Structure("Llama-2-70B", "64/8", _config("llama", 8, 1)),
        ),
    ),
    Family(
        "llama3",
        (
            Structure("Meta-Llama-3-8B, 70B", "32/8, 64/8", _config("llama", 8, 2, rope_theta=5e5)),
            Structure("Llama-3.1, 3.3", "32/8, 64/8", _SCALED, position="rotary, llama3 scaling"),
            Structure(
                "Llama-3.2-1B, 3B",
                "32/8, 24/8",
                {**_SCALED, "num_attention_heads": 6, "head_dim": 16, "tie_word_embeddings": True},
                position="rotary, llama3 scaling",
                also="tied embeddings",
            ),
        ),
    ),
    Family(
        "tigerbot",
        (
            Structure("tigerbot-7b-chat", "32/32", _config("llama", 4, 4, vocab_size=101)),
            Structure(
                "tigerbot-13b-chat-v5",
                "40/40",
                _config("llama", 5, 5, vocab_size=101, rope_scaling={"rope_type": "dynamic", "factor": 8.0}),
                position="rotary, dynamic NTK",
            ),
        ),
    ),
    Family("yi", (Structure("Yi-6B, 9B, 34B", "32/4, 32/4, 56/8", _config("llama", 7, 1, rope_theta=5e6)),)),
    Family(
        "openbuddy",
        (
            Structure("openbuddy-mistral2-7b-v20.3", "32/8", _MISTRAL),
            Structure("openbuddy-qwen1.5-14b-v21.1", "40/40", {**_QWEN, "num_key_value_heads": 10}, also="QKV bias"),
            Structure("openbuddy-deepseek-67b-v18.1", "64/8", _config("llama", 16, 2)),
        ),
    ),
    Family(
        "deepseek_r1_distill",
        (
            Structure("DeepSeek-R1-Distill-Llama-8B, 70B", "32/8, 64/8", _SCALED, position="rotary, llama3 scaling"),
            Structure(
                "DeepSeek-R1-Distill-Qwen-1.5B to 32B",
                "12/2, 28/4, 40/8, 40/8",
                _config("qwen2", 6, 1),
                also="QKV bias",
            ),
        ),
    ),
    Family(
        "mistral",
        (
            Structure("Mistral-7B-Instruct-v0.2", "32/8", _MISTRAL),
            Structure(
                "Ministral-8B-Instruct-2410",
                "32/8",
                {**_MISTRAL, "sliding_window": 9, "head_dim": 16},
                also="sliding window",
            ),
        ),
    ),
    Family(
        "wizardlm", (Structure("WizardLM-2-7B", "32/8", {**_MISTRAL, "sliding_window": 11}, also="sliding window"),)
    ),
    Family(
        "qwen1.5",
        (
            Structure("Qwen1.5-0.5B", "16/16", {**_TIED_QWEN, "num_key_value_heads": 14}, also="QKV bias, tied"),
            Structure("Qwen1.5-1.8B to 72B", "20/20, 40/8, ...", {**_QWEN, "num_key_value_heads": 10}, also="QKV bias"),
            Structure("Qwen1.5-110B", "64/8", _config("qwen2", 8, 1), also="QKV bias"),
        ),
    ),
    Family(
        "qwen2",
        (
            Structure("Qwen2 and Qwen2.5, 0.5B to 3B", "14/2, 12/2, 16/2", _TIED_QWEN, also="QKV bias, tied"),
            Structure("Qwen2 and Qwen2.5, 7B to 72B", "28/4, 40/8, 64/8", _config("qwen2", 14, 2), also="QKV bias"),
        ),
    ),
    Family("qwq", (Structure("QwQ-32B", "40/8", _QWEN, also="QKV bias"),)),
    Family("skywork_or1", (Structure("Skywork-OR1-7B, Math-7B, 32B", "28/4, 40/8", _QWEN, also="QKV bias"),)),
    Family(
        "qwen3",
        (
            Structure(
                "Qwen3-0.6B to 4B",
                "16/8, 32/8",
                _config("qwen3", 4, 2, head_dim=16, hidden_size=40, tie_word_embeddings=True, rope_theta=1e6),
                norms=4,
                also="per-head norms of Q and K, tied",
            ),
            Structure(
                "Qwen3-8B", "32/8", _config("qwen3", 8, 2, head_dim=8), norms=4, also="per-head norms of Q and K"
            ),
        ),
    ),
    Family(
        "gemma",
        (
            Structure(
                "gemma-2b, 1.1-2b",
                "8/1",
                _config("gemma", 4, 1, head_dim=24, hidden_size=64, hidden_activation="gelu_pytorch_tanh"),
                norm="RMSNorm, 1 + w",
                gate="GeGLU",
                also="scaled embeddings, tied",
            ),
            Structure(
                "gemma-7b, 1.1-7b",
                "16/16",
                _config("gemma", 4, 4, head_dim=24, hidden_size=64, hidden_activation="gelu_pytorch_tanh"),
                norm="RMSNorm, 1 + w",
                gate="GeGLU",
                also="scaled embeddings, tied",
            ),
        ),
    ),
    Family(
        "phi",
        (
            Structure(
                "Phi-3-mini-4k-instruct",
                "32/32",
                _config("phi3", 4, 4, head_dim=12, sliding_window=13),
                packed=2,
                also="sliding window",
            ),
            Structure(
                "Phi-3-mini-128k-instruct",
                "32/32",
                _config(
                    "phi3",
                    4,
                    4,
                    head_dim=12,
                    sliding_window=None,
                    max_position_embeddings=256,
                    original_max_position_embeddings=64,
                    rope_scaling={
                        "type": "longrope",
                        "short_factor": [1.0, 1.01, 1.02, 1.03, 1.04, 1.05],
                        "long_factor": [1.1, 1.3, 1.7, 2.0, 3.0, 4.0],
                    },
                ),
                position="rotary, longrope",
                packed=2,
            ),
        ),
    ),
    Family(
        "falcon",
        (
            Structure(
                "falcon-7b-instruct",
                "71/1",
                {
                    "model_type": "falcon",
                    "vocab_size": 99,
                    "hidden_size": 88,
                    "num_hidden_layers": LAYERS,
                    "num_attention_heads": 11,
                    "multi_query": True,
                    "parallel_attn": True,
                    "new_decoder_architecture": False,
                    "bias": False,
                    "alibi": False,
                    "max_position_embeddings": 64,
                    "bos_token_id": 1,
                    "eos_token_id": 2,
                },
                norm="LayerNorm",
                norms=1,
                gate="GELU",
                packed=1,
                also="attention and MLP in parallel, tied",
            ),
        ),
    ),
    Family(
        "stablelm",
        (
            Structure(
                "stablelm-2-1_6b",
                "32/32",
                _config("stablelm", 4, 4, head_dim=16, partial_rotary_factor=0.25, use_qkv_bias=True),
                position="rotary, first quarter",
                norm="LayerNorm",
                also="QKV bias",
            ),
            Structure(
                "stablelm-2-12b",
                "32/8",
                _config(
                    "stablelm",
                    4,
                    2,
                    head_dim=16,
                    partial_rotary_factor=0.25,
                    qk_layernorm=True,
                    use_parallel_residual=True,
                ),
                position="rotary, first quarter",
                norm="LayerNorm",
                norms=3,
                also="per-head norms of Q and K, attention and MLP in parallel",
            ),
        ),
    ),
    Family("chatglm2", (Structure("chatglm2-6b", "32/2", _CHATGLM, "rotary, first half, interleaved", packed=2),)),
    Family("chatglm3", (Structure("chatglm3-6b", "32/2", _CHATGLM, "rotary, first half, interleaved", packed=2),)),
    Family(
        "chatglm4",
        (
            Structure(
                "glm-4-9b-hf",
                "32/2",
                _config("glm", 4, 2, head_dim=16, attention_bias=True, partial_rotary_factor=0.5),
                position="rotary, first half, interleaved",
                packed=1,
                also="QKV bias",
            ),
            Structure(
                "glm-4-9b, glm-4-9b-chat",
                "32/2",
                {**_CHATGLM, "rope_ratio": 500.0},
                "rotary, first half, interleaved, rope_ratio",
                packed=2,
                also="QKV bias",
            ),
        ),
    ),
    Family(
        "internlm2",
        (
            Structure(
                "internlm2-1_8b, 7b, 20b",
                "16/8, 32/8, 48/8",
                _config("internlm2", 6, 2, bias=False, rope_theta=1e6, hidden_act="silu"),
                packed=1,
                also="grouped QKV",
            ),
        ),
    ),
    Family(
        "internlm2_5",
        (
            Structure(
                "internlm2_5-1_8b, 7b, 20b",
                "16/8, 32/8, 48/8",
                _config(
                    "internlm2",
                    4,
                    2,
                    bias=False,
                    rope_theta=1e6,
                    hidden_act="silu",
                    rope_scaling={"type": "dynamic", "factor": 2.0},
                ),
                position="rotary, dynamic NTK",
                packed=1,
                also="grouped QKV",
            ),
        ),
    ),
    Family(
        "internlm3",
        (
            Structure(
                "internlm3-8b-instruct",
                "32/2",
                _config(
                    "internlm3",
                    8,
                    2,
                    vocab_size=101,
                    head_dim=16,
                    bias=False,
                    qkv_bias=False,
                    rope_theta=5e7,
                    hidden_act="silu",
                    rope_scaling={"rope_type": "dynamic", "factor": 6.0},
                ),
                position="rotary, dynamic NTK",
            ),
        ),
    ),
    Family(
        "baichuan2",
        (
            Structure(
                "Baichuan2-7B",
                "32/32",
                _config("baichuan", 4, 4, model_max_length=64, hidden_act="silu"),
                packed=1,
                also="NormHead",
            ),
            Structure(
                "Baichuan2-13B",
                "40/40",
                _config("baichuan", 5, 5, model_max_length=64, hidden_act="silu", max_position_embeddings=None),
                position="ALiBi",
                packed=1,
                also="NormHead",
            ),
        ),
    ),
    Family(
        "aquila",
        (
            Structure("Aquila2-7B", "32/32", _config("aquila", 4, 4, hidden_act="silu"), also="scores limited to 1024"),
            Structure("Aquila2-34B", "48/8", _config("aquila", 6, 1, hidden_act="silu"), also="scores limited to 1024"),
        ),
    ),
    Family(
        "mobillama",
        (
            Structure(
                "MobiLlama-05B, 05B-Chat",
                "32/32",
                {
                    **_config("llama", 4, 4, hidden_act="silu"),
                    "architectures": ["MobiLlamaForCausalLM"],
                    "share_mlp": True,
                },
                also="one MLP for all layers",
            ),
            Structure(
                "MobiLlama-1B, 1B-Chat",
                "32/32",
                {
                    **_config("llama", 4, 4, hidden_act="silu"),
                    "architectures": ["MobiLlamaForCausalLM"],
                    "share_mlp": False,
                },
            ),
        ),
    ),
)


def structures() -> list[tuple[str, Structure]]:
    """Every structure under a name of its own: the family's, and its place in it where there are several."""
    return [
        (family.name if len(family.structures) == 1 else f"{family.name}-{index}", structure)
        for family in FAMILIES
        for index, structure in enumerate(family.structures, 1)
    ]

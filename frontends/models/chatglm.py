"""ChatGLM2, ChatGLM3 and GLM-4-9B: multi-query attention in [seq, batch, heads, D] order, half of a head in rotary.

The rotary is interleaved; ``rope_ratio`` multiplies its base (1 in ChatGLM2-6B, 500 in GLM-4-9B).
Parameters carry the names of the published checkpoints, so a checkpoint loads without renaming. The published model
attends in one of two ways that export differently: ``sdpa`` (the fused function) and ``bmm`` (batched matrix products).
Source: Zeng et al. 2023, "GLM-130B"; ChatGLM2-6B model card; Su et al. 2021, "RoFormer"; Shazeer 2019, "Fast
Transformer Decoding" (multi-query attention).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vacc_opt.frontends.models.calling import CalledLikeTransformers, Pair
from vacc_opt.ir.errors import UserError, did_you_mean

CORES = {"sdpa": "sdpa", "eager": "bmm"}  # by the names that transformers gives to kinds of attention code
# entries of a published config.json whose other values mean a structure that this module does not have
_EXPECTED = {
    "multi_query_attention": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "original_rope": True,
    "pre_seq_len": None,
}
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ChatGLMConfig:
    """The entries of a published config.json that decide the graph; the defaults are those of ChatGLM2-6B."""

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    multi_query_group_num: int = 2
    seq_length: int = 32768
    layernorm_epsilon: float = 1e-5
    add_qkv_bias: bool = True
    rope_ratio: float = 1.0
    core: str = "sdpa"

    @classmethod
    def read(cls, config: Mapping[str, Any], attention: str = "sdpa") -> ChatGLMConfig:
        """The structure that a config.json describes; raises UserError for one that this module does not have."""
        for key, expected in _EXPECTED.items():
            if config.get(key, expected) != expected:
                raise UserError(
                    f"config.json: {key} is {config[key]!r}, a ChatGLM2, ChatGLM3 or GLM-4 model has {expected!r}"
                )
        if config.get("quantization_bit", 0) not in (0, 8):  # 8: its weights are codes with scales beside them
            raise UserError(
                f"config.json: quantization_bit is {config['quantization_bit']!r}, 0 and 8 are read",
                "compile the float checkpoint; `frontend.quantize` makes it int8",
            )
        layers = config.get("num_layers", cls.num_layers)
        if config.get("num_hidden_layers", layers) != layers:
            raise UserError(
                f"config.json: num_layers is {layers!r}, but num_hidden_layers is {config['num_hidden_layers']!r}",
                "the number of layers in the checkpoint goes in both",
            )
        names = {f.name for f in fields(cls)} - {"core"}
        return cls(**{k: v for k, v in config.items() if k in names}, core=CORES[attention])

    def __post_init__(self) -> None:
        if self.core not in CORES.values():
            raise UserError(f"unknown core attention {self.core!r}", did_you_mean(self.core, CORES.values()))
        if self.num_attention_heads % self.multi_query_group_num:
            raise UserError(
                f"{self.num_attention_heads} query heads do not divide into {self.multi_query_group_num} KV groups"
            )

    @property
    def num_hidden_layers(self) -> int:
        """Layers, under the name that transformers uses."""
        return self.num_layers

    @property
    def num_key_value_heads(self) -> int:
        """KV heads, under the name that transformers uses."""
        return self.multi_query_group_num

    @property
    def head_dim(self) -> int:
        """Channels of a head, under the name that transformers uses."""
        return self.kv_channels


class RotaryTable(nn.Module):
    """cos and sin of every position, stacked: [positions, pairs, 2]; the first half of a head's channels is rotated."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        rotated = config.kv_channels // 2
        base = 10000.0 * config.rope_ratio
        self.register_buffer("inv_freq", base ** -(torch.arange(0, rotated, 2).float() / rotated))

    def forward(self, positions: int) -> torch.Tensor:
        """The table of positions 0 to ``positions`` - 1."""
        frequencies: Any = self.inv_freq
        angles = torch.outer(torch.arange(positions, dtype=frequencies.dtype), frequencies)
        return torch.stack([torch.cos(angles), torch.sin(angles)], dim=-1)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring channels (2i, 2i + 1) of ``x`` [seq, batch, heads, D] by the angles of ``table``.

    ``table`` [seq, batch, pairs, 2] has a row for each token; channels from 2 * pairs on pass through.
    """
    seq, heads, pairs = x.size(0), x.size(2), table.shape[-2]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    turned = turned.reshape(seq, -1, heads, pairs, 2)
    table = table.view(seq, -1, 1, pairs, 2)
    even, odd, cos, sin = turned[..., 0], turned[..., 1], table[..., 0], table[..., 1]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return torch.cat((turned.flatten(3), rest), dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square normalization, statistics in fp32."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.ones(config.hidden_size))
        self.eps: float = config.layernorm_epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Same shape and type as ``hidden``."""
        wide = hidden.double() if hidden.dtype is torch.float64 else hidden.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True)
        return (self.weight * (hidden * torch.rsqrt(variance + self.eps))).to(hidden.dtype)


def attend_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Attention of [seq, batch, heads, D] tensors by the fused function; ``hidden`` is true where a key is not seen."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    context = functional.scaled_dot_product_attention(query, key, value, ~hidden)
    return context.permute(2, 0, 1, 3)


def attend_bmm(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The same by matrix products over batch x heads, the scale folded into the first of them."""
    (seq, batch, heads, width), keys = query.shape, key.size(0)
    query = query.reshape(seq, batch * heads, width)
    key = key.reshape(keys, batch * heads, width)
    scores = torch.baddbmm(
        torch.empty(batch * heads, seq, keys, dtype=query.dtype),
        query.transpose(0, 1),
        key.transpose(0, 1).transpose(1, 2),
        beta=0.0,
        alpha=1.0 / math.sqrt(width),
    )
    scores = scores.view(batch, heads, seq, keys).masked_fill(hidden, float("-inf"))
    weights = functional.softmax(scores, dim=-1).view(batch * heads, seq, keys)
    context = torch.bmm(weights, value.reshape(keys, batch * heads, width).transpose(0, 1))
    return context.view(batch, heads, seq, width).permute(2, 0, 1, 3)


class SelfAttention(nn.Module):
    """Packed query, key and value with a bias; each KV group serves several query heads."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.heads: int = config.num_attention_heads
        self.groups: int = config.multi_query_group_num
        self.width: int = config.kv_channels
        projected = self.heads * self.width
        self.query_key_value: nn.Linear = nn.Linear(
            config.hidden_size, projected + 2 * self.groups * self.width, bias=config.add_qkv_bias
        )
        self.dense: nn.Linear = nn.Linear(projected, config.hidden_size, bias=False)
        self.attend: Attend = attend_sdpa if config.core == "sdpa" else attend_bmm

    def forward(
        self, x: torch.Tensor, hidden: torch.Tensor, table: torch.Tensor, past: Pair | None
    ) -> tuple[torch.Tensor, Pair]:
        """Attention output [seq, batch, hidden], and keys and values [past + seq, batch, groups, D]."""
        q_size, kv_size = self.heads * self.width, self.groups * self.width
        query, key, value = self.query_key_value(x).split([q_size, kv_size, kv_size], dim=-1)
        query = query.view(*query.size()[:-1], self.heads, self.width)
        key, value = (part.view(*part.size()[:-1], self.groups, self.width) for part in (key, value))
        query, key = rotate(query, table), rotate(key, table)
        if past is not None:
            key, value = torch.cat((past[0], key), dim=0), torch.cat((past[1], value), dim=0)
        context = self.attend(query, self._repeat(key), self._repeat(value), hidden)
        context = context.reshape(*context.size()[:-2], q_size)
        return self.dense(context), (key, value)

    def _repeat(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.unsqueeze(-2).expand(-1, -1, -1, self.heads // self.groups, -1)
        return wide.contiguous().view(*x.size()[:2], self.heads, self.width)


class MLP(nn.Module):
    """SwiGLU feed-forward block, gate and up packed into one projection."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h: nn.Linear = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h: nn.Linear = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[seq, batch, hidden] to the same."""
        gate, up = torch.chunk(self.dense_h_to_4h(x), 2, dim=-1)
        down: torch.Tensor = self.dense_4h_to_h(functional.silu(gate) * up)
        return down


class Block(nn.Module):
    """One decoder layer: norm, attention, residual, norm, feed-forward, residual."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.input_layernorm: RMSNorm = RMSNorm(config)
        self.self_attention: SelfAttention = SelfAttention(config)
        self.post_attention_layernorm: RMSNorm = RMSNorm(config)
        self.mlp: MLP = MLP(config)

    def forward(
        self, x: torch.Tensor, hidden: torch.Tensor, table: torch.Tensor, past: Pair | None
    ) -> tuple[torch.Tensor, Pair]:
        """The layer's output and its keys and values."""
        attended, present = self.self_attention(self.input_layernorm(x), hidden, table, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Encoder(nn.Module):
    """The layers and the final norm."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.layers: nn.ModuleList = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layernorm: RMSNorm = RMSNorm(config)


class Embedding(nn.Module):
    """Token embedding; a module of its own for the sake of its parameter's name."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings: nn.Embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Transformer(nn.Module):
    """Everything under the prefix ``transformer.`` of the checkpoints."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.positions: int = config.seq_length
        self.embedding: Embedding = Embedding(config)
        self.rotary_pos_emb: RotaryTable = RotaryTable(config)
        self.encoder: Encoder = Encoder(config)
        self.output_layer: nn.Linear = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: list[Pair]
    ) -> tuple[torch.Tensor, list[Pair]]:
        """Logits [batch, seq, vocabulary], and keys and values of each layer, [past + seq, batch, groups, D]."""
        hidden = hidden_keys(input_ids, attention_mask)
        table = self.rotary_pos_emb(self.positions)[position_ids].transpose(0, 1).contiguous()
        x = self.embedding.word_embeddings(input_ids).transpose(0, 1).contiguous()
        presents = []
        for index, layer in enumerate(self.encoder.layers):
            x, present = layer(x, hidden, table, past[index] if past else None)
            presents.append(present)
        logits = self.output_layer(self.encoder.final_layernorm(x))
        return logits.transpose(0, 1).contiguous(), presents


def hidden_keys(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """[batch, 1, seq, past + seq] bool, true where a query does not see a key: the future and padding.

    A query that is itself padding sees everything, so that no row of the softmax is empty.
    """
    batch, seq = input_ids.shape
    past = attention_mask.shape[1] - seq
    seen = torch.ones(batch, seq, seq).tril()
    seen = torch.cat((torch.ones(batch, seq, past), seen), dim=-1)
    keep = attention_mask.to(seen.dtype)
    seen = seen * keep.unsqueeze(1)
    seen = seen - (keep[:, past:].unsqueeze(-1) - 1)
    return (seen < 0.5).unsqueeze(1)


class ChatGLM(CalledLikeTransformers):
    """The causal language model; inside, a cache is [past, batch, groups, D]."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config: ChatGLMConfig = config
        self.transformer: Transformer = Transformer(config)

    def compute(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: list[Pair]
    ) -> tuple[torch.Tensor, list[Pair]]:
        """The transformer between a cache turned to its layout and back."""
        turned = [(key.permute(2, 0, 1, 3), value.permute(2, 0, 1, 3)) for key, value in past]
        logits, presents = self.transformer(input_ids, attention_mask, position_ids, turned)
        return logits, [(key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)) for key, value in presents]

"""The pre-norm decoder that several families share: RMSNorm, half-rotated rotary, grouped attention, SwiGLU.

A family says what its checkpoint calls the parts (``Names``), how it projects to queries, keys and values (a subclass
of ``Attention``) and, where it has them, its own head or bias. Tensors are [batch, heads, seq, D]. A module converted
by ``double()`` computes in float64 throughout; the rotary frequencies keep the float32 values of the published models.
Sources: Vaswani et al. 2017; Touvron et al. 2023, "LLaMA"; Zhang & Sennrich 2019, "Root Mean Square Layer
Normalization", eq. 4; Su et al. 2021, "RoFormer"; Shazeer 2020, "GLU Variants Improve Transformer".
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vacc_opt.frontends.models.calling import CalledLikeTransformers, Pair
from vacc_opt.frontends.models.structure import DecoderConfig, RopeScaling


@dataclass(frozen=True)
class Names:
    """What a checkpoint calls the parts of a decoder."""

    embedding: str = "embed_tokens"
    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
    output: str = "o_proj"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    head: str = "lm_head"


@dataclass(frozen=True)
class Context:
    """What all layers of one call share.

    ``cos`` and ``sin`` are [batch, 1, seq, D], absent without rotary; ``seen`` is [batch, 1, seq, past + seq], true
    where a query sees a key; ``bias`` is added to the scores, broadcast to [batch, heads, seq, past + seq].
    """

    seen: torch.Tensor
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class RMSNorm(nn.Module):
    """Root-mean-square normalization over the last axis, statistics in fp32 or wider."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.ones(size))
        self.eps: float = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Same shape and type as ``hidden``."""
        wide = hidden if hidden.dtype is torch.float64 else hidden.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


class Rotary(nn.Module):
    """cos and sin of rotary positions, for heads whose halves are turned against each other.

    ``linear`` divides positions by the factor (Chen et al. 2023, "Position Interpolation"). ``dynamic`` lets the base b
    grow once a call reaches a length n beyond the trained maximum m: b * (f * n / m - (f - 1)) ** (D / (D - 2)), the
    dynamic NTK formula that transformers documents for ``rope_type: dynamic``. Channel pair i then turns with
    b ** (-2i / D) * g ** (-2i / (D - 2)), where g = 1 + f * (max(n, m) - m) / m is exactly 1 up to length m.
    """

    def __init__(self, size: int, base: float, scaling: RopeScaling, maximum: int) -> None:
        super().__init__()
        self.size: int = size
        self.scaling: RopeScaling = scaling
        self.maximum: int = maximum
        even = torch.arange(0, size, 2, dtype=torch.int64).float()
        self.register_buffer("inv_freq", 1.0 / (base ** (even / size)), persistent=False)
        self.register_buffer("even", even, persistent=False)

    def forward(self, position_ids: torch.Tensor) -> Pair:
        """[batch, seq] to two of [batch, 1, seq, D]."""
        frequencies: Any = self.inv_freq
        positions = position_ids.to(frequencies.dtype)
        if self.scaling.kind == "linear":
            positions = positions / self.scaling.factor
        if self.scaling.kind == "dynamic":
            beyond = (positions.max() + 1 - self.maximum).clamp(min=0)
            growth = 1 + beyond * (self.scaling.factor / self.maximum)
            frequencies = frequencies * growth ** (self.even / (2 - self.size))
        angles = positions[:, None, :, None] * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn channels (i, i + D / 2) of ``x`` [batch, heads, seq, D] by the angle of pair i."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def seen_keys(attention_mask: torch.Tensor, seq: int) -> torch.Tensor:
    """[batch, 1, seq, past + seq] bool, true where a query sees a key: neither the future nor padding."""
    keys = torch.arange(attention_mask.shape[1])
    queries = torch.arange(seq) + (attention_mask.shape[1] - seq)
    causal = keys[None, :] <= queries[:, None]
    return causal[None, None] & attention_mask[:, None, None, :].bool()


def attend_eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context, clamp: float | None = None
) -> torch.Tensor:
    """Attention by two products: scale, clamp, bias, mask, softmax. A query that sees no key takes their mean."""
    scores = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(query.shape[-1])
    if clamp is not None:
        scores = scores.clamp(-clamp, clamp)
    return torch.matmul(functional.softmax(scores + _additive(context, scores.dtype), dim=-1), value)


def attend_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
    """Attention by the fused function, whose mask is boolean unless there is a bias to add."""
    mask = context.seen if context.bias is None else _additive(context, query.dtype)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _additive(context: Context, dtype: torch.dtype) -> torch.Tensor:
    """Zero or the bias where a key is seen; elsewhere the lowest number, so that an empty row is not 0 / 0."""
    bias = torch.zeros((), dtype=dtype) if context.bias is None else context.bias
    return torch.where(context.seen, bias, torch.finfo(dtype).min)


class Attention(nn.Module):
    """Causal attention of grouped queries; a subclass projects to queries, keys and values."""

    clamp: float | None = None  # bound of a score; torch's fused function has none, so such a model is always eager

    def __init__(self, config: DecoderConfig, names: Names) -> None:
        super().__init__()
        self.config: DecoderConfig = config
        self.names: Names = names
        size = config.num_attention_heads * config.head_dim
        self.add_module(names.output, nn.Linear(size, config.hidden_size, bias=config.output_bias))

    @abstractmethod
    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[batch, seq, hidden] to queries [batch, heads, seq, D], keys and values [batch, KV heads, seq, D]."""

    def forward(self, x: torch.Tensor, context: Context, past: Pair | None) -> tuple[torch.Tensor, Pair]:
        """Attention output [batch, seq, hidden], and keys and values [batch, KV heads, past + seq, D]."""
        query, key, value = self.project(x)
        if context.cos is not None and context.sin is not None:
            query, key = rotate(query, context.cos, context.sin), rotate(key, context.cos, context.sin)
        if past is not None:
            key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
        wide_key, wide_value = self._repeat(key), self._repeat(value)
        if self.config.attention == "eager" or self.clamp is not None:
            mixed = attend_eager(query, wide_key, wide_value, context, self.clamp)
        else:
            mixed = attend_sdpa(query, wide_key, wide_value, context)
        mixed = mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
        return getattr(self, self.names.output)(mixed), (key, value)

    def heads(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """[batch, seq, count * D] to [batch, count, seq, D]."""
        return x.view(x.shape[0], x.shape[1], count, self.config.head_dim).transpose(1, 2)

    def _repeat(self, x: torch.Tensor) -> torch.Tensor:
        if self.config.groups == 1:
            return x
        batch, heads, seq, size = x.shape
        wide = x[:, :, None].expand(batch, heads, self.config.groups, seq, size)
        return wide.reshape(batch, heads * self.config.groups, seq, size)


class SeparateAttention(Attention):
    """A projection each for queries, keys and values."""

    def __init__(self, config: DecoderConfig, names: Names) -> None:
        super().__init__(config, names)
        size, kv_size = (h * config.head_dim for h in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj: nn.Linear = nn.Linear(config.hidden_size, size, bias=config.qkv_bias)
        self.k_proj: nn.Linear = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj: nn.Linear = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Three products."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        return (
            self.heads(self.q_proj(x), heads),
            self.heads(self.k_proj(x), kv_heads),
            self.heads(self.v_proj(x), kv_heads),
        )


class MLP(nn.Module):
    """SwiGLU feed-forward block."""

    def __init__(self, config: DecoderConfig, names: Names) -> None:
        super().__init__()
        self.names: Names = names
        for name in (names.gate, names.up):
            self.add_module(name, nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias))
        self.add_module(names.down, nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, seq, hidden] to the same."""
        gate, up, down = (getattr(self, name) for name in (self.names.gate, self.names.up, self.names.down))
        result: torch.Tensor = down(functional.silu(gate(x)) * up(x))
        return result


class Layer(nn.Module):
    """One decoder layer: norm, attention, residual, norm, feed-forward, residual."""

    def __init__(self, config: DecoderConfig, names: Names, attention: Attention, mlp: nn.Module) -> None:
        super().__init__()
        self.names: Names = names
        self.add_module(names.attention_norm, RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.add_module(names.attention, attention)
        self.add_module(names.mlp_norm, RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.add_module(names.mlp, mlp)

    def forward(self, x: torch.Tensor, context: Context, past: Pair | None) -> tuple[torch.Tensor, Pair]:
        """The layer's output and its keys and values."""
        names = self.names
        attended, present = getattr(self, names.attention)(getattr(self, names.attention_norm)(x), context, past)
        x = x + attended
        return x + getattr(self, names.mlp)(getattr(self, names.mlp_norm)(x)), present


class Decoder(nn.Module):
    """Everything under the prefix ``model.`` of the checkpoints."""

    def __init__(
        self, config: DecoderConfig, names: Names, attention: type[Attention], mlp: nn.Module | None = None
    ) -> None:
        """``mlp`` serves every layer; without one, each has its own."""
        super().__init__()
        self.names: Names = names
        self.add_module(names.embedding, nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers: nn.ModuleList = nn.ModuleList(
            Layer(config, names, attention(config, names), mlp or MLP(config, names))
            for _ in range(config.num_hidden_layers)
        )
        self.norm: RMSNorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb: Rotary = Rotary(
            config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings
        )

    def context(self, attention_mask: torch.Tensor, position_ids: torch.Tensor) -> Context:
        """What the layers of this call share."""
        cos, sin = self.rotary_emb(position_ids)
        return Context(seen_keys(attention_mask, position_ids.shape[1]), cos, sin)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: list[Pair]
    ) -> tuple[torch.Tensor, list[Pair]]:
        """Normalized states [batch, seq, hidden], and keys and values of each layer."""
        context = self.context(attention_mask, position_ids)
        x = getattr(self, self.names.embedding)(input_ids)
        presents = []
        for index, layer in enumerate(self.layers):
            x, present = layer(x, context, past[index] if past else None)
            presents.append(present)
        return self.norm(x), presents


class CausalLM(CalledLikeTransformers):
    """A decoder with its head."""

    def __init__(self, config: DecoderConfig, names: Names, model: Decoder, head: nn.Module | None = None) -> None:
        super().__init__()
        self.config: DecoderConfig = config
        self.names: Names = names
        self.model: Decoder = model
        self.add_module(names.head, head or nn.Linear(config.hidden_size, config.vocab_size, bias=False))

    def compute(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: list[Pair]
    ) -> tuple[torch.Tensor, list[Pair]]:
        """The head over the normalized states."""
        hidden, presents = self.model(input_ids, attention_mask, position_ids, past)
        return getattr(self, self.names.head)(hidden), presents

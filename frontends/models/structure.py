"""The config.json of a decoder: the entries that decide the graph, checked, and an error that names a wrong one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vacc_opt.ir.errors import UserError, did_you_mean

ATTENTION = ("eager", "sdpa")
_SCALINGS = ("default", "dynamic", "linear")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change with length; ``kind`` is default, linear or dynamic."""

    kind: str = "default"
    factor: float = 1.0

    @classmethod
    def read(cls, entry: Any) -> RopeScaling:
        """The ``rope_scaling`` of a config.json, under either spelling of its type; null is the default."""
        if entry is None:
            return cls()
        if not isinstance(entry, Mapping):
            raise UserError(f"config.json: rope_scaling is {entry!r}, not an object or null")
        kind = entry.get("rope_type", entry.get("type", "default"))
        if kind not in _SCALINGS:
            raise UserError(f"config.json: rope_scaling.type is {kind!r}", did_you_mean(str(kind), _SCALINGS))
        factor = entry.get("factor", 1.0)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1:
            raise UserError(f"config.json: rope_scaling.factor is {factor!r}, not a number of 1 or more")
        return cls(kind, float(factor))


@dataclass(frozen=True)
class DecoderConfig:
    """The entries that decide the graph of a pre-norm decoder with SwiGLU, under the names of transformers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention: str = "sdpa"

    @property
    def groups(self) -> int:
        """Query heads that one KV head serves."""
        return self.num_attention_heads // self.num_key_value_heads


def read_decoder(
    config: Mapping[str, Any],
    attention: str,
    *,
    expected: Mapping[str, Iterable[Any]] | None = None,
    eps: float = 1e-6,
    theta: float = 10000.0,
    **structure: Any,
) -> DecoderConfig:
    """The structure that a config.json describes.

    Args:
        config: the entries of config.json.
        attention: ``eager`` or ``sdpa``.
        expected: entries with the values that the family has code for; one that is absent passes.
        eps: epsilon of the norms where the file names none.
        theta: base of the rotary frequencies where the file names none.
        structure: fields of DecoderConfig that the family decides.

    Raises:
        UserError: an entry is missing, or has a value that the family does not have; it names key, value and choice.
    """
    if attention not in ATTENTION:
        raise UserError(f"unknown attention `{attention}`", did_you_mean(attention, ATTENTION))
    check_entries(config, {"hidden_act": ("silu",), "tie_word_embeddings": (False,), **(expected or {})})
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    kv_heads = _count(config, "num_key_value_heads", structure.pop("num_key_value_heads", None) or heads)
    if heads % kv_heads:
        raise UserError(
            f"config.json: num_key_value_heads is {kv_heads}, which does not divide {heads} query heads",
            f"the nearest that does is {min(_divisors(heads), key=lambda d: abs(d - kv_heads))}",
        )
    if config.get("head_dim") is None and hidden % heads:
        raise UserError(f"config.json: hidden_size is {hidden}, which {heads} heads do not divide")
    head_dim = _count(config, "head_dim", hidden // heads)
    if head_dim % 2:
        raise UserError(f"config.json: a head has {head_dim} channels; rotary needs pairs", f"{head_dim + 1} is even")
    return DecoderConfig(
        vocab_size=_count(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_count(config, "intermediate_size"),
        num_hidden_layers=_count(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(config.get("rms_norm_eps", eps)),
        max_position_embeddings=_count(config, "max_position_embeddings", 2048),
        rope_theta=float(config.get("rope_theta", theta)),
        rope_scaling=RopeScaling.read(config.get("rope_scaling")),
        attention=attention,
        **structure,
    )


def check_entries(config: Mapping[str, Any], expected: Mapping[str, Iterable[Any]]) -> None:
    """Refuse the first entry whose value is none of those expected for its key."""
    for key, values in expected.items():
        choices = tuple(values)
        if key in config and config[key] not in choices:
            names = [str(choice) for choice in choices]
            raise UserError(f"config.json: {key} is {config[key]!r}", did_you_mean(str(config[key]), names))


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number of the config; null counts as absent."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise UserError(f"config.json: no `{key}`", did_you_mean(key, [str(name) for name in config]))
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"config.json: {key} is {value!r}, not a positive whole number")
    return value


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]

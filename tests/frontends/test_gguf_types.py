"""GGUF's quantized types: each reads, by tiles and in whole, what the gguf package makes of the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize

from vacc_opt.frontends import open_checkpoint
from vacc_opt.frontends.gguf_models import dequantizes
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.tensor import Gguf

TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
ROWS, COLUMNS = 48, 512


def packed(kind: str) -> np.ndarray:
    """Blocks of seeded bytes below 60, so that every fp16 scale in them is finite."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return np.random.default_rng(len(kind)).integers(0, 60, (ROWS, COLUMNS // block * size), np.uint8)


def write(path: Path, kind: str, blocks: np.ndarray) -> Path:
    """A llama of one tensor, as far as an opener looks."""
    writer = GGUFWriter(path, "llama")
    for key, value in {
        "context_length": 64,
        "block_count": 1,
        "feed_forward_length": 48,
        "embedding_length": COLUMNS,
        "attention.head_count": 4,
        "attention.head_count_kv": 4,
        "rope.dimension_count": 12,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=GGMLQuantizationType[kind])
    writer.add_tensor("blk.0.attn_q.weight", blocks, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", TYPES)
def test_a_type_is_dequantized_as_the_gguf_package_does(tmp_path: Path, kind: str) -> None:
    blocks = packed(kind)
    expected = dequantize(blocks, GGMLQuantizationType[kind])
    tensors = open_checkpoint(write(tmp_path / "m.gguf", kind, blocks)).tensors
    embedding = tensors["model.embed_tokens.weight"]
    assert isinstance(embedding, Gguf)
    assert np.isfinite(expected).all()
    assert len(np.unique(expected)) > 4
    np.testing.assert_array_equal(embedding.read(), expected)
    np.testing.assert_array_equal(embedding.read((slice(7, 20), slice(30, 300))), expected[7:20, 30:300])


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_rows_of_a_query_come_in_the_order_of_transformers(tmp_path: Path, kind: str) -> None:
    blocks = packed(kind)
    expected = dequantize(blocks, GGMLQuantizationType[kind]).reshape(4, 6, 2, COLUMNS).swapaxes(1, 2)
    query = open_checkpoint(write(tmp_path / "m.gguf", kind, blocks)).tensors["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(query.read(), expected.reshape(ROWS, COLUMNS))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_what_the_package_quantized_comes_back_within_a_step(tmp_path: Path, kind: str) -> None:
    from gguf.quants import quantize

    weight = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    blocks = quantize(weight, GGMLQuantizationType[kind])
    read = open_checkpoint(write(tmp_path / "m.gguf", kind, blocks)).tensors["model.embed_tokens.weight"].read()
    steps = 255 if kind == "Q8_0" else 15  # codes of 8 and of 4 bits over a range of twice the largest value
    assert np.abs(read - weight).max() <= 2 * np.abs(weight).max() / steps


def test_the_package_says_which_types_it_dequantizes() -> None:
    assert all(map(dequantizes, TYPES))
    assert not dequantizes("Q8_K")


def test_a_type_that_does_not_dequantize_is_refused_when_opened(tmp_path: Path) -> None:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType.Q8_K]
    blocks = np.zeros((ROWS, COLUMNS // block * size), np.uint8)
    with pytest.raises(UserError, match=r"token_embd.weight is of type Q8_K, .*\n  use a file of Q8_0, Q6_K"):
        open_checkpoint(write(tmp_path / "m.gguf", "Q8_K", blocks))

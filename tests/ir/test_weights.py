"""What a constant is made of: names out of weight files, formulas for people."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vacc_opt.ir.provenance import Origin
from vacc_opt.ir.storage import read_safetensors_header, write_safetensors
from vacc_opt.ir.tensor import (
    Casted,
    Codes,
    Concatenated,
    Gguf,
    Literal,
    Padded,
    PerRank,
    Scales,
    Sliced,
    Source,
    Taken,
    TensorExpr,
    Transposed,
    parse_expr,
)
from vacc_opt.ir.weights import formula, stored_parts, weight_origins

W = Source("/models/a.safetensors", 64, "bfloat16", (8, 4), "fc.weight")
Q = Gguf("/models/b.gguf", 0, "Q4_1", (64, 32), "blk.0.attn_q.weight")


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (W, "fc.weight"),
        (Source("/models/a.bin", 64, "float", (8, 4)), "a.bin@64"),
        (Codes(Casted(W, "float")), "codes(float(fc.weight))"),
        (Sliced(Scales(Q), (0,), (16,)), "scales(blk.0.attn_q.weight)[0:16]"),
        (Sliced(W, (0, 1), (8, 3)), "fc.weight[:, 1:3]"),
        (Taken(W, (4, 5, 6, -1, -1, 0)), "fc.weight[4:7, 2 zeros, 0:1]"),
        (Taken(W, (0, 2, 4, 6, 1, 3)), "fc.weight[6 rows reordered]"),
        (Transposed(W, (1, 0)), "fc.weight.T"),
        (Transposed(Source("f", 0, "float", (2, 3, 4), "t"), (2, 0, 1)), "transpose(t, [2, 0, 1])"),
        (Concatenated((W, W), 0), "concat(fc.weight, fc.weight, axis=0)"),
        (Padded(W, (16, 4)), "pad(fc.weight, [16, 4])"),
        (PerRank((Sliced(W, (0, 0), (4, 4)), Sliced(W, (4, 0), (8, 4)))), "perrank(fc.weight[0:4], fc.weight[4:8])"),
        (Literal(np.zeros((3, 2), np.float32)), "float[3,2]"),
    ],
)
def test_a_formula_names_the_tensors_of_the_files(expr: TensorExpr, text: str) -> None:
    assert formula(expr) == text


def test_every_tensor_behind_an_expression_is_found_once() -> None:
    assert stored_parts(PerRank((Codes(W), Codes(W)))) == (W,)
    assert stored_parts(Concatenated((W, Casted(Q, "bfloat16")), 0)) == (W, Q)
    assert stored_parts(Literal(np.zeros(2))) == ()


def test_origins_name_file_tensor_and_stored_type_but_no_directory() -> None:
    assert weight_origins("q", Codes(Q)) == (Origin("q", "b.gguf:blk.0.attn_q.weight", "Q4_1[64,32]"),)
    assert weight_origins("eps", Literal(np.zeros((), np.float32))) == (Origin("eps", "", "float[]"),)


def test_the_name_of_a_tensor_changes_neither_equality_nor_the_content_hash() -> None:
    bare = Source(W.file, W.offset, W.stored, W.dims)
    assert bare == W
    assert Codes(bare).key == Codes(W).key
    read = parse_expr(str(Codes(W)))
    assert (read.key, formula(read)) == (Codes(W).key, "codes(fc.weight)")


def test_tensors_of_a_safetensors_file_know_their_names(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a.b": Literal(np.zeros(3, np.float32))})
    assert formula(read_safetensors_header(tmp_path / "m.safetensors")["a.b"]) == "a.b"

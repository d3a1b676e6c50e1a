"""SplitToSequence and SequenceAt become Split, with the same values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

from vacc_opt.frontends import load_onnx
from vacc_opt.frontends.sequences import resolve_sequences

X = np.arange(24, dtype=np.float32).reshape(2, 12)
HEAD = '<ir_version: 10, opset_import: ["" : 20]> g (float[2,12] x) => (float[2,n] a, float[2,m] b) { %s }'
SIZES = "sizes = Constant <value_ints = [5, 7]> () i = Constant <value = int64 {0}> () j = Constant <value = int64 {1}> () last = Constant <value = int64 {-1}> ()"
SPLIT = "s = SplitToSequence <axis = -1> (x, sizes)"


def model(body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEAD % f"{SIZES} {body}")


def run(made: onnx.ModelProto) -> list[np.ndarray]:
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})


RESOLVED = {
    "sizes": f"{SPLIT} a = SequenceAt (s, i) b = SequenceAt (s, j)",
    "an index from the end": f"{SPLIT} b = SequenceAt (s, last) a = SequenceAt (s, i)",
    "one size": "five = Constant <value = int64 {5}> () s = SplitToSequence <axis = 1> (x, five) a = SequenceAt (s, i) b = SequenceAt (s, last)",
    "a part read twice": f"{SPLIT} a = SequenceAt (s, i) c = SequenceAt (s, i) b = Neg (c)",
}


@pytest.mark.parametrize("case", RESOLVED)
def test_a_split_with_known_sizes_is_one_node(case: str) -> None:
    made = model(RESOLVED[case])
    expected = run(made)
    resolve_sequences(made)
    assert not {"SplitToSequence", "SequenceAt"} & {n.op_type for n in made.graph.node}
    for found, wanted in zip(run(made), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_file_with_a_split_sequence_is_a_graph_of_tensors(tmp_path: Path) -> None:
    onnx.save(model(RESOLVED["sizes"]), tmp_path / "model.onnx")
    assert load_onnx(tmp_path / "model.onnx").op_counts() == {"Split": 1}


def test_a_sequence_that_is_read_as_one_stays() -> None:
    made = model(f"{SPLIT} a = ConcatFromSequence <axis = 1> (s) b = SequenceAt (s, i)")
    before = made.SerializeToString()
    resolve_sequences(made)
    assert made.SerializeToString() == before


def test_sizes_that_are_computed_stay() -> None:
    made = model("k = Add (sizes, sizes) two = Constant <value_ints = [2]> () h = Div (k, two) s = SplitToSequence <axis = 1> (x, h) a = SequenceAt (s, i) b = SequenceAt (s, j)")  # fmt: skip
    before = made.SerializeToString()
    resolve_sequences(made)
    assert made.SerializeToString() == before

"""`vacc-opt opt` from .onnx to text to .onnx, over models that hold more than tensors and plain operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from vacc_opt.cli.main import main
from vacc_opt.tests.onnx_backend.round_trip import on_onnxruntime

X = np.array([[1.5, -2.0, 0.25, -8.0]], np.float32)
HEAD = '<ir_version: 10, opset_import: ["" : {}]>'
MODELS = {
    "a loop over captured weights": f"""{HEAD.format(21)}
        g (float[1,4] x) => (float[1,4] y) <int64 n = {{3}}, bool go = {{1}}, float[4,4] w = {{1,0,2,0,0,1,0,2,1,0,0,0,0,3,0,1}}> {{
            y = Loop (n, go, x) <body = b (int64 i, bool c, float[1,4] at) => (bool d, float[1,4] next) {{
                d = Identity (c)
                next = MatMul (at, w)
            }}>
        }}""",
    "a scan": f"""{HEAD.format(21)}
        g (float[1,4] x) => (float[4] last, float[1,4] sums) <float[4] zero = {{0,0,0,0}}> {{
            last, sums = Scan <num_scan_inputs = 1, body = b (float[4] sum, float[4] row) => (float[4] next, float[4] out) {{
                next = Add (sum, row)
                out = Identity (next)
            }}> (zero, x)
        }}""",
    "a sequence": f"""{HEAD.format(21)}
        g (float[1,4] x) => (seq(float[1,4]) s, int64 n) {{
            y = Neg (x)
            s = SequenceConstruct (x, y)
            n = SequenceLength (s)
        }}""",
    "strings": f"""{HEAD.format(21)}
        g (float[1,4] x) => (string[1,4] y) {{ s = Constant <value_strings = ["-\\\\n"]> () t = Cast <to = 8> (x) y = StringConcat (t, s) }}""",
    "int4 weights": f"""{HEAD.format(21)}
        g (float[1,4] x) => (float[1,4] y) <float scale = {{0.5}}> {{
            q = QuantizeLinear <output_dtype = 22> (x, scale)
            y = DequantizeLinear (q, scale)
        }}""",
    "an old opset": """<ir_version: 4, opset_import: ["" : 9]>
        g (float[1,4] x) => (float[1,2] y) {
            y = Slice <axes = [1], starts = [1], ends = [3]> (x)
        }""",
    "another domain": """<ir_version: 10, opset_import: ["" : 21, "ai.onnx.ml" : 3]>
        g (float[1,4] x) => (float[1,4] y) { z = ai.onnx.ml.Binarizer <threshold = 0.5> (x) y = Neg (z) }""",
    "an output that is not asked for": f"""{HEAD.format(21)}
        g (float[1,4] x) => (float[1,1,2] h) <int64[1] zero = {{0}}, int64[3] a = {{1, 8, 4}}, int64[3] b = {{1, 8, 2}}> {{
            w = ConstantOfShape <value = float[1] {{0.5}}> (a)
            r = ConstantOfShape <value = float[1] {{0.25}}> (b)
            u = Unsqueeze (x, zero)
            "", h = LSTM <hidden_size = 2> (u, w, r)
        }}""",
    "a function": """<ir_version: 10, opset_import: ["" : 21, "other" : 1]>
        g (float[1,4] x) => (float[1,4] y) { y = other.Leaky <slope = 0.5> (x) }
        <domain: "other", opset_import: ["" : 21]> Leaky <slope> (a) => (b) { b = LeakyRelu <alpha: float = @slope> (a) }""",
}  # fmt: skip


@pytest.mark.parametrize("text", MODELS.values(), ids=MODELS.keys())
def test_a_model_comes_back_from_files_with_the_same_outputs(text: str, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(text)
    source, middle, target = tmp_path / "model.onnx", tmp_path / "model.vacc", tmp_path / "out.onnx"
    onnx.save(model, source)
    assert main(["opt", str(source), "-p", "simplify", "-o", str(middle)]) == 0
    assert main(["opt", str(middle), "-p", "simplify", "-o", str(target)]) == 0
    result = onnx.load(target)
    onnx.checker.check_model(result, full_check=True)
    assert [o.name for o in result.graph.output] == [o.name for o in model.graph.output]
    expected, found = on_onnxruntime(model, {"x": X}), on_onnxruntime(result, {"x": X})
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_functions_are_kept_for_passes_inside_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "model.onnx"
    onnx.save(
        onnx.parser.parse_model(
            MODELS["a function"].replace("b = Leaky", "i = Identity (a) b = Leaky").replace("(a) }", "(i) }")
        ),
        source,
    )
    arguments = ["opt", str(source), "--keep-functions", "-p", "function(simplify)"]
    assert main([*arguments, "-o", str(tmp_path / "kept.onnx")]) == 0
    (function,) = onnx.load(tmp_path / "kept.onnx").functions
    assert [node.op_type for node in function.node] == ["LeakyRelu"]
    assert main(arguments) == 0
    assert "other.Leaky (x)" in capsys.readouterr().out

"""fuse-quantized-linear: what an exporter makes of an int8 linear is one again; other products by a vector stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vacc_opt.frontends import load_onnx
from vacc_opt.frontends.w8a16_linear import W8A16Linear, quantize_linears
from vacc_opt.ir import Literal, UserError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.ir.tensor import Codes, Scales
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.testing import assert_close, assert_no_match, assert_rewrites, run_pass
from vacc_opt.passes.quantize.fuse_quantized_linear import FuseQuantizedLinear

RNG = np.random.default_rng(0)
CODES = RNG.integers(-127, 128, (6, 8)).astype(np.int8)
SCALE = RNG.uniform(0.01, 0.1, 6).astype(np.float32)


def text(body: str, *, dtype: str = "float", **consts: np.ndarray) -> str:
    given = {"scale": SCALE, **consts}
    lines = "".join(f'# const "{name}" = {Literal(array)}\n' for name, array in given.items())
    return f"g ({dtype}[B,S,8] x) => ({dtype}[B,S,6] y) {{ {body} }}\n{lines}"


AFTER = text("y = Vastai.QuantizedLinearPerChannel (x, codes, scale)", codes=CODES)
CAST = "wide = Cast <to = 1> (codes) w = Transpose <perm = [1, 0]> (wide) p = MatMul (x, w) y = Mul (p, scale)"


def test_a_product_by_the_cast_of_codes_becomes_the_operator() -> None:
    assert_rewrites(FuseQuantizedLinear(expect=1), before=text(CAST, codes=CODES), after=AFTER)


def test_codes_that_the_exporter_folded_to_floats_become_int8_again() -> None:
    before = from_text(text("p = MatMul (x, w) y = Mul (scale, p)", w=CODES.T.astype(np.float32)))
    assert run_pass(FuseQuantizedLinear(), before).fused == 1
    (node,) = before.nodes()
    assert node.inputs[1] is not None
    assert node.inputs[1].const is not None
    np.testing.assert_array_equal(node.inputs[1].const.read(), CODES)


def test_the_casts_of_a_half_precision_model_go_into_the_operator() -> None:
    body = f"wx = Cast <to = 1> (x) {CAST.replace('(x, w)', '(wx, w)').replace('y = Mul', 'm = Mul')} y = Cast <to = 10> (m)"
    before = from_text(text(body, dtype="float16", codes=CODES))
    assert run_pass(FuseQuantizedLinear(), before).fused == 2
    assert before.op_counts() == {"Vastai::QuantizedLinearPerChannel": 1}


@pytest.mark.parametrize(
    ("body", "consts", "reason"),
    [
        (CAST, {"codes": CODES, "scale": SCALE[:1]}, "the weight int8[6,8], the scale float[1]"),
        (CAST, {"codes": CODES.astype(np.int32)}, "the codes are int32[6,8], int8 is expected"),
        (
            "p = MatMul (x, w) y = Mul (p, scale)",
            {"w": CODES.T.astype(np.float32) / 2},
            "holds other numbers than whole ones from -127 to 127",
        ),
        (
            "p = MatMul (x, w) y = Mul (p, scale)",
            {"w": np.full((8, 6), -128, np.float32)},
            "holds other numbers than whole ones from -127 to 127",
        ),
    ],
)
def test_what_is_no_int8_linear_stays(body: str, consts: dict[str, np.ndarray], reason: str) -> None:
    assert_no_match(FuseQuantizedLinear(), text(body, **consts), reason)


class Block(torch.nn.Module):
    """Two linears, one with a bias, and a head that stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(24, 40)
        self.down = torch.nn.Linear(40, 24, bias=False)
        self.lm_head = torch.nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.down(torch.nn.functional.silu(self.up(x))))


def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


@pytest.mark.parametrize("dynamo", [False, True])
def test_a_quantized_torch_module_exports_as_the_operator(dynamo: bool, tmp_path: Path) -> None:
    module = block()
    weight = module.up.weight.detach().numpy().copy()
    assert quantize_linears(module) == ["up", "down"]
    x = torch.randn(2, 5, 24)
    sizes = {0: "batch", 1: "seq"}
    shapes = (
        {"dynamic_axes": {"x": sizes}}
        if not dynamo
        else {"dynamic_shapes": ({k: torch.export.Dim(v) for k, v in sizes.items()},)}
    )
    more = {} if dynamo else {"custom_opsets": {"Vastai": 1}}
    path = tmp_path / "m.onnx"
    torch.onnx.export(module, (x,), path, input_names=["x"], dynamo=dynamo, opset_version=18, **shapes, **more)
    graph = load_onnx(path)
    record = run_pass(FuseQuantizedLinear(), graph)
    assert record.fused == (2 if dynamo else 0)
    nodes = graph.by_op("QuantizedLinearPerChannel", "Vastai")
    assert len(nodes) == 2
    _, codes, scale = nodes[0].inputs
    assert codes is not None
    assert scale is not None
    assert codes.const is not None
    assert scale.const is not None
    np.testing.assert_array_equal(codes.const.read(), Codes(Literal(weight)).read())
    np.testing.assert_array_equal(scale.const.read(), Scales(Literal(weight)).read())
    (output,) = graph.outputs.values()
    assert str(output.type).startswith("float[batch,seq,")
    (found,) = Executable(graph).run({"x": x.numpy()})[0].values()
    assert_close(found, module(x).detach().numpy(), 1e-5)


def test_the_module_computes_in_fp32_and_answers_in_the_type_of_its_input() -> None:
    linear = W8A16Linear(torch.full((3, 4096), 127, dtype=torch.int8), torch.full((3,), 1e-4))
    half = linear(torch.ones(1, 4096, dtype=torch.float16))  # 520,192 before the scale: beyond fp16
    assert half.dtype == torch.float16
    assert half.tolist() == [[52.03125] * 3]
    x = torch.randn(2, 4096, requires_grad=True)
    linear(x).sum().backward()
    expected = 3 * 127 * 1e-4
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-6)


def test_weights_of_every_float_type_have_the_same_codes() -> None:
    weight = torch.randn(5, 16).bfloat16()
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        linear = torch.nn.Linear(16, 5, bias=False, dtype=dtype)
        linear.weight = torch.nn.Parameter(weight.to(dtype))
        made.append(W8A16Linear.quantized(linear))
    assert torch.equal(made[0].qweight, made[1].qweight)
    assert torch.equal(made[0].scale, made[1].scale)


def test_what_cannot_be_quantized_is_named() -> None:
    module = block()
    with torch.no_grad():
        module.down.weight[3, 1] = float("nan")
    with pytest.raises(UserError, match="down: the weight has NaN or infinity in row 3"):
        quantize_linears(module)
    assert isinstance(module.up, torch.nn.Linear)  # all or nothing
    with pytest.raises(UserError, match="exclude is no regular expression"):
        quantize_linears(module, exclude="(")
    with pytest.raises(UserError, match=r"int8 \[N, K\] and \[N\] are expected|codes are torch.float32"):
        W8A16Linear(torch.ones(2, 3), torch.ones(2))

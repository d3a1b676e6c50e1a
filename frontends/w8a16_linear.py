"""A linear layer with int8 weights in torch, which exports as the operator that ``w8a16`` makes.

With ``torch.onnx.export(dynamo=False, custom_opsets={"Vastai": 1})`` it becomes ``Vastai::QuantizedLinearPerChannel``;
with ``dynamo=True`` Cast, MatMul and Mul, which the pass ``fuse-quantized-linear`` recognizes.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import nn

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.tensor import Codes, Literal, Scales


class _Product(torch.autograd.Function):
    """``cast((x @ codes^T) * scale)`` in fp32, as the operator is defined."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Y [..., N] of x [..., K], codes int8 [N, K] and scale float32 [N], in the type of x."""
        ctx.save_for_backward(codes, scale)
        return ((x.float() @ codes.float().t()) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of x; codes and scales are not trained."""
        codes, scale = ctx.saved_tensors
        (gradient,) = gradients
        return ((gradient.float() * scale) @ codes.float()).to(gradient.dtype), None, None

    @staticmethod
    def symbolic(g: Any, x: Any, codes: Any, scale: Any) -> Any:
        """One node, of the shape ``x.shape[:-1] + [N]``."""
        y = g.op("Vastai::QuantizedLinearPerChannel", x, codes, scale)
        sizes = x.type().sizes()
        y.setType(x.type() if sizes is None else x.type().with_sizes([*sizes[:-1], codes.type().sizes()[0]]))
        return y


class W8A16Linear(nn.Module):
    """``y = x W^T + bias`` with W as int8 codes [N, K] and a float32 scale a row; the bias is added in x's type."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """``codes`` int8 [N, K], ``scale`` [N]; raises UserError for other types or shapes."""
        super().__init__()
        if codes.dtype != torch.int8 or codes.dim() != 2 or scale.shape != codes.shape[:1]:
            raise UserError(
                f"codes are {codes.dtype} {list(codes.shape)}, scales {list(scale.shape)}",
                "int8 [N, K] and [N] are expected",
            )
        self.register_buffer("qweight", codes)
        self.register_buffer("scale", scale.float())
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    @staticmethod
    def quantized(linear: nn.Linear) -> W8A16Linear:
        """Round a layer to nearest: the arithmetic of ``w8a16``. Raises UserError for NaN or infinity."""
        weight = Literal(np.ascontiguousarray(linear.weight.detach().float().cpu().numpy()))
        codes, scale = torch.from_numpy(Codes(weight).read()), torch.from_numpy(Scales(weight).read())
        made: W8A16Linear = W8A16Linear(codes, scale, linear.bias).to(linear.weight.device)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N]."""
        y: torch.Tensor = _Product.apply(x, self.qweight, self.scale)
        return y if self.bias is None else y + self.bias


def quantize_linears(module: nn.Module, *, exclude: str = "lm_head|output_layer|embed_out") -> list[str]:
    """Replace every ``nn.Linear`` inside ``module`` whose name ``exclude`` does not match; gives the names.

    Raises:
        UserError: ``exclude`` is no regular expression, or a weight holds NaN or infinity; the layer is named.
    """
    try:
        kept = re.compile(exclude)
    except re.error as error:
        raise UserError(f"exclude is no regular expression: {error}") from error
    found = [n for n, one in module.named_modules() if isinstance(one, nn.Linear) and not (exclude and kept.search(n))]
    made: dict[str, W8A16Linear] = {}
    for name in found:
        try:
            made[name] = W8A16Linear.quantized(module.get_submodule(name))  # type: ignore[arg-type,unused-ignore]
        except UserError as error:
            raise UserError(f"{name}: {error.message}", error.hint) from error
    for name, one in made.items():
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, one)
    return found

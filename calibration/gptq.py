"""GPTQ: int8 codes of a linear layer that lose least on the inputs that it saw, and the scales that suit them.

Sources: Frantar et al. 2023, "GPTQ", sections 3.3 and 3.4 (column by column, lazy blocks, Cholesky form); the order by
activations is that of the authors' code. Each scale is chosen among shrunken ones by the loss that GPTQ ends with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir.errors import CheckError
from vacc_opt.ir.row_codes import row_scales

Array = npt.NDArray[Any]
LIMIT = 127
BLOCK = 128  # columns whose effect on the later ones is applied in one product
SHRINK = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)
_WORKING_BYTES = 192 << 20  # of the rows that are solved together


@dataclass(frozen=True)
class Solver:
    """How layers are solved.

    Args:
        damping: added to the diagonal of the Hessian, as a share of its mean.
        act_order: columns with the largest inputs first.
        correction: share of the error of the inputs, that earlier layers left, which the weight makes up for.
        correction_damping: as ``damping``, where that is solved.
        shrink: factors of ``max|row| / 127`` that are tried as scale; the best is taken row by row.
        device: of torch.
    """

    damping: float = 0.01
    act_order: bool = True
    shrink: Sequence[float] = SHRINK
    correction: float = 0.3
    correction_damping: float = 0.3
    device: str = "cpu"


@dataclass(frozen=True)
class Solution:
    """Codes int8 [N, K], scales float32 [N], and the share of the output's energy that is lost, over all rows.

    ``rounding_loss`` is the same of round to nearest with ``max|row| / 127``.
    """

    codes: Array
    scales: Array
    loss: float
    rounding_loss: float


def usable_device(named: str) -> str:
    """``named`` if torch can use it, else ``cpu``: a configuration with ``cuda:5`` also works where there is none."""
    import torch

    try:
        torch.zeros(1, device=named)
    except (RuntimeError, AssertionError):
        return "cpu"
    return named


class Inputs:
    """What was seen of the inputs x of some layers: ``hessian`` is ``sum x x^T`` [K, K] in float32, once all are added.

    ``drift`` is ``sum (e - x) x^T``, where e is what the float model has in the place of x.
    """

    def __init__(self, width: int, device: str = "cpu") -> None:
        import torch

        self.hessian: Any = torch.zeros(width, width, device=device)
        self.drift: Any = torch.zeros(width, width, device=device)
        self.tokens = 0
        self._divided = False

    def add(self, x: Array, exact: Array | None = None) -> None:
        """Take in inputs [..., K], and those of the float model; raises CheckError when they are not finite."""
        import torch

        inputs = self._rows(x)
        if not bool(torch.isfinite(inputs).all()):
            raise CheckError("the inputs of a layer hold NaN or infinity", "the checkpoint may be damaged")
        self.hessian.addmm_(inputs.T, inputs)
        self.tokens += len(inputs)
        if exact is not None:
            self.drift.addmm_((self._rows(exact) - inputs).T, inputs)

    def mean_square(self) -> Any:
        """``hessian`` over the number of tokens; nothing can be added after."""
        if not self._divided:
            self.hessian.div_(max(self.tokens, 1))
            self._divided = True
        return self.hessian

    def forget_drift(self) -> None:
        """Give the memory of ``drift`` back."""
        self.drift = None

    def _rows(self, array: Array) -> Any:
        import torch

        flat = np.array(array, np.float32, order="C").reshape(-1, array.shape[-1])
        return torch.from_numpy(flat).to(self.hessian.device)


def solve(weight: Array, seen: Inputs, solver: Solver | None = None, *, last: bool = False) -> Solution:
    """Quantize ``weight`` [N, K] float32 for inputs that were seen; with ``last`` no other weight reads them after.

    A row of zeros gets scale 1 and codes 0. A weight column whose input was always zero is rounded to nearest.

    Raises:
        UserError: the weight holds NaN or infinity.
        CheckError: the Hessian cannot be inverted, however much it is damped.
    """
    import torch

    solver = solver or Solver()
    h = seen.mean_square()
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if solver.act_order else torch.arange(len(h))
    largest = torch.from_numpy(row_scales(weight)).to(h.device)
    given = torch.from_numpy(np.require(weight, np.float32, ["C", "W"])).to(h.device)
    w = _corrected(given, seen, solver) if solver.correction else given
    if last:
        seen.forget_drift()
    upper, added = _inverse_factor(h, order, solver.damping)
    rows = _rows_at_once(w.shape[1], len(solver.shrink))
    codes = torch.empty(w.shape, dtype=torch.int8)
    scales = torch.empty(len(w))
    whole, lost, rounding = 0.0, 0.0, 0.0
    for low in range(0, len(w), rows):
        part = slice(low, low + rows)
        ordered = w[part][:, order]
        found, scale, damped = _best(ordered, largest[part], upper, solver.shrink)
        codes[part, order.cpu()] = found.cpu()
        scales[part] = scale.cpu()
        # GPTQ's own loss is that of the damped Hessian: what the damping adds is taken off
        error = ordered.sub_(found * scale[:, None]).square_() @ added
        lost += max(float((damped - error).sum(dtype=torch.float64)), 0.0)
        whole += _energy(given[part], h)
        rounding += _energy(_rounded(given[part], largest[part]) - given[part], h)
    whole = max(whole, 1e-30)
    return Solution(codes.numpy(), scales.numpy(), lost / whole, rounding / whole)


def _energy(w: Any, h: Any) -> float:
    """The mean square of what a weight gives, summed over its rows."""
    import torch

    return float(((w @ h) * w).sum(dtype=torch.float64))


def _rows_at_once(width: int, copies: int) -> int:
    return max(1, _WORKING_BYTES // (4 * width * copies))


def _corrected(w: Any, seen: Inputs, solver: Solver) -> Any:
    """The weight that gives, on inputs of the quantized model, more of what ``w`` gives on those of the float one.

    A share of the least squares solution ``w drift (h + damping)^-1`` (the asymmetric calibration of Li et al. 2025,
    "GPTAQ") is added.
    """
    import torch

    lower = seen.mean_square().clone().T
    lower.diagonal().add_(max(solver.correction_damping * float(lower.diagonal().mean()), 1e-12))
    if not _factorize(lower):
        return w
    corrected = torch.empty_like(w)
    rows = _rows_at_once(w.shape[1], 4)
    for low in range(0, len(w), rows):
        part = slice(low, low + rows)
        wanted = (w[part] @ seen.drift).div_(max(seen.tokens, 1))
        # torch.cholesky_solve would copy the factor
        half = torch.linalg.solve_triangular(lower, wanted.T, upper=False)
        whole = torch.linalg.solve_triangular(lower.T, half, upper=True)
        torch.add(w[part], whole.T, alpha=solver.correction, out=corrected[part])
    return corrected


def _rounded(w: Any, scale: Any) -> Any:
    return (w / scale[:, None]).round().clamp(-LIMIT, LIMIT) * scale[:, None]


def _inverse_factor(h: Any, order: Any, damping: float) -> tuple[Any, Any]:
    """The upper Cholesky factor of the inverse of the damped Hessian, columns in that order, and what damping added.

    One matrix is made.
    """
    import torch

    mean = float(h.diagonal().mean())
    for attempt in range(4):
        work = _permuted(h, order).T
        dead = work.diagonal() <= 0
        work.diagonal().add_(max(damping * mean * 10**attempt, 1e-12))
        work.diagonal()[dead] = max(mean, 1.0)
        added = work.diagonal() - h.diagonal()[order]
        if _factorize(work):
            torch.cholesky_inverse(work, out=work)
            if _factorize(work, upper=True):
                return work, added
    raise CheckError("GPTQ: the Hessian of a layer cannot be inverted", "give more calibration text, or more damping")


def _permuted(h: Any, order: Any) -> Any:
    """``h[order][:, order]``, a block of rows at a time."""
    import torch

    found = torch.empty_like(h)
    for low in range(0, len(h), BLOCK):
        part = slice(low, low + BLOCK)
        torch.index_select(h.index_select(0, order[part]), 1, order, out=found[part])
    return found


def _factorize(matrix: Any, *, upper: bool = False) -> bool:
    """Put the Cholesky factor of a matrix, whose columns are contiguous, in its place; False: it has none."""
    import torch

    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, upper=upper, out=(matrix, failed))
    return not int(failed)


def _best(w: Any, largest: Any, upper: Any, shrink: Sequence[float]) -> tuple[Any, Any, Any]:
    """Codes [n, K], scales [n] and losses [n] of rows: of every factor, the one with the least loss."""
    import torch

    scales = torch.cat([largest * factor for factor in shrink])
    codes, loss = _columns(w.T.repeat(1, len(shrink)), scales, upper)
    best = loss.view(len(shrink), -1).argmin(dim=0)
    chosen = best * len(largest) + torch.arange(len(largest), device=w.device)
    return codes[:, chosen].T, scales[chosen], loss[chosen]


def _columns(w: Any, scales: Any, upper: Any) -> tuple[Any, Any]:
    """GPTQ over ``w`` [K, n], which is used up: codes int8 [K, n], and the loss of each of the n rows."""
    import torch

    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    loss = torch.zeros(w.shape[1], device=w.device)
    for low in range(0, len(w), BLOCK):
        high = min(low + BLOCK, len(w))
        block, errors = w[low:high], torch.empty_like(w[low:high])
        for i in range(high - low):
            column = block[i]
            code = (column / scales).round_().clamp_(-LIMIT, LIMIT)
            codes[low + i] = code
            error = torch.sub(column, code.mul_(scales), out=errors[i]).div_(upper[low + i, low + i])
            if i + 1 < high - low:
                block[i + 1 :].addr_(upper[low + i, low + i + 1 : high], error, alpha=-1)
        loss += (errors * errors).sum(dim=0)
        if high < len(w):
            w[high:].addmm_(upper[low:high, high:].T, errors, alpha=-1)
    return codes, loss

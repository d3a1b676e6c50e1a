"""A file of int8 codes that were made elsewhere (GPTQ): what it holds of each weight, and whether it fits the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir import TensorExpr
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.ir.storage import read_safetensors_header
from vacc_opt.ir.tensor import Casted, Source
from vacc_opt.ir.types import DType

# NAME.codes int8 [N, K] and NAME.scales float [N], or NAME.keep where the weight stays float;
# NAME.mark int64 [1] says of which weight they are
CODES, SCALES, KEEP, MARK = ".codes", ".scales", ".keep", ".mark"


def mark_of(rows: TensorExpr) -> npt.NDArray[Any]:
    """Digest of the first row of a weight [N, K] as float32, int64 [1]: cheap to check, and no two weights share it."""
    first = np.ascontiguousarray(rows.read((slice(0, 1),)), np.float32)
    return np.frombuffer(hashlib.sha256(first.tobytes()).digest()[:8], np.int64).copy()


@dataclass(frozen=True)
class CodesFile:
    """An opened file of codes."""

    path: str
    tensors: Mapping[str, Source]

    @property
    def name(self) -> str:
        """Without its directory."""
        return Path(self.path).name

    @staticmethod
    def open(path: str) -> CodesFile:
        """Read the header; raises UserError for a file that is missing, damaged or of something else."""
        tensors = read_safetensors_header(Path(path))
        if not any(name.endswith(MARK) for name in tensors):
            raise UserError(
                f"{path}: holds no `...{MARK}`", "it is not a file of codes; `vacc-opt calibrate` writes one"
            )
        return CodesFile(path, tensors)

    def of(self, name: str, rows: TensorExpr) -> tuple[TensorExpr, TensorExpr] | None:
        """(codes, fp32 scales) of a weight; None when the file says that it stays float.

        Raises:
            UserError: the file lacks the weight, or was made of another one.
        """
        if name + MARK not in self.tensors:
            known = [one.removesuffix(MARK) for one in self.tensors if one.endswith(MARK)]
            raise UserError(f"{self.path}: no codes of {name}", did_you_mean(name, known))
        if (self.tensors[name + MARK].read() != mark_of(rows)).any():
            raise UserError(
                f"{self.path}: {name} is another weight than the model's", "calibrate again with this checkpoint"
            )
        if name + KEEP in self.tensors:
            return None
        codes, scales = self.tensors.get(name + CODES), self.tensors.get(name + SCALES)
        if codes is None or scales is None or codes.shape != rows.shape or scales.shape != rows.shape[:1]:
            found = "missing" if codes is None or scales is None else f"{list(codes.shape)}"
            raise UserError(f"{self.path}: the codes of {name} are {found}, the weight is {list(rows.shape)}")
        return codes, scales if scales.dtype is DType.FLOAT else Casted(scales, DType.FLOAT.value)

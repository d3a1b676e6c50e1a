"""Code that comes with a checkpoint runs when a person says so, and only then; its model exports like any other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vacc_opt.cli.main import main
from vacc_opt.frontends import export_checkpoint, load_config
from vacc_opt.frontends.huggingface import build_module
from vacc_opt.ir import UserError
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.runtime.models import load_model
from vacc_opt.tests.frontends import families

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class TwiceConfig(LlamaConfig):
    model_type = "twice"

class TwiceForCausalLM(LlamaForCausalLM):
    config_class = TwiceConfig

    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        result.logits = 2 * result.logits
        return result
"""
AUTO_MAP = {"AutoConfig": "modeling_twice.TwiceConfig", "AutoModelForCausalLM": "modeling_twice.TwiceForCausalLM"}


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """A Llama whose directory brings code that doubles its logits, and the Llama."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers appends that folder
    path = tmp_path / "twice"
    made = tiny_model(path, tie_word_embeddings=False, attn_implementation="eager")
    change(path, model_type="twice", auto_map=AUTO_MAP)
    (path / "modeling_twice.py").write_text(CODE)
    return path, made.module


def change(path: Path, **entries: Any) -> dict[str, Any]:
    config = {**json.loads((path / "config.json").read_text()), **entries}
    (path / "config.json").write_text(json.dumps(config))
    return config


def check_doubled(graph: Any, llama: Any) -> None:
    from vacc_opt.ir.evaluate import Executable

    llama.config.head_dim = 8
    given = families.feeds(llama.config, 64, 5, 0, 0)
    expected = 2 * families.reference(llama.double(), given)
    actual = Executable(graph).run(given)[0]["logits"]
    assert np.abs(actual - expected).max() <= families.SINGLE * np.abs(expected).max()


def test_without_the_flag_the_code_is_not_run_and_the_error_says_how(checkpoint: tuple[Path, Any]) -> None:
    (checkpoint[0] / "modeling_twice.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match="unknown architecture: model_type `twice`\n  its code") as caught:
        export_checkpoint(checkpoint[0], isolated=False)
    assert "--trust-remote-code, or `frontend.trust_remote_code: true`" in str(caught.value)


def test_with_the_flag_its_model_is_exported_and_recognized(checkpoint: tuple[Path, Any]) -> None:
    path, llama = checkpoint
    graph = export_checkpoint(path, trust_remote_code=True)  # in a child process, which leaves no copy of the code
    assert not (path.parent / "modules").exists()
    check_doubled(graph, llama)
    fused = "fuse-rms-norm{expect=5},fuse-rotary{positions=64,expect=4},fuse-gqa{expect=2},fuse-swiglu{expect=2}"
    run_pipeline(graph, f"simplify,{fused}")
    check_doubled(graph, llama)


def test_our_own_definition_goes_before_the_code_unless_the_flag_is_given(checkpoint: tuple[Path, Any]) -> None:
    path, _ = checkpoint
    config = change(path, model_type="aquila")
    assert type(build_module(config)[0]).__name__ == "Aquila"
    module, _ = build_module(config, code=path)
    assert type(module).__name__ == "TwiceForCausalLM"
    assert all(type(p.data).__name__ == "FakeTensor" for p in module.parameters())


def test_a_checkpoint_without_code_is_the_same_with_the_flag(checkpoint: tuple[Path, Any]) -> None:
    path, _ = checkpoint
    config = change(path, model_type="llama", auto_map=None)
    del config["auto_map"]
    assert type(build_module(config, code=path)[0]).__name__ == "LlamaForCausalLM"


def test_a_config_of_transformers_may_go_with_code_for_the_model_alone(checkpoint: tuple[Path, Any]) -> None:
    path, _ = checkpoint
    auto_map = {"AutoModelForCausalLM": "someone/elsewhere--modeling_twice.TwiceForCausalLM"}  # its file lies here
    module, _ = build_module(change(path, model_type="llama", auto_map=auto_map), code=path)
    assert type(module).__name__ == "TwiceForCausalLM"


@pytest.mark.parametrize(
    ("auto_map", "code", "message"),
    [
        ({"AutoModel": "modeling_twice.Twice"}, CODE, "auto_map names no AutoModelForCausalLM.*\n  did you mean `AutoModel`"),
        ({"AutoModelForCausalLM": "modeling_twise.Twice"}, CODE, "no modeling_twise.py, which auto_map names"),
        ({"AutoModelForCausalLM": "modeling_twice.Twice"}, CODE, "auto_map names no AutoConfig, and transformers knows no"),
        (AUTO_MAP, "import json\nx = json.nothing", "the code of the checkpoint failed: AttributeError"),
    ],
)  # fmt: skip
def test_code_that_cannot_be_used_is_the_checkpoints_mistake(
    checkpoint: tuple[Path, Any], auto_map: dict[str, str], code: str, message: str
) -> None:
    path, _ = checkpoint
    (path / "modeling_twice.py").write_text(code)
    with pytest.raises(UserError, match=message):
        build_module(change(path, auto_map=auto_map), code=path)


def test_commands_take_the_flag(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    path, llama = checkpoint
    for command in ("export", "opt"):
        output = tmp_path / f"{command}.vacc"
        assert main([command, str(path), "--trust-remote-code", "-o", str(output)]) == 0
        check_doubled(load_model(str(output)), llama)


def test_a_configuration_file_has_an_entry_for_it(tmp_path: Path) -> None:
    text = "name: m\nfrontend:\n  checkpoint: c\n  shape: {input_ids: [[16], [32]]}\n"
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text(text + "  trust_remote_code: true\n")
    assert [load_config(tmp_path / f"{n}.yaml").frontend.trust_remote_code for n in "ab"] == [False, True]

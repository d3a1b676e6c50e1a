"""Code that comes with a checkpoint runs when a person says so, and only then; its model exports like any other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vacc_opt.cli.main import main
from vacc_opt.frontends import export_checkpoint, load_config
from vacc_opt.frontends.huggingface import build_module
from vacc_opt.ir import Graph, UserError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.testing import assert_close
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
SIDEWAYS = """
import torch
from torch import nn
from torch.nn.utils import skip_init
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

class SidewaysConfig(PretrainedConfig):
    model_type = "sideways"

@torch.jit.script
def twice(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.size(0), x.size(1), -1) * 2.0

class SidewaysForCausalLM(PreTrainedModel):
    config_class = SidewaysConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = skip_init(nn.Embedding, 16, 8)
        self.qkv = skip_init(nn.Linear, 8, 24)
        self.norm = nn.LayerNorm(8)
        self.out = skip_init(nn.Linear, 8, 16, bias=False)

    def hidden(self, seq, past, attention_mask):
        hidden = torch.cat((torch.zeros(seq, past), torch.ones(seq, seq).triu(1)), 1)[None]
        return (hidden + (1 - attention_mask)[:, None] > 0.5)[:, None]

    def forward(self, input_ids, position_ids=None, attention_mask=None, past_key_values=None, use_cache=True):
        x = self.embed(input_ids).transpose(0, 1)
        q, k, v = (part.reshape(*x.shape[:2], 2, 4) for part in self.qkv(self.norm(x)).chunk(3, -1))
        past = 0
        if past_key_values:
            past = past_key_values[0][0].shape[0]
            k, v = (torch.cat(both) for both in zip(past_key_values[0], (k, v)))
        mask = None
        if attention_mask is not None and not attention_mask.all() or past and len(x) != 1:
            mask = ~self.hidden(len(x), past, attention_mask)
        q, keys, values = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        seen = nn.functional.scaled_dot_product_attention(q, keys, values, mask, is_causal=mask is None and not past)
        logits = self.out(x + twice(seen.permute(2, 0, 1, 3)))
        return CausalLMOutputWithPast(logits=logits.transpose(0, 1), past_key_values=((k, v),))
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
        ({"AutoModelForCausalLm": "modeling_twice.Twice"}, CODE, "auto_map names no AutoModelForCausalLM"),
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


@pytest.fixture
def sideways(checkpoint: tuple[Path, Any], tmp_path: Path) -> tuple[Path, Any]:
    """A model with tuples of [seq, batch, heads, D] for a cache, as ChatGLM2's own code has, and its real module."""
    path = tmp_path / "sideways"
    path.mkdir()
    auto_map = {
        "AutoConfig": "modeling_sideways.SidewaysConfig",
        "AutoModel": "modeling_sideways.SidewaysForCausalLM",
    }
    (path / "modeling_sideways.py").write_text(SIDEWAYS)
    (path / "config.json").write_text(json.dumps({"model_type": "sideways", "auto_map": auto_map}))
    code: dict[str, Any] = {"__name__": "sideways"}
    exec(SIDEWAYS.replace("@torch.jit.script", ""), code)
    torch.manual_seed(0)
    module = code["SidewaysForCausalLM"](code["SidewaysConfig"]()).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.4)
    save_file(module.state_dict(), path / "model.safetensors")
    return path, module


def test_a_cache_of_tuples_in_a_layout_of_its_own_becomes_that_of_the_interface(sideways: tuple[Path, Any]) -> None:
    path, module = sideways
    graph = export_checkpoint(path, trust_remote_code=True, isolated=False)
    cached = {v.name: str(v.type) for v in graph.inputs if v.name.startswith("past")}
    assert cached == {f"past_key_values.0.{part}": "float[batch,2,past,4]" for part in ("key", "value")}
    _check_sideways(graph, module)
    run_pipeline(graph, "simplify,fuse-gqa{expect=1}")
    _check_sideways(graph, module)
    run_pipeline(graph, "slice-last-token,kv-cache{context=16}")
    assert [str(v.type) for v in graph.inputs if v.name.startswith("past")] == ["float[batch,2,16,4]"] * 2


def _check_sideways(graph: Graph, module: Any) -> None:
    """Prefill, prefill with a left pad (a mask that the code leaves out for rows of ones), a chunk and one token."""
    config = SimpleNamespace(num_key_value_heads=2, head_dim=4, num_hidden_layers=1)
    for seq, past, pads in ((5, 0, 0), (5, 0, 2), (3, 4, 2), (1, 6, 0)):
        given = families.feeds(config, 16, seq, past, pads)
        cache = [torch.from_numpy(given[f"past_key_values.0.{w}"]).permute(2, 0, 1, 3) for w in ("key", "value")]
        ids, mask = (torch.from_numpy(given[n]) for n in ("input_ids", "attention_mask"))
        with torch.no_grad():
            expected = module(ids, None, mask, (tuple(cache),) if past else None).logits.numpy()
        seen = given["attention_mask"][:, past:] == 1
        assert_close(Executable(graph).run(given)[0]["logits"][seen], expected[seen], families.SINGLE, f"{seq}, {past}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("((k, v),)", "None"), "SidewaysForCausalLM returns no cache"),
        (("((k, v),)", "((k.flatten(2), v),)"), r"SidewaysForCausalLM caches tensors of \[seq, batch, 8\]"),
    ],
)
def test_a_cache_that_is_none_is_refused(sideways: tuple[Path, Any], change: tuple[str, str], message: str) -> None:
    path, _ = sideways
    (path / "modeling_sideways.py").write_text(
        SIDEWAYS.replace("past_key_values=" + change[0], "past_key_values=" + change[1])
    )
    with pytest.raises(UserError, match=message):
        export_checkpoint(path, trust_remote_code=True, isolated=False)


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

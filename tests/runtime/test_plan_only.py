"""`compile --plan-only`: everything but the weights, from headers alone, with the numbers that a compilation has."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path

from vacc_opt.runtime.compile import compile_model
from vacc_opt.runtime.report import CompileReport
from vacc_opt.tests.runtime.conftest import YAML, Silent

LARGE = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568,
    "num_hidden_layers": 2, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
}  # fmt: skip


def write_sparse_checkpoint(folder: Path) -> int:
    """A Qwen2 whose shards have headers and holes: its bytes, of which the disk holds a few thousand."""
    (folder / "config.json").write_text(json.dumps(LARGE))
    hidden, width, rows, kv = 8192, 29568, 152064, 1024
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (rows, hidden)}]
    for layer in range(2):
        attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
        shard = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
        shard |= {f"self_attn.{name}.bias": shape[:1] for name, shape in attention.items()}
        shard |= {"self_attn.o_proj.weight": (hidden, hidden), "mlp.gate_proj.weight": (width, hidden)}
        shard |= {"mlp.up_proj.weight": (width, hidden), "mlp.down_proj.weight": (hidden, width)}
        shard |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        shards.append({f"model.layers.{layer}.{name}": shape for name, shape in shard.items()})
    shards.append({"model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)})
    index, total = {}, 0
    for number, shard in enumerate(shards):
        at, header = 0, {}
        for name, shape in shard.items():
            size = 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        file = f"model-{number}.safetensors"
        with (folder / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + at)
        index |= dict.fromkeys(shard, file)
        total += at
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def test_the_plan_has_the_numbers_of_the_compilation(
    compiled: tuple[CompileReport, Silent], config: Callable[..., Path], tmp_path: Path
) -> None:
    listener = Silent()
    planned = compile_model(config(tmp_path), (), listener, plan_only=True)
    made = compiled[0]
    assert list(listener.said) == [name for name in compiled[1].said if name not in ("calibrate", "write")]
    assert planned.facts == made.facts
    assert planned.path is None
    assert not (tmp_path / "out").exists()
    assert planned.files == {name: made.files[name] for name in planned.files}
    assert {name.partition(".")[2] for name in planned.files} == {"safetensors", "schedule"}


def test_a_plan_reads_no_weight(tmp_path: Path) -> None:
    """Eight billion bytes that are not there; the checkpoint has no tokenizer, and the text of the data set is never read.

    In a process of its own, so that its memory is not what other tests left behind.
    """
    total = write_sparse_checkpoint(tmp_path)
    (tmp_path / "text.json").write_text("[]")
    file = tmp_path / "config.yaml"
    values = {"name": "large", "checkpoint": tmp_path, "type": "huggingface", "tp": 8, "dtype": "int8"}
    file.write_text(
        YAML.format(**values, prefill=1024, context=2048, data=tmp_path / "text.json", out=tmp_path / "out")
    )
    command = [sys.executable, "-m", "vacc_opt.cli.main", "compile", str(file), "--plan-only", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    found = json.loads(ended.stdout)
    assert (found["path"], found["ranks"], len(found["phases"])) == (None, 8, 2)
    embeddings = 2 * 2 * 152064 * 8192  # stay in fp16
    linears = (total - embeddings) / 2
    weights = sum(size for name, size in found["files"].items() if name.endswith(".safetensors"))
    assert embeddings + linears < weights < (embeddings + linears) * 1.01
    assert found["peak_memory_bytes"] < 2e9
    assert all(phase["milliseconds"] > 0 for phase in found["phases"])
    assert not (tmp_path / "out").exists()

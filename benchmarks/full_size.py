"""Compile checkpoints of real size and hold time and memory to their limits: ``make bench-full``.

Each case makes its checkpoint, copies it with ``cp`` and ``sync`` (what the disk allows), compiles it in a process of
its own, compiles it again, and once more with another prefill length. ChatGLM2-6B is compiled a second time with
another directory, hash seed and number of processes: ``manifest.json``, which holds the digests of all files, is the
same. The table is kept in ``full_size.md`` beside this file. The deepest case needs 60 GB of disk.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from vacc_opt.benchmarks.genai import SMOLLM2, beside_genai
from vacc_opt.benchmarks.make_checkpoint import shapes_of, write_checkpoint
from vacc_opt.benchmarks.published import CONFIGS, with_layers
from vacc_opt.calibration.kv_file import write_pth
from vacc_opt.calibration.kv_scales import KvScales, ScaleZero
from vacc_opt.runtime.artifact import MANIFEST
from vacc_opt.runtime.compile import find_tokenizer
from vacc_opt.runtime.memory import PeakMemory

RESULTS = Path(__file__).with_name("full_size.md")
TEXT = Path(__file__).parents[1] / "examples/data/jargon_calibration.txt"
SECOND_RUN, ALL_OF_FP16, PLAN_SECONDS, PLAN_BYTES, FLAT = 5.0, 150.0, 180.0, 2e9, 1.05
SAMPLES, TOKENS = 4, 512  # of text, to calibrate on
COPIES = {"fp16": 2.5, "int8": 4.0, "kv8": 2.5}  # how often the checkpoint may be copied while the artifact is written
BASE_BYTES = 1.2e9  # of memory, beside twice the largest tensor
QUANTIZE = {"fp16": "", "int8": "  quantize:\n    type: w8a16\n", "kv8": "  quantize:\n    type: w16kv8\n"}
YAML = """\
name: {name}
frontend:
  checkpoint: {checkpoint}
  type: huggingface
  shape:
    input_ids: [[1024], [2048]]
  model_kwargs:
    tp: {tp}
    b2s: true
    model_arch: vacc
{quantize}backend:
  type: tvm_vacc
  dtype: {dtype}
  merge_params: true
  compile:
    data_type: 0
    gather_data_vccl_dsp_enable: true
workspace:
  path: {out}
  workers: 2
"""


@dataclass(frozen=True)
class Case:
    """A model of ``layers`` layers (its own number by default) under a configuration for ``tp`` ranks."""

    model: str
    kind: str
    layers: int | None = None
    tp: int = 4
    plan_only: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """Entries of config.json; of kv8 with the scales where upstream looks for them."""
        found = with_layers(CONFIGS[self.model], self.layers) if self.layers else CONFIGS[self.model]
        return found | ({"kv_cache_path": "kv_scales.pth"} if self.kind == "kv8" else {})

    @property
    def depth(self) -> int:
        """Layers."""
        return int(self.config.get("num_layers") or self.config["num_hidden_layers"])

    @property
    def most_bytes(self) -> float:
        """The limit of memory: twice the largest tensor in fp16, and a constant."""
        largest = max(math.prod(shape) for shape in shapes_of(self.config).values())
        return PLAN_BYTES if self.plan_only else BASE_BYTES + 2 * 2 * largest

    def __str__(self) -> str:
        return f"{self.model} {self.kind}, {self.depth} layers, tp {self.tp}{', plan only' if self.plan_only else ''}"


CASES = (
    Case("chatglm2-6b", "fp16", 8),
    Case("chatglm2-6b", "fp16"),
    Case("chatglm2-6b", "int8"),
    Case("chatglm2-6b", "kv8"),
    Case("chatglm2-6b", "fp16", 64),
    Case("Llama-3-8B", "fp16"),
    Case("Llama-3-8B", "int8"),
    Case("Qwen2.5-7B", "fp16"),
    Case("Qwen2.5-7B", "int8"),
    Case("Qwen2-72B", "int8", tp=8, plan_only=True),
)
CALIBRATED = Case("chatglm2-6b", "kv8")


@dataclass
class Row:
    """What a case took; seconds, and bytes of the process tree. ``missed`` names the limits that did not hold."""

    case: Case
    weights: int = 0
    copy: float = 0.0
    first: float = 0.0
    export: float = 0.0
    write: float = 0.0
    peak: int = 0
    again: float = 0.0
    prefill: float = 0.0
    elsewhere: float = 0.0
    missed: list[str] = field(default_factory=list)

    def hold(self, what: str, value: float, most: float) -> None:
        """Keep a limit that ``value`` exceeds."""
        if value > most:
            self.missed.append(f"{what} {value:.3g} > {most:.3g}")

    def cells(self) -> list[str]:
        """The cells of the table."""
        times = [self.copy, self.first, self.export, self.write]
        seconds = [f"{t:.1f}" if t else "-" for t in times]
        ratio = f"{self.write / self.copy:.2f}" if self.copy else "-"
        rest = [f"{t:.1f}" if t else "-" for t in (self.again, self.prefill, self.elsewhere)]
        memory = f"{self.peak / 1e9:.2f} (<= {self.case.most_bytes / 1e9:.2f})"
        held = "; ".join(self.missed) or "all"
        return [str(self.case), f"{self.weights / 1e9:.2f}", *seconds, ratio, memory, *rest, held]


HEAD = ["case", "weights, GB", "cp + sync, s", "compile, s", "export, s", "write, s", "write / cp", "peak memory, GB"]
HEAD += ["again, s", "other prefill, s", "same bytes elsewhere, s", "limits held"]


def say(text: str) -> None:
    """A line of progress with the time of day; results go to the table."""
    click.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True)


@contextmanager
def directory(root: Path, name: str) -> Iterator[Path]:
    """A fresh directory that is removed behind the block."""
    path = root / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def copy_seconds(source: Path, root: Path) -> float:
    """Time of ``cp -r`` and ``sync`` of a directory."""
    with directory(root, "copy") as target:
        subprocess.run(["sync"], check=True)
        started = time.perf_counter()
        subprocess.run(["cp", "-r", str(source), str(target)], check=True)
        subprocess.run(["sync"], check=True)
        return time.perf_counter() - started


def compiled(config: Path, *arguments: str, seed: int = 0) -> tuple[dict[str, Any], float, int]:
    """The report of ``vacc-opt compile``, its seconds, and the peak bytes of its processes."""
    return finished([sys.executable, "-m", "vacc_opt.cli.main", "compile", str(config), "--json", *arguments], seed)


def finished(command: Sequence[str], seed: int = 0) -> tuple[dict[str, Any], float, int]:
    """What a command prints as JSON, its seconds, and the peak bytes of its processes; ``seed`` is that of hashes."""
    started = time.perf_counter()
    with PeakMemory() as peak:
        before = peak.bytes
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found, seconds, peak.bytes - before


def seconds_of(report: dict[str, Any], step: str) -> float:
    """Seconds of a step of a report; 0 for one that was not taken."""
    return sum(float(one["seconds"]) for one in report["steps"] if one["name"] == step)


def scales_of(case: Case) -> KvScales:
    """Scales for keys and values of magnitude about 8, a little different for each channel."""
    config = case.config
    groups = config.get("multi_query_group_num") or config["num_key_value_heads"]
    width = (
        config.get("kv_channels") or config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )
    scale = np.linspace(0.05, 0.07, groups * width, dtype=np.float32).reshape(groups, width)
    one = ScaleZero(scale, np.zeros_like(scale))
    return KvScales({(layer, part): one for layer in range(case.depth) for part in ("key", "value")})


def stored(artifact: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of the weight files: they stay when no weight is written."""
    return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in artifact.glob("rank*.safetensors")}


def measure(case: Case, root: Path) -> Row:
    """Run a case under ``root``; everything that it writes there is removed."""
    row = Row(case)
    with directory(root, "checkpoint") as checkpoint, directory(root, "out") as out:
        say(f"{case}: make the checkpoint")
        row.weights = write_checkpoint(case.config, checkpoint, sparse=case.plan_only)
        if case.kind == "kv8":
            write_pth(checkpoint / "kv_scales.pth", scales_of(case))
        config = root / "model.yaml"
        name = case.model.lower()
        dtype = "fp16" if case.kind == "fp16" else "int8"
        fields = {"name": name, "checkpoint": checkpoint, "tp": case.tp, "dtype": dtype, "out": out}
        config.write_text(YAML.format(**fields, quantize=QUANTIZE[case.kind]))
        if not case.plan_only:
            say(f"{case}: cp and sync")
            row.copy = copy_seconds(checkpoint, root)
        say(f"{case}: compile")
        report, row.first, row.peak = compiled(config, *(["--plan-only"] if case.plan_only else []))
        row.export, row.write = seconds_of(report, "export"), seconds_of(report, "write")
        row.hold("peak memory", row.peak, case.most_bytes)
        if case.plan_only:
            row.hold("seconds", row.first, PLAN_SECONDS)
            return row
        row.hold("write / cp", row.write / row.copy, COPIES[case.kind])
        if case.kind == "fp16" and case.layers is None:
            row.hold("seconds", row.first, ALL_OF_FP16)
        say(f"{case}: compile again")
        _, row.again, _ = compiled(config)
        row.hold("second run", row.again, SECOND_RUN)
        if case.layers is None and case.model == "chatglm2-6b":
            say(f"{case}: in another directory, with another hash seed, in one process")
            with directory(root, "elsewhere") as other:
                keys = ("-D", f"workspace.path={other}", "-D", "workspace.workers=1")
                _, row.elsewhere, _ = compiled(config, *keys, seed=7)
                one, same = ((path / name / MANIFEST).read_bytes() for path in (out, other))
            if one != same:
                row.missed.append("other bytes elsewhere")
        say(f"{case}: another prefill length")
        before = stored(out / name)
        _, row.prefill, _ = compiled(config, "-D", "frontend.shape.input_ids=[[512], [2048]]")
        if stored(out / name) != before:
            row.missed.append("weights were written again for another prefill length")
    return row


def calibrated(case: Case, root: Path) -> tuple[float, int]:
    """Seconds a text and peak bytes of ``vacc-opt calibrate`` for KV scales; the tokenizer is another model's."""
    with directory(root, "checkpoint") as checkpoint, directory(root, "out") as out:
        say(f"{case}: calibrate")
        write_checkpoint(CONFIGS[case.model], checkpoint)
        tokenizer = find_tokenizer(SMOLLM2)
        assert tokenizer is not None
        tokenizer.save(checkpoint)
        config = root / "model.yaml"
        fields = {"name": "calibrated", "checkpoint": checkpoint, "tp": case.tp, "dtype": "int8", "out": out}
        dataset = f"dataset:\n  name: text\n  path: {TEXT}\n  nsamples: {SAMPLES}\n  seqlen: {TOKENS}\n"
        config.write_text(YAML.format(**fields, quantize=QUANTIZE["kv8"]) + dataset)
        command = [sys.executable, "-m", "vacc_opt.cli.main", "calibrate", str(config), "--json"]
        report, _, peak = finished(command)
        return float(report["seconds_a_text"]), peak


def flat(rows: Sequence[Row]) -> list[str]:
    """Models whose peak memory depends on the number of layers."""
    peaks = [row.peak for row in rows if row.case.model == "chatglm2-6b" and row.case.kind == "fp16"]
    if len(peaks) < 2:
        return []
    ratio = max(peaks) / min(peaks)
    text = (
        f"Peak memory of chatglm2-6b fp16 over the numbers of layers: largest / smallest = {ratio:.3f} (limit {FLAT})."
    )
    return [text]


def calibration_note(seconds: float, peak: int) -> str:
    """What calibrating took, in a sentence."""
    memory = f"{peak / 1e9:.2f} GB at most (limit {CALIBRATED.most_bytes / 1e9:.2f})"
    return f"KV scales of {CALIBRATED.model}: {seconds:.1f} s a text of {TOKENS} tokens ({SAMPLES} texts), {memory}."


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The page that is kept, with what it was measured on."""
    cores = os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    machine = f"on {cores} cores with {memory:.0f} GB of memory"
    intro = f"`make bench-full`, {machine}. Weights are random, names and shapes the published ones."
    return "\n\n".join(["# Compilations at full size", intro, table(rows), *notes]) + "\n"


@click.command()
@click.option(
    "--only", multiple=True, help="Run the cases whose name holds this text; repeatable, prints the table only."
)
@click.option("--work", type=click.Path(path_type=Path), help="Where to write 60 GB; a temporary directory by default.")
def main(only: tuple[str, ...], work: Path | None) -> None:
    """Measure every case; exit code 1 when a limit does not hold."""
    rows: list[Row] = []
    chosen = [case for case in CASES if not only or any(text in str(case) for text in only)]
    with tempfile.TemporaryDirectory(dir=work) as root:
        for case in chosen:
            rows.append(measure(case, Path(root)))
            click.echo(" | ".join(rows[-1].cells()))
        notes = flat(rows)
        if not only:
            notes.append(calibration_note(*calibrated(CALIBRATED, Path(root))))
            say("onnxruntime-genai beside vacc-opt")
            with directory(Path(root), "genai") as folder:
                notes.append(beside_genai(folder))
    if len(chosen) == len(CASES):
        RESULTS.write_text(page(rows, notes), encoding="utf-8")
    click.echo(page(rows, notes))
    peaks = [row.peak for row in rows if row.case.model == "chatglm2-6b" and row.case.kind == "fp16"]
    if any(row.missed for row in rows) or (peaks and max(peaks) > FLAT * min(peaks)):
        sys.exit(1)


if __name__ == "__main__":
    main()

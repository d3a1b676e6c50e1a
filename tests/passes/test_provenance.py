"""Nothing loses its history: every node and constant keeps an origin and names the passes that made or changed it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from vacc_opt.ir import Graph, Literal, Node, Value
from vacc_opt.ir.origins import name_origins, without_origin
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.storage import write_safetensors
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import InvalidGraph
from vacc_opt.passes.infra.author.examples import doc_of
from vacc_opt.passes.infra.base import Kind, Outcome, Pass
from vacc_opt.passes.infra.instrument import Instrument, PassRecord, Step
from vacc_opt.passes.infra.keep_origins import KeepOrigins
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.registry import all_passes

DEFAULT = (
    "simplify,fuse-rms-norm,fuse-rotary{positions=64},split-packed-linear,fuse-gqa,fuse-swiglu,slice-last-token,"
    "kv-cache{context=64},w8a16,kv8{scales=SCALES},cast-float,split-tp{tp=3},legalize"
)


def own_passes() -> list[str]:
    """The passes that ship, without those that other tests register."""
    return [name for name, cls in all_passes().items() if cls.__module__.startswith("vacc_opt.passes.")]


@pytest.fixture(scope="session")
def scales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KV scales of the tiny Llama: 2 layers, 2 KV heads of 16 channels."""
    names = [f"layers.{i}.{part}.{what}" for i in range(2) for part in ("key", "value") for what in ("scale", "zero")]
    path = tmp_path_factory.mktemp("scales") / "kv_scales.safetensors"
    tensors = {name: Literal(np.full((2, 16), 0.1 + i, np.float32)) for i, name in enumerate(names)}
    write_safetensors(path, tensors)
    return path


def state(graph: Graph) -> dict[Node | Value, object]:
    """What a pass may change of each node and constant in place; equal replacements of operands do not count."""
    found: dict[Node | Value, object] = {v: str(v.const) for v in graph.constants()}
    for node in graph.nodes():
        weights = [str(v.const) for v in node.inputs if v is not None and v.is_const]
        found[node] = node.op, str(node.attributes), [str(v.type) for v in node.outputs], weights
    return found


class Watch(Instrument):
    """Collects what a pass made or changed without saying so, and what it left without an origin."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.passes = 0

    def before(self, step: Step, graph: Graph) -> None:
        self._before = state(graph)

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        self.passes += 1
        name = step.item.name
        self.problems += [f"{name}: {problem}" for problem in without_origin(graph)]
        for one, now in state(graph).items():
            changed = self._before.get(one) != now
            if changed and name not in one.provenance.passes and not self._folded(one, now):
                self.problems.append(f"{name} changed {one!r}, which names {one.provenance.passes}")
            self.problems += [f"{p!r} is no pass" for p in one.provenance.passes if p not in all_passes()]

    def _folded(self, one: Node | Value, now: Any) -> bool:
        """A node that reads an equal constant under another name, or a computed operand that became a constant."""
        before: Any = self._before.get(one)
        return isinstance(one, Node) and before is not None and before[:3] == now[:3]


def check(graph: Graph, *pipelines: str) -> None:
    watch = Watch()
    for pipeline in pipelines:
        run_pipeline(graph, pipeline, instruments=[watch, KeepOrigins()])
    assert watch.problems == []
    assert watch.passes


def test_the_whole_pipeline_and_both_phases_keep_every_history(llama: Any, scales: Path) -> None:
    graph = llama.fresh()
    assert list(without_origin(graph)) == []
    pipeline = DEFAULT.replace("SCALES", str(scales))
    check(graph, pipeline, "prefill{seq=16}(simplify),decode(simplify)")
    weight = graph.values["model.layers.0.self_attn.q_proj.qweight"]
    assert weight.provenance.passes == ("w8a16", "split-tp")
    assert [(o.module, o.source) for o in weight.provenance.origins] == [
        ("model.layers.0.self_attn.q_proj.weight", "model.safetensors:model.layers.0.self_attn.q_proj.weight")
    ]
    scale = graph.values["past_key_values.1.key.scale"]
    assert scale.provenance.origins[0].source == "kv_scales.safetensors:layers.1.key.scale"
    assert "model.rotary_emb" in {o.module for o in graph.values["rotary_cos"].provenance.origins}
    # what a module does is found under its path, and only there
    for layer in (0, 1):
        inside = [n.op for n in graph.nodes() if n.provenance.origins[0].module == f"model.layers.{layer}.mlp.up_proj"]
        assert inside == ["Vastai::QuantizedLinearPerChannel"]


@pytest.mark.parametrize("name", own_passes())
def test_every_pass_keeps_it_on_the_example_of_its_documentation(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"layers.0.key.{what}": Literal(np.full((1, 2), 0.5, np.float32)) for what in ("scale", "zero")}
    write_safetensors(tmp_path / "kv.safetensors", tensors)  # what the example of kv8 names
    write_safetensors(tmp_path / "ranges.safetensors", {"product": Literal(np.array([1e5], np.float32))})
    monkeypatch.chdir(tmp_path)
    examples = doc_of(all_passes()[name]).examples
    assert examples
    for example in examples:
        graph = from_text(example.before)
        name_origins(graph)
        check(graph, example.spec)


def test_passes_are_named_in_the_order_in_which_they_ran(llama: Any, scales: Path) -> None:
    graph = llama.fresh()
    pipeline = DEFAULT.replace("SCALES", str(scales))
    run_pipeline(graph, pipeline)
    order = [item.partition("{")[0] for item in pipeline.split(",")]
    for one in (*graph.nodes(), *graph.constants()):
        ran = [order.index(name) for name in one.provenance.passes]
        assert ran == sorted(ran), one


def test_histories_survive_the_text_form(llama: Any, scales: Path) -> None:
    graph = llama.fresh()
    run_pipeline(graph, DEFAULT.replace("SCALES", str(scales)))
    again = from_text(to_text(graph))
    assert {v.name: v.provenance for v in again.constants()} == {v.name: v.provenance for v in graph.constants()}
    assert list(without_origin(again)) == []


@dataclass(frozen=True)
class LosesOrigins(Pass):
    """Adds a node outside of any application."""

    name: ClassVar[str] = "loses-origins"
    kind: ClassVar[Kind] = Kind.EXACT

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """No sources, so no origin."""
        rw.insert_after(graph.outputs["logits"], lambda value: rw.op.Identity(value))
        return Outcome()


def test_a_pass_that_loses_an_origin_is_named_and_taken_back(eager_llama: Any) -> None:
    graph = eager_llama.fresh()
    before = to_text(graph)
    with pytest.raises(InvalidGraph, match=r"after loses-origins: .* <Identity Identity\S*> has no origin"):
        run_pipeline(graph, [LosesOrigins()], instruments=[KeepOrigins()])
    assert to_text(graph) == before

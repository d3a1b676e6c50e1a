"""Everything in a graph has an origin: importers make one of names, text and ONNX files carry it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from vacc_opt.frontends import load_onnx
from vacc_opt.ir import Graph
from vacc_opt.ir.onnx_proto import from_onnx, to_onnx
from vacc_opt.ir.origins import name_origins, without_origin
from vacc_opt.ir.provenance import Origin, Provenance
from vacc_opt.ir.storage import save_onnx
from vacc_opt.ir.tensor import Codes, PerRank, Scales, Sliced, Source
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import InvalidGraph, verify, verify_origins

TEXT = """
g (float[4,8] x) => (float[4,8] y) {
    h = MatMul (x, w)
    y = Add (h, one)
}
# const "w" = Source('/models/a.safetensors', 64, 'float', (8, 8), 'fc.weight')
# const "one" = Literal('float', (), 'AACAPw==')
"""
HISTORY = Provenance((Origin("fc.weight", "a.gguf:blk.0", "Q4_1[8,8]"),), ("w8a16", "split-tp"))


@pytest.fixture
def graph() -> Graph:
    return from_text(TEXT)


def test_what_has_no_origin_is_named(graph: Graph) -> None:
    assert list(without_origin(graph)) == [
        "<MatMul h> has no origin",
        "<Add y> has no origin",
        "constant 'one' has no origin",
        "constant 'w' has no origin",
    ]
    name_origins(graph)
    assert list(without_origin(graph)) == []


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("/model/layers.0/mlp/MatMul_1", "model.layers.0.mlp"),
        ("MatMul_7", "MatMul_7"),
        ("/MatMul", "MatMul"),
        ("", "h"),
        ("//", "//"),
    ],
)
def test_a_bare_node_comes_from_the_scope_that_its_name_tells(graph: Graph, name: str, module: str) -> None:
    node = graph.nodes()[0]
    node.name = name
    name_origins(graph)
    assert node.provenance == Provenance((Origin(module, "", "MatMul"),))


def test_a_weight_comes_from_its_file_and_another_constant_from_its_first_reader(graph: Graph) -> None:
    name_origins(graph)
    assert graph.values["w"].provenance.origins == (Origin("w", "a.safetensors:fc.weight", "float[8,8]"),)
    assert graph.values["one"].provenance.origins == (Origin("y", "", "Add"),)


def test_what_is_known_already_is_kept(graph: Graph) -> None:
    graph.values["w"].provenance = graph.nodes()[0].provenance = HISTORY
    name_origins(graph)
    assert graph.values["w"].provenance == graph.nodes()[0].provenance == HISTORY


def test_the_history_of_constants_survives_text_and_onnx(graph: Graph) -> None:
    for name in ("w", "one"):
        graph.values[name].provenance = HISTORY
    text = from_text(to_text(graph))
    model = from_onnx(to_onnx(graph), {"w": graph.values["w"].const})  # type: ignore[dict-item]
    assert text.values["w"].provenance == text.values["one"].provenance == HISTORY
    assert model.values["one"].provenance == HISTORY
    assert to_text(text) == to_text(graph)


def test_an_onnx_file_says_of_each_weight_where_it_came_from_and_what_it_is_made_of(tmp_path: Path) -> None:
    data = tmp_path / "fc.bin"
    data.write_bytes(np.linspace(-1, 1, 32, dtype=np.float32).tobytes())
    weight = Source(str(data), 0, "float", (8, 4), "fc.weight")
    graph = from_text(
        "g (float[2,4] x) => (float[2,4] y) { y = Vastai.QuantizedLinearPerChannel (x, q, s) }\n"
        f'# const "q" = {PerRank(tuple(Sliced(Codes(weight), (i, 0), (i + 4, 4)) for i in (0, 4)))}\n'
        f'# const "s" = {PerRank(tuple(Sliced(Scales(weight), (i,), (i + 4,)) for i in (0, 4)))}\n'
        "# meta ranks = 2\n"
    )
    graph.values["q"].provenance = HISTORY
    save_onnx(graph, tmp_path / "rank1.onnx", rank=1)
    again = load_onnx(tmp_path / "rank1.onnx")
    codes = again.values["q"].const
    assert isinstance(codes, Source)
    assert codes.name == "codes(fc.weight)[4:8]"
    assert again.values["q"].provenance == HISTORY
    assert str(tmp_path).encode() not in (tmp_path / "rank1.onnx").read_bytes()
    onnx.checker.check_model(str(tmp_path / "rank1.onnx"))


def test_a_plain_onnx_file_gets_origins_on_import(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.ones((64, 48), np.float32).tobytes())
    graph = from_text(
        "g (float[64,48] x) => (float[64,48] y) { h = Neg (x) y = Add (h, w) }\n"
        f'# const "w" = {Source(str(tmp_path / "w.bin"), 0, "float", (64, 48))}\n'
    )
    onnx.save(to_onnx(graph, lambda value: ("w.bin", 0, 64 * 48 * 4), provenance=False), tmp_path / "plain.onnx")
    found = load_onnx(tmp_path / "plain.onnx")
    assert list(without_origin(found)) == []
    assert found.values["w"].provenance.origins == (Origin("w", "w.bin:w", "float[64,48]"),)


def test_the_verifier_names_what_has_no_origin_when_asked(graph: Graph) -> None:
    verify(graph)
    with pytest.raises(InvalidGraph, match=r"after fuse-x: .* <MatMul h> has no origin; <Add y> has no origin"):
        verify(graph, after="fuse-x", origins=True)
    with pytest.raises(InvalidGraph, match="constant 'one' has no origin"):
        verify_origins(graph)
    name_origins(graph)
    verify(graph, origins=True)

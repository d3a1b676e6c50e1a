"""Weight files: the safetensors package reads them, equal inputs give equal bytes, an error leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from vacc_opt.ir import Graph, Literal, Source, UserError
from vacc_opt.ir.storage import read_safetensors_header, save_onnx, stored_tensors, write_safetensors
from vacc_opt.ir.tensor import Codes, PerRank, Scales, TensorExpr, Transposed
from vacc_opt.ir.text import from_text


def weight(rows: int = 6, columns: int = 5) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((rows, columns)).astype(np.float32)


def linear(path: Path, rows: int = 6) -> Graph:
    """Y = x w^T with w [rows, 5] in a file beside."""
    save_file({"w": weight(rows)}, path / "source.safetensors")
    source = read_safetensors_header(path / "source.safetensors")["w"]
    return from_text(
        f"""
        g (float[B,5] x) => (float[B,{rows}] y) {{
            t = Transpose <perm = [1, 0]> (w)
            y = MatMul (x, t)
        }}
        # const "w" = {source}
        """.replace("        #", "#")
    )


def test_the_safetensors_package_reads_what_is_written(tmp_path: Path) -> None:
    base = Literal(weight())
    tensors: dict[str, TensorExpr] = {
        "turned": Transposed(base, (1, 0)),
        "codes": Codes(base),
        "scale": Scales(base),
        "ids": Literal(np.arange(3)),
        "scalar": Literal(np.array(2.5, np.float16)),
        "mask": Literal(np.array([True, False])),
        "empty": Literal(np.zeros((0, 4), np.float32)),
    }
    path = tmp_path / "w.safetensors"
    offsets = write_safetensors(path, tensors)
    with safe_open(path, "numpy") as file:
        assert sorted(file.keys()) == sorted(tensors)
        for name, expr in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name), expr.read())
    data = path.read_bytes()
    for name, expr in tensors.items():
        assert data[offsets[name] : offsets[name] + expr.nbytes] == expr.read().tobytes()


def test_bfloat16_is_stored_as_such(tmp_path: Path) -> None:
    values = weight().astype(ml_dtypes.bfloat16)
    write_safetensors(tmp_path / "w", {"w": Literal(values)})
    source = read_safetensors_header(tmp_path / "w")["w"]
    np.testing.assert_array_equal(source.read(), values)


def test_what_is_written_reads_back_as_sources(tmp_path: Path) -> None:
    path = tmp_path / "w"
    offsets = write_safetensors(path, {"a": Literal(weight()), "b": Literal(np.arange(7, dtype=np.int8))})
    header = read_safetensors_header(path)
    assert header["a"] == Source(str(path), offsets["a"], "float", (6, 5))
    np.testing.assert_array_equal(header["b"].read(), np.arange(7))


def test_the_order_of_the_mapping_does_not_change_the_bytes(tmp_path: Path) -> None:
    tensors = {"b": Literal(weight()), "a": Literal(np.arange(3))}
    write_safetensors(tmp_path / "1", tensors)
    write_safetensors(tmp_path / "2", dict(reversed(tensors.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("size", [0, 4, 30, 200])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"w": Literal(weight(20))})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"w\.safetensors: .*truncated"):
        read_safetensors_header(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_safetensors_header(tmp_path / "none")


def test_a_saved_model_runs_on_onnxruntime_with_its_weights_beside(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save_onnx(linear(tmp_path), out / "m.onnx")
    assert sorted(p.name for p in out.iterdir()) == ["m.onnx", "m.safetensors"]
    assert (out / "m.onnx").stat().st_size < 1000
    onnx.checker.check_model(str(out / "m.onnx"))
    session = ort.InferenceSession(out / "m.onnx", providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    # five products in another order
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight().T, atol=1e-6)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_onnx(linear(tmp_path), tmp_path / name / "m.onnx")
        files.append([(tmp_path / name / f).read_bytes() for f in ("m.onnx", "m.safetensors")])
    assert files[0] == files[1]


def test_each_rank_is_saved_with_its_own_weights(tmp_path: Path) -> None:
    graph = linear(tmp_path)
    halves = [Literal(weight()[:3]), Literal(weight()[3:])]
    graph.values["w"].const = PerRank(tuple(halves))
    for rank, half in enumerate(halves):
        np.testing.assert_array_equal(stored_tensors(graph, rank)["w"].read(), half.array)


def test_an_error_while_weights_are_read_leaves_nothing_and_names_the_weight(tmp_path: Path) -> None:
    graph = linear(tmp_path)
    (tmp_path / "source.safetensors").write_bytes(b"")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=r"weight w: .*truncated"):
        save_onnx(graph, out / "m.onnx")
    assert list(out.iterdir()) == []


def test_an_error_while_the_model_is_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = linear(tmp_path)
    out = tmp_path / "out"
    out.mkdir()

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        save_onnx(graph, out / "m.onnx")
    assert list(out.iterdir()) == []


def test_an_error_leaves_the_earlier_files_as_they_were(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save_onnx(linear(tmp_path), out / "m.onnx")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    graph = linear(tmp_path, rows=8)
    (tmp_path / "source.safetensors").write_bytes(b"")
    with pytest.raises(UserError):
        save_onnx(graph, out / "m.onnx")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before

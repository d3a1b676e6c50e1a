"""Evaluation: the figures by their definitions, on graphs and artifacts that are known to be equal or not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vacc_opt.cli.main import main
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.runtime.artifact import Artifact
from vacc_opt.runtime.eval import EvalOptions, EvalReport, evaluate_models, windows_of
from vacc_opt.runtime.quality import Estimate, divergences, measure, token_losses
from vacc_opt.runtime.subjects import Ids, Observed, Subject
from vacc_opt.runtime.tokenizer import load_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps until noon. " * 3
EXAMPLES = Path(__file__).parents[2] / "examples"
KV = "kv-cache{context=48}"


class Fixed(Subject):
    """Gives the same logits for every window."""

    def __init__(self, name: str, logits: np.ndarray) -> None:
        self.name, self.logits = name, logits

    def observe(self, windows: Sequence[Ids], *, signals: bool = True) -> Iterator[Observed]:
        for ids in windows:
            yield Observed(self.logits[: len(ids)], {(0, "residual"): self.logits[: len(ids)]})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    return path


def evaluated(text: Path, *models: Path, **options: object) -> EvalReport:
    return evaluate_models(EvalOptions(tuple(map(str, models)), text, threads=1, **options))  # type: ignore[arg-type]


def test_losses_and_divergences_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.standard_normal((2, 70, 11))
    ids = rng.integers(0, 11, 70)
    share = np.exp(p) / np.exp(p).sum(1, keepdims=True)
    other = np.exp(q) / np.exp(q).sum(1, keepdims=True)
    np.testing.assert_allclose(token_losses(p, ids), -np.log(share[np.arange(69), ids[1:]]), rtol=1e-12)
    apart, changed = divergences(p, q)
    np.testing.assert_allclose(apart, (share * np.log(share / other)).sum(1), rtol=1e-12)
    assert changed == (p.argmax(1) != q.argmax(1)).sum()


def test_a_model_does_not_differ_from_itself_and_scaled_noise_has_its_ratio() -> None:
    logits = np.random.default_rng(1).standard_normal((32, 9))
    windows = [np.arange(32) % 9, np.arange(20) % 9]
    (same, louder), perplexity = measure(
        [Fixed("same", logits), Fixed("louder", logits * 1.01)], windows, Fixed("reference", logits)
    )
    assert (same.kl, same.flips, same.perplexity_change) == (0, 0, 0)
    assert same.perplexity == perplexity == math.exp(np.concatenate([token_losses(logits, w) for w in windows]).mean())
    assert same.layers[0].decibels is None
    assert louder.layers[0].decibels == pytest.approx(40, abs=1e-6)  # noise of 1 % is 20 log10(100) dB
    assert louder.flips == 0
    assert louder.kl is not None
    assert louder.kl > 0


def test_the_standard_error_is_that_of_a_mean_of_equal_windows() -> None:
    values = np.random.default_rng(2).standard_normal(40)
    found = Estimate.of(list(values), [512] * 40)
    assert found.mean == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(40))
    assert Estimate.of([1.0], [5]).interval == (1.0, 1.0)


def test_an_unquantized_artifact_is_its_model_whichever_way_it_is_run(
    plain: Artifact, exported: Path, text: Path
) -> None:
    found = {
        name: evaluated(text, plain.path, reference=str(exported), tokens=90, **options)
        for name, options in {
            "prefill": {},
            "decode": {"chunk": 1},
            "schedule": {"engine": "schedule"},
        }.items()
    }
    assert [one.models[0].chunk for one in found.values()] == [16, 1, 1]
    for report in found.values():
        (model,) = report.models
        assert (report.window, report.windows) == (48, 2)
        assert model.perplexity == pytest.approx(report.reference_perplexity, rel=1e-5)
        assert model.kl is not None
        assert model.kl < 1e-9  # fp32 in another order
        assert model.flips == 0
    # fp32 keeps 24 bits: 80 dB is 1e-4 of a value
    layers = found["prefill"].models[0].layers
    assert {(one.layer, one.signal) for one in layers} == {(i, s) for i in (0, 1) for s in ("residual", "attention")}
    assert all(one.decibels is None or one.decibels > 80 for one in layers)


def test_a_last_call_that_is_not_full_counts_its_tokens_once(exported: Path, text: Path) -> None:
    whole, chunked = (
        evaluated(text, exported, reference=str(exported), passes=(KV,), tokens=45, chunk=chunk).models[0]
        for chunk in (0, 16)
    )
    assert chunked.chunk == 16
    assert chunked.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    assert max(whole.kl or 0, chunked.kl or 0) < 1e-9


def test_windows_are_decoded_together_but_read_whole_one_by_one(
    exported: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of a whole window are many numbers, which every window in a call would multiply."""
    calls: set[tuple[int, ...]] = set()
    run = Executable.run

    def seen(self: Executable, feeds: Mapping[str, np.ndarray], *rest: Any) -> list[dict[str, np.ndarray]]:
        calls.update([feeds["input_ids"].shape] if "input_ids" in feeds else [])
        return run(self, feeds, *rest)

    monkeypatch.setattr(Executable, "run", seen)
    evaluated(text, exported, passes=(KV,), decoded=(KV,), tokens=80, window=24)
    assert {one for one in calls if one[1] == 24} == {(1, 24)}  # three windows of 24 tokens
    assert (3, 1) in calls


def test_windows_that_are_decoded_together_are_those_decoded_alone(exported: Path, text: Path) -> None:
    int8 = f"{KV},w8a16"
    options = {"reference": str(exported), "tokens": 80, "window": 24}
    whole, decoded = evaluated(text, exported, passes=(int8,), decoded=(int8,), **options).models
    assert (decoded.name, decoded.chunk, whole.chunk) == (f"{int8} token by token", 1, 0)
    assert decoded.kl == pytest.approx(whole.kl, rel=1e-3)  # a KL of 1e-3 from logits in fp32
    assert decoded.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    for one, other in zip(decoded.layers, whole.layers, strict=True):
        assert one.decibels == pytest.approx(other.decibels, abs=0.01)


def test_distributions_are_compared_in_the_first_windows_only(exported: Path, text: Path) -> None:
    options = {"reference": str(exported), "passes": ("w8a16",), "window": 24}
    whole, part, short = (
        evaluated(text, exported, **options, **more)
        for more in ({"tokens": 80}, {"tokens": 80, "kl_tokens": 30}, {"tokens": 48})
    )
    assert (whole.compared, part.compared, part.tokens) == (80, 48, 80)
    found, expected = part.models[0], short.models[0]
    assert (found.kl, found.kl_interval, found.flips) == (expected.kl, expected.kl_interval, expected.flips)
    assert (found.by_position, found.layers) == (expected.by_position, expected.layers)
    assert found.perplexity_interval == whole.models[0].perplexity_interval
    assert "KL, top-1 and SNR of the first 48 tokens" in part.lines()[1]


def test_int8_on_two_ranks_is_measured_on_the_stream_that_all_ranks_hold(
    artifact: Artifact, exported: Path, text: Path
) -> None:
    (model,) = evaluated(text, artifact.path, reference=str(exported), tokens=48).models
    assert model.kl is not None
    assert 0 < model.kl < 0.05
    assert [(one.layer, one.signal) for one in model.layers] == [(0, "residual"), (1, "residual")]
    assert all(one.decibels is not None and 20 < one.decibels < 60 for one in model.layers)


def test_every_pipeline_is_a_model_of_its_own(exported: Path, text: Path) -> None:
    report = evaluated(text, exported, reference=str(exported), passes=("w8a16", KV), tokens=48)
    int8, same = report.models
    assert [int8.name, same.name] == ["w8a16", KV]
    assert (int8.kl or 0) > 1e-7 > (same.kl or 0)


def test_windows_cover_the_text_and_begin_with_bos_where_the_model_wants_it(exported: Path, text: Path) -> None:
    tokenizer = load_tokenizer(exported.parent)
    ids = tokenizer.encode(TEXT)
    windows = windows_of(text, tokenizer, 32)
    assert np.concatenate(windows).tolist() == ids
    tokenizer.add_bos = True
    with_bos = windows_of(text, tokenizer, 32)
    assert {len(one) for one in with_bos[:-1]} == {32}
    assert [int(one[0]) for one in with_bos] == [257] * len(with_bos)
    assert np.concatenate([one[1:] for one in with_bos]).tolist() == ids


def test_a_logit_that_is_not_a_number_is_a_failed_check() -> None:
    with pytest.raises(CheckError, match="NaN or infinite"):
        measure([Fixed("bad", np.full((8, 4), np.nan))], [np.zeros(8, np.int64)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": Path("nowhere.txt")}, r"nowhere\.txt: cannot read the text: No such file"),
        ({"window": 64}, "holds 48 tokens, a window has 64"),
        ({"passes": ("w8a16",)}, "is compiled already"),
        ({"chunk": 5}, "a call takes 16 tokens, not 5"),
        ({"engine": "schedule", "chunk": 16}, "measured token by token"),
    ],
)
def test_what_cannot_be_evaluated_is_said(
    plain: Artifact, text: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_models(EvalOptions(**{"models": (str(plain.path),), "text": text, **options}))  # type: ignore[arg-type]


def test_what_a_checkpoint_cannot_do_is_said(exported: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes the window at once"):
        evaluated(text, exported, chunk=1)
    with pytest.raises(UserError, match="only an artifact has a schedule"):
        evaluated(text, exported, engine="schedule")
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(UserError, match="1 tokens are too few"):
        evaluated(tmp_path / "short.txt", exported)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8 text"):
        evaluated(tmp_path / "latin.txt", exported)


def test_the_command_prints_a_table_an_object_and_a_page(
    artifact: Artifact, exported: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    arguments = ["eval", str(artifact.path), "--text", str(text), "--reference", str(exported), "--tokens", "48"]
    assert main([*arguments, "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "48 tokens of fox.txt in 1 windows of 48, engine onnxruntime" in shown
    assert f"-> {page}" in shown
    for layer in (0, 1):
        (plot,) = page.read_text().split(f'id="layer-{layer}">')[1:]
        assert plot.partition("</svg>")[0].count("<polyline") == 2
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"][0]["name"] == "tiny"
    assert found["tokens"] == sum(high - low + 1 for low, high, _ in found["models"][0]["by_position"]) == 48
    assert str(tmp_path) not in json.dumps(found)
    assert main([*arguments, "--html", str(tmp_path / "no/page.html")]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {tmp_path}/no/page.html: the directory {tmp_path}/no does not exist"
    )


def test_the_texts_of_the_examples_have_no_paragraph_in_common() -> None:
    evaluation, calibration = (
        set((EXAMPLES / f"data/jargon_{name}.txt").read_text(encoding="utf-8").split("\n\n"))
        for name in ("evaluation", "calibration")
    )
    assert len(evaluation) > 500
    assert len(calibration) > 100
    assert evaluation.isdisjoint(calibration)

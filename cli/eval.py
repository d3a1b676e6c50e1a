"""``vacc-opt eval MODEL --text FILE``: perplexity, KL divergence and changed tokens of compiled models on a text."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vacc_opt.cli.console import Steps


@click.command("eval")
@click.argument("models", metavar="ARTIFACT|CHECKPOINT...", nargs=-1, required=True)
@click.option("--text", required=True, metavar="FILE", help="UTF-8 text to measure on; keep it out of calibration.")
@click.option(
    "--reference", metavar="CHECKPOINT", help="What KL, changed tokens, and layers are compared with, in fp32."
)
@click.option(
    "-p",
    "--passes",
    multiple=True,
    metavar="PIPELINE",
    help="Of a checkpoint: passes to run first; each is a model of its own.",
)
@click.option(
    "-d",
    "--decode",
    multiple=True,
    metavar="PIPELINE",
    help="As --passes, and this model takes the text token by token, through its KV cache.",
)
@click.option(
    "--window", type=click.IntRange(min=2), help="Tokens of a window. Default: 512, or an artifact's context."
)
@click.option("--tokens", type=click.IntRange(min=2), help="Use the first so many tokens. Default: all of the text.")
@click.option(
    "--kl-tokens",
    type=click.IntRange(min=2),
    help="Compare distributions and layers in the first so many tokens only; perplexity takes all. Default: all.",
)
@click.option(
    "--chunk", type=click.IntRange(min=1), help="Tokens of a call; 1 decodes token by token. Default: those of prefill."
)
@click.option(
    "--engine",
    type=click.Choice(["onnxruntime", "schedule", "native"]),
    default="onnxruntime",
    show_default=True,
    help="Run the graphs, or the tiles of an artifact token by token (logits only): on numpy, or as native code.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of onnxruntime. Default: one a core.")
@click.option("--html", metavar="FILE", help="Write a page with a plot of every layer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    models: tuple[str, ...],
    text: str,
    reference: str | None,
    passes: tuple[str, ...],
    decode: tuple[str, ...],
    window: int | None,
    tokens: int | None,
    kl_tokens: int | None,
    chunk: int | None,
    engine: str,
    threads: int | None,
    html: str | None,
    as_json: bool,
) -> None:
    """Measure what compiling did to a model: on its compiled graph, with its KV cache, call by call.

    The text is cut into windows that start without a past. With --reference every window is shown to both, and
    perplexity is compared token by token.
    """
    from vacc_opt.passes.infra.show.files import check_place
    from vacc_opt.runtime.eval import EvalOptions, evaluate_models

    page = Path(html) if html else None
    if page is not None:
        check_place(page)
    options = EvalOptions(
        models=models,
        text=Path(text),
        reference=reference,
        passes=passes,
        decoded=decode,
        window=window,
        tokens=tokens,
        kl_tokens=kl_tokens,
        chunk=chunk or 0,
        engine=engine,
        threads=threads or 0,
    )
    with Steps(to_stderr=True, quiet=as_json) as steps:
        report = evaluate_models(
            options, steps.running, lambda done, of: steps.running(f"measure: window {done} of {of}", done, of)
        )
    if page is not None:
        from vacc_opt.runtime.quality_page import render_page

        page.write_text(
            render_page(", ".join(one.name for one in report.models), report.to_json(), report.models), encoding="utf-8"
        )
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
        return
    click.echo("\n".join(report.lines()))
    if page is not None:
        click.echo(f"-> {page}")

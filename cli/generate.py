"""``vacc-opt generate ARTIFACT --prompt TEXT``: an answer, by the tile schedule, its native code, or onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vacc_opt.cli.console import Steps, table


@click.command("generate")
@click.argument("artifact", metavar="ARTIFACT")
@click.option("--prompt", required=True, help="The user's message; the model's chat template is put around it.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest answer, in tokens."
)
@click.option("--context", type=int, help="Size of the KV buffers. Default: the smallest that holds prompt and answer.")
@click.option(
    "--engine",
    type=click.Choice(["schedule", "native", "onnxruntime"]),
    default="schedule",
    show_default=True,
    help="Execute the tiles of the schedule, on numpy or as native code (needs gcc), or the ONNX graphs of the ranks.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: text, token_ids, engine, tiles_executed.")
@click.option("--summary", is_flag=True, help="After the answer, say what the artifact is made of.")
def command(
    artifact: str, prompt: str, max_new_tokens: int, context: int | None, engine: str, as_json: bool, summary: bool
) -> None:
    """Answer a prompt with ARTIFACT, greedily, until the model ends its answer or the context is full."""
    from vacc_opt.runtime.artifact import open_artifact
    from vacc_opt.runtime.engines import make_engine
    from vacc_opt.runtime.generate import generate

    with Steps(to_stderr=True, quiet=as_json) as steps:
        steps.running("opening the artifact")
        opened = open_artifact(Path(artifact))
        steps.running(f"preparing engine {engine}")
        found = generate(
            opened,
            make_engine(engine, opened),
            prompt,
            max_new_tokens=max_new_tokens,
            context=context,
            on_text=lambda text: steps.running(text.replace("\n", " ")[-100:] or "..."),
        )
    if as_json:
        click.echo(json.dumps(found.to_json(), ensure_ascii=False))
        return
    click.echo(f"Q: {prompt}")
    click.echo(f"A: {found.text}")
    sentence, seconds = str(found), found.prefill_seconds + found.decode_seconds
    if summary:
        click.echo(f"\n{table([('answered', f'{sentence}, {seconds:.1f} s'), *opened.facts.summary()])}")
    else:
        steps.done("generate", sentence, seconds)

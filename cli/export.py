"""``vacc-opt export CHECKPOINT -o OUT``: the graph of an unmodified checkpoint as ONNX."""

from __future__ import annotations

from pathlib import Path

import click

from vacc_opt.cli.console import Steps
from vacc_opt.cli.options import trust_option


@click.command("export")
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("-o", "--output", required=True, metavar="OUT", help="OUT.onnx (weights beside it) or OUT.vacc (text).")
@click.option(
    "--attention",
    type=click.Choice(["eager", "sdpa"]),
    default="eager",
    show_default=True,
    help="Which attention code of the model is exported.",
)
@trust_option
def command(checkpoint: str, output: str, attention: str, trust_remote_code: bool) -> None:
    """Export CHECKPOINT, a Hugging Face directory or a .gguf file, to one graph for prefill and decode.

    The weights become float32 beside the .onnx file; with OUT.vacc they stay where they are, and the text refers to
    them.
    """
    from vacc_opt.frontends import export_checkpoint
    from vacc_opt.runtime.models import check_output, describe, write_model

    check_output(Path(output))
    with Steps() as steps:
        with steps.step("export", checkpoint) as said:
            graph = export_checkpoint(
                checkpoint,
                attention=attention,
                trust_remote_code=trust_remote_code,
                progress=lambda stage: steps.running(f"export: {stage}"),
            )
            said.append(describe(graph))
        with steps.step("write", output) as said:
            said += [str(item) for item in write_model(graph, Path(output))]

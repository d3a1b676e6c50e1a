"""``vacc-opt opt MODEL -p PIPELINE -o OUT``: run passes over a model and write the result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vacc_opt.cli.console import NAME_WIDTH, Steps

if TYPE_CHECKING:
    from vacc_opt.passes.infra.pipeline import PassRecord


@click.command("opt")
@click.argument("model", metavar="MODEL")
@click.option("-p", "--pipeline", default="", metavar="PIPELINE", help="Such as `simplify,fuse-gqa{expect=30}`.")
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    help="OUT.onnx (weights beside it), OUT.vacc (text), or after `split-tp` a directory. Default: text to stdout.",
)
@click.option(
    "--attention",
    type=click.Choice(["eager", "sdpa"]),
    default="eager",
    show_default=True,
    help="Attention code to export, for a checkpoint.",
)
@click.option("--remarks", is_flag=True, help="Print what each pass says of each place: rewritten, declined and why.")
def command(model: str, pipeline: str, output: str | None, attention: str, remarks: bool) -> None:
    """Run a pipeline of passes over MODEL and write the result.

    MODEL is an .onnx file, the text form (.vacc), a Hugging Face directory, a .gguf file, or `package:NAME/FILE.gguf`.
    The graph is verified after every pass; nothing is written when one fails.
    """
    from vacc_opt.passes.infra.pipeline import parse_pipeline, run_pipeline
    from vacc_opt.runtime.models import check_output, describe, load_model, write_model

    passes = parse_pipeline(pipeline) if pipeline.strip() else []
    if output is not None:
        check_output(Path(output))
    width = max([len(item.name) for item in passes] + [NAME_WIDTH])
    with Steps(to_stderr=output is None, width=width) as steps:
        with steps.step("load", model) as said:
            graph = load_model(model, attention=attention, progress=lambda stage: steps.running(f"load: {stage}"))
            said.append(describe(graph))

        def finished(record: PassRecord) -> None:
            summary = record.summary or f"{record.changes} changes"
            steps.done(record.name, summary, record.seconds)
            if remarks:
                for remark in record.remarks:
                    steps.line(f"    {remark}")

        steps.running(pipeline)
        run_pipeline(graph, passes, on_pass=finished)
        if output is not None:
            with steps.step("write", output) as said:
                said += [str(item) for item in write_model(graph, Path(output))]
    if output is None:
        from vacc_opt.ir.text import to_text

        click.echo(to_text(graph), nl=False)

"""``vacc-opt reduce MODEL ... -o OUT``: a model shrinks for as long as a script, or a failing pass, finds it bad."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from vacc_opt.cli.checking import numerics_of, numerics_options
from vacc_opt.cli.console import Steps
from vacc_opt.cli.options import GroupedCommand, trust_option


@click.command("reduce", cls=GroupedCommand)
@click.argument("model", metavar="MODEL")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT", help="OUT.vacc, OUT.onnx."
)
@click.option(
    "--script",
    metavar="CMD",
    help="Command that gets the path of an .onnx model; exit code 0: the bug is not there, 125: cannot be tested, "
    "1 to 127: it is.",
)
@click.option("-p", "--pipeline", default="", metavar="PIPELINE", help="Passes of which one fails.")
@click.option("--error", "text", metavar="TEXT", help="The pipeline fails with TEXT in its message.")
@click.option("--attention", type=click.Choice(["eager", "sdpa"]), default="eager", help="For a checkpoint.")
@trust_option
@click.option(
    "--emit-test",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a pytest file that fails for as long as the bug is there.",
)
@numerics_options
def command(
    model: str,
    output: Path,
    script: str | None,
    pipeline: str,
    text: str | None,
    attention: str,
    trust_remote_code: bool,
    emit_test: Path | None,
    check_numerics: tuple[str, ...],
    numerics_weights: str,
    numerics_seed: int,
    numerics_sizes: str,
) -> None:
    """Shrink MODEL to the few nodes that a bug needs.

    With a pipeline, the result is the graph in front of the pass that fails, so that this pass alone shows the bug.
    """
    from vacc_opt.passes.infra.debug.reduction import reduce_failure, reduce_script
    from vacc_opt.passes.infra.pipeline import parse_pipeline
    from vacc_opt.passes.infra.show.files import check_place, write_whole
    from vacc_opt.runtime.models import check_output, describe, load_model, write_model

    numerics = numerics_of(check_numerics, numerics_weights, numerics_seed, numerics_sizes)
    if sum(one is not None for one in (script, numerics, text)) != 1:
        raise click.UsageError("give one of --script CMD, -p PIPELINE --check-numerics and -p PIPELINE --error TEXT")
    if script is None and not pipeline.strip():
        raise click.UsageError("--check-numerics and --error need the pipeline that fails: -p PIPELINE")
    items = parse_pipeline(pipeline) if pipeline.strip() else []
    check_output(output)
    if emit_test is not None:
        check_place(emit_test)
    with Steps() as steps:
        with steps.step("load", model) as said:
            graph = load_model(
                model,
                attention=attention,
                trust_remote_code=trust_remote_code,
                progress=lambda stage: steps.running(f"load: {stage}"),
            )
            said.append(describe(graph))
        with steps.step("reduce", model) as said:
            if script is not None:
                with tempfile.TemporaryDirectory(prefix="vacc-opt-") as folder:
                    found = reduce_script(graph, items, script, Path(folder), steps.running)
            else:
                found = reduce_failure(graph, items, numerics, text or "", steps.running)
            said += found.lines()
        with steps.step("write", str(output)) as said:
            said += [str(item) for item in write_model(found.graph, output)]
            if emit_test is not None:
                write_whole(emit_test, found.test)
                said.append(f"{emit_test}   (run it with pytest)")

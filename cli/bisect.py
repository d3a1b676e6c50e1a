"""``vacc-opt bisect MODEL -p PIPELINE --script CMD``: the first pass and application that break a person's script."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from vacc_opt.cli.checking import REPRODUCING, numerics_of, numerics_options
from vacc_opt.cli.console import Steps
from vacc_opt.cli.options import GroupedCommand, option, trust_option


@click.command("bisect", cls=GroupedCommand)
@click.argument("model", metavar="MODEL")
@click.option("-p", "--pipeline", required=True, metavar="PIPELINE", help="The passes to search in.")
@click.option(
    "--script",
    metavar="CMD",
    help="Command that gets the path of an .onnx model; exit code 0: good, 125: cannot be tested, 1 to 127: bad.",
)
@click.option(
    "--check",
    type=click.Choice(["verify", "numerics"]),
    help="In place of a script: the graph is valid and no pass raises, or every pass keeps its promise about values.",
)
@click.option("--attention", type=click.Choice(["eager", "sdpa"]), default="eager", help="For a checkpoint.")
@trust_option
@numerics_options
@option(
    REPRODUCING,
    "--reproducer",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where to write the graph in front of the pass. Default: a temporary file.",
)
def command(
    model: str,
    pipeline: str,
    script: str | None,
    check: str | None,
    attention: str,
    trust_remote_code: bool,
    check_numerics: tuple[str, ...],
    numerics_weights: str,
    numerics_seed: int,
    numerics_sizes: str,
    reproducer: Path | None,
) -> None:
    """Find the first pass, and in it the first application of a rule, after which a model is bad.

    The pipeline runs in part, by halves, on copies of MODEL: first whole passes, then applications of one.
    """
    from vacc_opt.passes.infra.debug.bisect import bisect_numerics, bisect_script, bisect_verify, write_culprit
    from vacc_opt.passes.infra.pipeline import parse_pipeline
    from vacc_opt.passes.infra.show.files import check_place
    from vacc_opt.runtime.models import describe, load_model

    asked = ("*",) if check == "numerics" and not check_numerics else check_numerics
    numerics = numerics_of(asked, numerics_weights, numerics_seed, numerics_sizes)
    kinds = [kind for kind in (script, check if check != "numerics" else None, numerics) if kind is not None]
    if len(kinds) != 1:
        raise click.UsageError("give one of --script CMD, --check verify and --check-numerics")
    items = parse_pipeline(pipeline)
    if reproducer is not None:
        check_place(reproducer)
    with Steps() as steps:
        with steps.step("load", model) as said:
            graph = load_model(
                model,
                attention=attention,
                trust_remote_code=trust_remote_code,
                progress=lambda stage: steps.running(f"load: {stage}"),
            )
            said.append(describe(graph))
        with steps.step("bisect", pipeline) as said:
            if script is not None:
                with tempfile.TemporaryDirectory(prefix="vacc-opt-") as folder:
                    found = bisect_script(graph, items, script, Path(folder), steps.running)
            elif numerics is not None:
                found = bisect_numerics(graph, items, numerics)
            else:
                found = bisect_verify(graph, items, steps.running)
            said += found.lines()
        written = write_culprit(found, items, reproducer, script, numerics)
        steps.done("write", f"{written}   (vacc-opt opt --run-reproducer {written})")

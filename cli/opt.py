"""``vacc-opt opt MODEL -p PIPELINE -o OUT``: run passes over a model and write the result."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import click

from vacc_opt.cli.checking import CHECKING, Checks, check_options
from vacc_opt.cli.console import NAME_WIDTH, Steps
from vacc_opt.cli.options import GroupedCommand, option, optional_value, trust_option

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vacc_opt.passes.infra.instrument import Instrument, PassRecord
    from vacc_opt.passes.infra.pipeline import Item

PRINTING, MEASURING, REMARKS = "Show the graph", "Show the run", "Remarks"
PIPELINE_HELP = (
    "Passes, presets and scopes, such as `simplify,fuse-gqa{expect=30}`, `vacc-default{tp=2}`, "
    "`fixpoint(simplify)`, and behind kv-cache `prefill{seq=64}(simplify)`."
)
OUTPUT_HELP = (
    "OUT.onnx (weights beside it), OUT.vacc (text), or after `split-tp` or `prefill(...)` a directory. "
    "Default, and -: text to stdout."
)


@dataclass(frozen=True)
class Seeing:
    """What a person asked to see of a run."""

    print_ir_before: tuple[str, ...]
    print_ir_after: tuple[str, ...]
    print_ir_after_change: bool
    print_ir_diff: bool
    print_ir_dir: Path | None
    timing: bool
    stats: bool
    html: Path | None
    why_not: tuple[str, ...]
    remarks: bool
    remarks_filter: tuple[str, ...]
    remarks_file: Path | None


@click.command("opt", cls=GroupedCommand)
@click.argument("model", metavar="MODEL", required=False)
@click.option("-p", "--pipeline", default="", metavar="PIPELINE", help=PIPELINE_HELP)
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="OUT", help=OUTPUT_HELP)
@click.option(
    "--attention",
    type=click.Choice(["eager", "sdpa"]),
    default="eager",
    show_default=True,
    help="Attention code to export, for a checkpoint.",
)
@trust_option
@click.option(
    "--keep-functions",
    is_flag=True,
    help="Keep local functions, for `function(...)` and inline-functions; else inlined.",
)
@click.option("--dump-pipeline", is_flag=True, help="Print the pipeline with presets written out, and run nothing.")
@optional_value(PRINTING, "--print-ir-before", metavar="PASS", help="Print the graph before PASS, or every pass.")
@optional_value(PRINTING, "--print-ir-after", metavar="PASS", help="Print the graph after PASS, or every pass.")
@option(PRINTING, "--print-ir-after-change", is_flag=True, help="Print the graph after each pass that changed it.")
@option(PRINTING, "--print-ir-diff", is_flag=True, help="Print what each pass changed: + new, - removed, ~ changed.")
@option(
    PRINTING,
    "--print-ir-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the graph after every pass to DIR/NNN-PASS.vacc, which `opt` reads.",
)
@option(MEASURING, "--timing", is_flag=True, help="Print where the time went: scopes, passes, rules, verification.")
@option(MEASURING, "--stats", is_flag=True, help="Print what each pass did to the number of nodes of each operator.")
@option(
    MEASURING,
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write one page that shows the run: changes, pictures, remarks, times.",
)
@option(
    REMARKS,
    "--why-not",
    multiple=True,
    metavar="PASS",
    help="Explain each place that PASS left: how far its pattern came, what it expected and what it found; repeatable.",
)
@option(REMARKS, "--remarks", is_flag=True, help="Print what each pass says of each place: rewritten, or why not.")
@option(
    REMARKS,
    "--remarks-filter",
    multiple=True,
    type=click.Choice(["passed", "missed", "analysis"]),
    metavar="KIND",
    help="Print remarks of one kind only: passed, missed or analysis; repeatable.",
)
@option(
    REMARKS,
    "--remarks-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write all remarks as YAML, for `vacc-opt remarks`.",
)
@option(
    CHECKING, "--verify-each/--no-verify-each", default=True, help="Verify the graph after every pass. Default: yes."
)
@option(CHECKING, "--check-analyses", is_flag=True, help="Compute again, and compare, what a pass says it preserves.")
@check_options
def command(
    model: str | None,
    pipeline: str,
    output: Path | None,
    attention: str,
    trust_remote_code: bool,
    keep_functions: bool,
    dump_pipeline: bool,
    verify_each: bool,
    check_analyses: bool,
    **seeing: Any,
) -> None:
    """Run a pipeline of passes over MODEL and write the result.

    MODEL is an .onnx file, the text form (.vacc, or - for standard input), a Hugging Face directory, a .gguf file, or
    `package:NAME/FILE.gguf`.
    The graph is verified after every pass; no model is written when one fails.
    """
    from vacc_opt.passes.infra.manager import run_pipeline
    from vacc_opt.passes.infra.pipeline import dump_pipeline as text_of
    from vacc_opt.passes.infra.pipeline import parse_pipeline
    from vacc_opt.runtime.models import check_output, describe, load_model, model_text, write_model

    items = parse_pipeline(pipeline) if pipeline.strip() else []
    if dump_pipeline:
        click.echo(text_of(items))
        return
    checks = Checks(seeing, verify_each)
    if checks.replayed is not None:
        with Steps() as steps:
            checks.replay(steps)
        return
    if model is None:
        raise click.MissingParameter(param_hint="'MODEL'", param_type="argument")
    asked = Seeing(**seeing)
    if output == Path("-"):
        output = None
    if output is not None:
        check_output(output)
    with Steps(to_stderr=output is None, width=_width(items)) as steps:
        hears = [*_instruments(asked, items, steps.line, _in_color(output)), *checks.instruments()]
        with steps.step("load", model) as said:
            graph = load_model(
                model,
                attention=attention,
                trust_remote_code=trust_remote_code,
                keep_functions=keep_functions,
                progress=lambda stage: steps.running(f"load: {stage}"),
            )
            said.append(describe(graph))
        steps.running(pipeline)
        try:
            run_pipeline(
                graph,
                items,
                on_pass=lambda record: _finished(record, asked, steps, checks),
                instruments=hears,
                verify_each=verify_each,
                check_analyses=check_analyses,
            )
            if output is not None:
                with steps.step("write", str(output)) as said:
                    said += [str(item) for item in write_model(graph, output)]
        finally:
            _say(hears, steps.line)
    if output is None:
        click.echo(model_text(graph), nl=False)


def _width(items: Sequence[Item]) -> int:
    """Columns of the longest name of a pass, with the phase that it runs in."""
    from vacc_opt.passes.infra.scopes import Phase, Scope

    widths = [NAME_WIDTH]
    for item in items:
        phase = len(f"{item.name}: ") if isinstance(item, Phase) else 0
        widths.append(phase + _width(item.body) if isinstance(item, Scope) else len(item.name))
    return max(widths)


def _in_color(output: Path | None) -> bool:
    stream = sys.stderr if output is None else sys.stdout
    return stream.isatty() and not os.environ.get("NO_COLOR")


def _instruments(asked: Seeing, items: Sequence[Item], write: Callable[[str], None], color: bool) -> list[Instrument]:
    from vacc_opt.passes.infra.show.printing import DumpIR, PrintIR, select
    from vacc_opt.passes.infra.show.remarks import RemarksFile
    from vacc_opt.passes.infra.show.timing import Stats, Timing

    before = select("--print-ir-before", asked.print_ir_before, items)
    after = select("--print-ir-after", asked.print_ir_after, items)
    made: list[Instrument] = []
    if before or after or asked.print_ir_after_change or asked.print_ir_diff:
        made.append(PrintIR(write, before, after, asked.print_ir_after_change, asked.print_ir_diff, color))
    if asked.print_ir_dir is not None:
        made.append(DumpIR(asked.print_ir_dir))
    if asked.remarks_file is not None:
        made.append(RemarksFile(asked.remarks_file))
    if asked.html is not None:
        from vacc_opt.passes.infra.show.view import HtmlView

        made.append(HtmlView(asked.html))
    for name in asked.why_not:
        from vacc_opt.passes.infra.patterns.why_not import WhyNot

        made.append(WhyNot(name, items))
    if asked.stats:
        made.append(Stats())
    if asked.timing:
        made.append(Timing())
    return made


def _finished(record: PassRecord, asked: Seeing, steps: Steps, checks: Checks) -> None:
    """Print a finished pass, and what it says of each place when that was asked for."""
    name = f"{record.scope}: {record.name}" if record.scope else record.name
    steps.done(name, record.summary or f"{record.changes} changes", record.seconds)
    checks.passed(steps.line)
    if asked.remarks or asked.remarks_filter:
        for remark in record.remarks:
            if not asked.remarks_filter or remark.kind in asked.remarks_filter:
                steps.line(f"    {remark}")


@runtime_checkable
class _Telling(Protocol):
    """An instrument that has something to say at the end."""

    def text(self) -> str:
        """Lines, or nothing."""


def _say(hears: Sequence[Instrument], write: Callable[[str], None]) -> None:
    """Print what the instruments have to say at the end, of a run that failed too."""
    for one in hears:
        said = one.text() if isinstance(one, _Telling) else ""
        if said:
            write(said)

"""The entry point of ``vacc-opt``: finds the subcommand, imports only that one, and turns errors into exit codes.

Exit codes: 0 done, 1 a check failed, 2 the input cannot be used, 70 a defect of vacc-opt, 130 interrupted.
"""

from __future__ import annotations

import errno
import gc
import importlib
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from vacc_opt._version import __version__

# name -> (the line that --help prints, the module); the line stands here so that --help imports no module
COMMANDS = {
    "bisect": ("Find the first pass, and the application in it, that breaks a model.", "vacc_opt.cli.bisect"),
    "calibrate": ("Learn KV scales and GPTQ codes from text, and keep them for compile.", "vacc_opt.cli.calibrate"),
    "compile": ("Compile a model as a YAML file describes it into a deployable artifact.", "vacc_opt.cli.compile"),
    "eval": ("Measure models on a text: perplexity, KL divergence, changed tokens, layers.", "vacc_opt.cli.eval"),
    "explain": ("Trace a node, call or weight back to passes, source lines and checkpoint.", "vacc_opt.cli.explain"),
    "export": ("Export a checkpoint to ONNX; the weights are copied, never loaded whole.", "vacc_opt.cli.export"),
    "fusions": ("Predict what each fusion behind linears gains: cycles and DDR bytes.", "vacc_opt.cli.fusions"),
    "generate": ("Answer a prompt with an artifact, on the tile schedule or onnxruntime.", "vacc_opt.cli.generate"),
    "lint": ("Find what is known to go wrong in a configuration and its checkpoint.", "vacc_opt.cli.lint"),
    "models": ("List the model families that are recognized, and what is fused in each.", "vacc_opt.cli.models"),
    "opt": ("Run a pipeline of passes over a model. `vacc-opt MODEL -p ...` is short for it.", "vacc_opt.cli.opt"),
    "passes": ("List the passes, or describe one with its options.", "vacc_opt.cli.passes"),
    "remarks": ("Read what passes said of each place; hold two runs against each other.", "vacc_opt.cli.remarks"),
    "reduce": ("Shrink a model to the few nodes that a bug needs.", "vacc_opt.cli.reduce"),
    "tp-plan": ("Compare what splits over several numbers of ranks hold and exchange.", "vacc_opt.cli.tp_plan"),
    "schedule": ("Search the schedule of one kernel, or check one that anyone wrote.", "vacc_opt.cli.schedule"),
    "sweep": ("Predict a model's times over numbers of its target, such as the bandwidth.", "vacc_opt.cli.sweep"),
    "simulate": ("Predict the time of a phase of an artifact; write a Perfetto trace.", "vacc_opt.cli.simulate"),
    "verify": ("Check an artifact again: digests, graphs, weights, schedules, predicted times.", "vacc_opt.cli.verify"),
}
_MODEL_SUFFIXES = (".onnx", ".gguf", ".vacc")
# what a person can cause and mend: permissions, a full disk, a file where a directory is meant
_USER_ERRNO = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
}
DEFECT, INTERRUPTED = 70, 130
# new objects that may be cyclic between two searches for cycles; the usual 700 cost a fifth of verifying a schedule,
# and graphs and schedules are many small objects without a cycle
COLLECT_AFTER = 20_000
_REPRODUCER = "reproducer: "  # how the note of an error begins that says where a failed run can be replayed


class LazyGroup(click.Group):
    """A group that imports a subcommand when it runs, and takes a model in place of one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in alphabetical order."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a subcommand."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][1]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][0]) for name in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand; a first argument that is a model means ``opt``."""
        if args and args[0] not in COMMANDS:
            if not looks_like_model(args[0]):
                from vacc_opt.ir.errors import did_you_mean

                raise click.UsageError(f"no command {args[0]!r}: {did_you_mean(args[0], COMMANDS)}", ctx)
            args = ["opt", *args]
        return super().resolve_command(ctx, args)


def looks_like_model(text: str) -> bool:
    """True for an existing file or directory, a model file name, or a path.

    >>> looks_like_model("model.onnx"), looks_like_model("complie")
    (True, False)
    """
    return text.endswith(_MODEL_SUFFIXES) or text.startswith("package:") or "/" in text or Path(text).exists()


@click.command(cls=LazyGroup, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", prog_name="vacc-opt", message="%(prog)s %(version)s")
def cli() -> None:
    """Graph passes and tiled kernel schedules for LLMs on VACC accelerators.

    An unmodified checkpoint becomes a graph; registered passes fuse, quantize and split it; the result is lowered to a
    schedule of tiles that is verified, executed on values and timed without the hardware.

    \b
      vacc-opt compile examples/smollm2-135m_w8kv8_tp3.yaml
      vacc-opt generate vacc_deploy/NAME --prompt "What is the capital of France?"
      vacc-opt model.onnx -p simplify,fuse-rms-norm,fuse-gqa -o fused.onnx

    Exit codes: 0 done, 1 a check failed, 2 the input cannot be used, 70 a defect of vacc-opt.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code; no exception but a system exit leaves."""
    _end_on_sigterm()
    gc.set_threshold(COLLECT_AFTER)
    try:
        result: Any = cli.main(args=None if args is None else list(args), prog_name="vacc-opt", standalone_mode=False)
    except click.exceptions.Abort:
        return _say("interrupted", None, INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        return _usage(error)
    except BrokenPipeError:
        sys.stderr.close()  # the reader left; the interpreter would complain once more at exit
        return 0
    except Exception as error:
        return _failed(error)
    return result if isinstance(result, int) else 0


def _end_on_sigterm() -> None:
    """Let a termination unwind as Ctrl-C does, so that child processes end and scratch files go."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _say(message: str, hint: str | None, code: int) -> int:
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"  {hint}", err=True)
    return code


def _usage(error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "vacc-opt"
    text = error.format_message()
    return _say(text[:1].lower() + text[1:].rstrip("."), f"`{path} --help` shows what it takes", 2)


def _failed(error: Exception) -> int:
    # a VaccError can only have been raised by a module that is loaded; the quick commands never load it
    errors = sys.modules.get("vacc_opt.ir.errors")
    if errors is not None and isinstance(error, errors.VaccError):
        return _say(error.message, error.hint, error.exit_code)
    if isinstance(error, OSError) and error.errno in _USER_ERRNO:
        return _say(f"{error.filename or 'output'}: {error.strerror}", None, 2)
    return _defect(error)


def _defect(error: Exception) -> int:
    import tempfile
    import traceback

    text = "".join(traceback.format_exception(error))
    words = f"vacc-opt {__version__}\n{' '.join(sys.argv)}\n\n{text}"
    try:
        report = Path(tempfile.mkdtemp(prefix="vacc-opt-")) / "traceback.txt"
        report.write_text(words, encoding="utf-8", errors="backslashreplace")
        where = f"traceback in {report}"
    except OSError as full:
        where = f"the traceback could not be written: {full.strerror}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    notes: list[str] = getattr(error, "__notes__", [])
    place = [*(n for n in notes if not n.startswith(_REPRODUCER)), f"at {Path(last.filename).name}:{last.lineno}"]
    summary = " ".join(f"{type(error).__name__}: {error} {' '.join(place)}".split())[:300]
    reproducer = next((n for n in notes if n.startswith(_REPRODUCER)), None)
    return _say(f"a defect of vacc-opt, not of your input: {summary}; {where}", reproducer, DEFECT)


if __name__ == "__main__":
    sys.exit(main())

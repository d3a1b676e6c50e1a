"""The options that check a run and reproduce its failures, shared by the commands that run pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vacc_opt.cli.options import EVERY, option, optional_value

if TYPE_CHECKING:
    from vacc_opt.cli.console import Steps
    from vacc_opt.passes.infra.check.numerics import CheckNumerics
    from vacc_opt.passes.infra.debug.reproducer import Numerics
    from vacc_opt.passes.infra.instrument import Instrument

CHECKING, REPRODUCING = "Checks", "Reproducers"
_F = TypeVar("_F", bound=Callable[..., Any])


def numerics_options(command: _F) -> _F:
    """``--check-numerics`` and what it runs with."""
    for add in reversed(
        [
            optional_value(
                CHECKING,
                "--check-numerics",
                metavar="TOL",
                help="Run the graph before and after every pass on onnxruntime and stop at the first that changes what "
                "it must not. TOL: error allowed to another order of sums, as a share of an output's scale. "
                "Default: 1e-05.",
            ),
            option(
                CHECKING,
                "--numerics-weights",
                type=click.Choice(["auto", "real", "seeded"]),
                default="auto",
                metavar="KIND",
                help="real; seeded (random, of the same shapes); auto: real up to 1 GiB, if they are there.",
            ),
            option(CHECKING, "--numerics-seed", type=int, default=0, metavar="N", help="Seed of the inputs."),
            option(
                CHECKING,
                "--numerics-sizes",
                default="",
                metavar="SIZES",
                help="Named sizes of the inputs, such as batch=2,seq=7. Default: small ones.",
            ),
        ]
    ):
        command = add(command)
    return command


def numerics_of(
    check_numerics: tuple[str, ...], numerics_weights: str, numerics_seed: int, numerics_sizes: str
) -> Numerics | None:
    """What the options ask for; raises UsageError for a tolerance or a size that is no number."""
    if not check_numerics:
        return None
    from vacc_opt.passes.infra.debug.reproducer import Numerics

    given = check_numerics[-1]
    try:
        tolerance = None if given == EVERY else float(given)
    except ValueError:
        raise click.UsageError(f"--check-numerics={given}: the tolerance is a number, such as 1e-5") from None
    return Numerics(tolerance, numerics_seed, _sizes(numerics_sizes), numerics_weights)


def _sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        if not number.strip().isdigit() or not int(number):
            raise click.UsageError(f"--numerics-sizes {text}: a size is NAME=NUMBER, such as seq=7")
        sizes[name.strip()] = int(number)
    return sizes


def check_options(command: _F) -> _F:
    """The options of a run that checks itself: numerics, and reproducers of what fails."""
    place = click.Path(path_type=Path)
    for add in reversed(
        [
            numerics_options,
            option(
                REPRODUCING,
                "--reproducer",
                type=place,
                metavar="FILE",
                help="Where to write a reproducer when a pass or a check fails. Default: a temporary file.",
            ),
            option(
                REPRODUCING, "--generate-reproducer", type=place, metavar="FILE", help="Write one of this run anyway."
            ),
            option(
                REPRODUCING,
                "--run-reproducer",
                type=place,
                metavar="FILE",
                help="Replay FILE. Exit code 1 if it still fails, 0 if not.",
            ),
        ]
    ):
        command = add(command)
    return command


class Checks:
    """What the options of :func:`check_options` ask for, taken out of all that were given."""

    def __init__(self, given: dict[str, Any], verify_each: bool) -> None:
        names = ("check_numerics", "numerics_weights", "numerics_seed", "numerics_sizes")
        self.numerics = numerics_of(*(given.pop(name) for name in names))
        self.reproducer: Path | None = given.pop("reproducer")
        self.generated: Path | None = given.pop("generate_reproducer")
        self.replayed: Path | None = given.pop("run_reproducer")
        self._verify_each = verify_each
        self._check: CheckNumerics | None = None

    def instruments(self) -> list[Instrument]:
        """The check of numerics, if asked for, and the writer of reproducers."""
        from vacc_opt.passes.infra.debug.reproducer import WriteReproducer
        from vacc_opt.passes.infra.show.files import check_place

        for path in filter(None, (self.reproducer, self.generated)):
            check_place(path)
        self._check = self.numerics.instrument() if self.numerics is not None else None
        options: dict[str, Any] = {"numerics": self.numerics, "verify_each": self._verify_each}
        made: list[Instrument] = [self._check] if self._check is not None else []
        made.append(WriteReproducer(self.reproducer, **options))
        return made + ([WriteReproducer(self.generated, always=True, **options)] if self.generated is not None else [])

    def passed(self, write: Callable[[str], None]) -> None:
        """Print what was found about the pass that just ran."""
        if self._check is not None:
            first = f" ({self._check.weights_used} weights)" if len(self._check.checked) == 1 else ""
            write(f"    numerics{first}: {self._check.checked[-1].sentence}")

    def replay(self, steps: Steps) -> None:
        """Run the reproducer that was named; raises CheckError when it still fails."""
        from vacc_opt.passes.infra.debug.reproducer import Reproducer, check_replay

        assert self.replayed is not None
        made = Reproducer.read(self.replayed)
        steps.done("replay", "\n".join([made.pipeline, *made.notes]))
        steps.done("result", check_replay(made, made.replay()))

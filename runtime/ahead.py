"""What a first compilation surely needs is started before the program itself is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vacc_opt.frontends.export_process import started_ahead


@contextmanager
def export_ahead(file: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Within the block torch loads for the model of ``file``, unless its workspace keeps what may be used instead."""
    with started_ahead() as end:  # reading the configuration takes longer than to end a process that is not needed
        if not _is_first(file, overrides):
            end()
        yield


def _is_first(file: Path, overrides: Sequence[str]) -> bool:
    from vacc_opt.frontends import load_config
    from vacc_opt.ir.errors import UserError
    from vacc_opt.runtime.files import CACHE

    try:
        config = load_config(file, list(overrides))
    except (UserError, OSError):
        return False  # the compilation says so
    return config.frontend.type == "huggingface" and not (Path(config.workspace.path) / CACHE).exists()

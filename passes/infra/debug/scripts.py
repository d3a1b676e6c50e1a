"""A person's script as a test of graphs: it gets the path of a model and says good, bad or skip by its exit code."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vacc_opt.ir import Graph, TensorExpr
from vacc_opt.ir.copy import copy
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.onnx_proto import to_onnx
from vacc_opt.ir.storage import stored_tensors
from vacc_opt.passes.infra.check.locate import Verdict
from vacc_opt.passes.infra.manager import run_pipeline

SKIP, HIGHEST = 125, 127
_SHOWN = 300


class Script:
    """Runs a command on graphs, each written as ``model.onnx`` in ``directory``; exit codes as for `git bisect run`.

    0 is good, 125 cannot be tested, any other code up to 127 is bad. Weights are written once each, by their content,
    and shared between the models. A graph of several ranks is written with its ranks expanded.

    Args:
        command: as typed in a shell; `{}` stands for the path of the model, which is appended where it does not occur.
        directory: an existing folder for the models, which the caller removes.
    """

    def __init__(self, command: str, directory: Path) -> None:
        try:
            self.words: Sequence[str] = shlex.split(command)
        except ValueError as error:
            raise UserError(f"--script {command!r}: {error}") from error
        if not self.words:
            raise UserError("--script is empty", "give a command, such as --script 'python check.py'")
        self.directory = directory
        self.calls: int = 0

    def __call__(self, graph: Graph) -> Verdict:
        """Write the graph and run the command on it.

        Raises:
            UserError: the command cannot be run, or died by a signal or with a code above 127.
        """
        path = self.write(graph)
        self.calls += 1
        command = [word.replace("{}", str(path)) for word in self.words]
        if command == list(self.words):
            command.append(str(path))
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise UserError(
                f"--script {self.words[0]}: {error.strerror}", "is it executable, and on the PATH?"
            ) from error
        if done.returncode < 0 or done.returncode > HIGHEST:
            said = " ".join((done.stderr or done.stdout).split())[-_SHOWN:]
            how = f"died by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
            hint = f"it said: {said}" if said else "0 means good, 1 to 127 bad, 125 that a model cannot be tested"
            raise UserError(f"--script {self.words[0]} {how}", hint)
        return {0: Verdict.GOOD, SKIP: Verdict.SKIP}.get(done.returncode, Verdict.BAD)

    def write(self, graph: Graph) -> Path:
        """Write ``model.onnx``; gives its path."""
        if graph.ranks > 1:
            graph = copy(graph)
            run_pipeline(graph, "expand-ranks")
        tensors = stored_tensors(graph)
        places = {name: self._stored(expr) for name, expr in tensors.items()}
        model = to_onnx(graph, lambda v: (places[v.name], 0, tensors[v.name].nbytes), provenance=False)
        path = self.directory / "model.onnx"
        path.write_bytes(model.SerializeToString(deterministic=True))
        return path

    def _stored(self, expr: TensorExpr) -> str:
        path = self.directory / f"{expr.key}.bin"
        if not path.exists():
            np.ascontiguousarray(expr.read()).tofile(path)
        return path.name

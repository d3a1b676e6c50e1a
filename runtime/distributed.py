"""One rank of an artifact as a process of its own, started by torchrun; collectives go over ``torch.distributed``.

``torchrun --nproc-per-node 3 -m vacc_opt.runtime.distributed ARTIFACT --prompt TEXT``. Every rank opens its own files
alone and runs the same loop; the parts of a collective are gathered and combined in rank order, as in one process, so
the tokens are the same bit for bit. Rank 0 prints.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from vacc_opt.ir.errors import CheckError, UserError, VaccError, first_line
from vacc_opt.ir.evaluate import combine
from vacc_opt.ir.graph import Node
from vacc_opt.runtime.artifact import Artifact, open_artifact
from vacc_opt.runtime.engines import Array, OnnxRuntimeEngine
from vacc_opt.runtime.generate import Generation, check_prompt, generate
from vacc_opt.runtime.liveness import INTERVAL, SILENCE, Watch

MODULE = "vacc_opt.runtime.distributed"


@dataclass(frozen=True)
class Group:
    """The processes of a run: this one is ``rank`` of ``ranks``; tensors meet on ``device``."""

    rank: int
    ranks: int
    device: Any = "cpu"

    def exchange(self, node: Node, parts: list[Array]) -> list[Array]:
        """What this rank gets of a collective to which it gives the one part; as bytes, so of any element type."""
        import torch
        import torch.distributed as dist

        part = np.ascontiguousarray(parts[0])
        mine = torch.from_numpy(part.reshape(-1).view(np.uint8)).to(self.device)
        everyone = torch.empty(self.ranks * mine.numel(), dtype=torch.uint8, device=self.device)
        dist.all_gather_single(everyone, mine)
        whole = everyone.cpu().numpy().view(part.dtype).reshape(self.ranks, *part.shape)
        return [combine(node, list(whole))[self.rank]]

    def same(self, token: int) -> int:
        """The token of rank 0: hosts of another kind may round another way, and a tie must not part the ranks."""
        import torch
        import torch.distributed as dist

        chosen = torch.tensor([token], device=self.device)
        dist.broadcast(chosen, src=0)
        return int(chosen.item())


class RankEngine(OnnxRuntimeEngine):
    """The ONNX files of one rank on onnxruntime, met with the other ranks at the collectives."""

    def __init__(self, artifact: Artifact, rank: int) -> None:
        """The artifact may lack the files of other ranks."""
        super().__init__(artifact, rank)
        self.group = Group(rank, artifact.ranks)

    def exchange(self, node: Node, parts: list[Array]) -> list[Array]:
        """What this rank gets of a collective, from its one part and those of the other processes."""
        return self.group.exchange(node, parts)

    def choose(self, logits: Array) -> int:
        """The best token of logits [V], as rank 0 sees it."""
        return self.group.same(super().choose(logits))

    def load(self) -> None:
        """Open the sessions of all phases."""
        for phase in self.artifact.phases:
            self._executable(phase)


@click.command()
@click.argument("artifact", metavar="ARTIFACT")
@click.option("--prompt", required=True, help="The user's message; the model's chat template is put around it.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest answer, in tokens."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(artifact: str, prompt: str, max_new_tokens: int, as_json: bool) -> None:
    """Answer a prompt with ARTIFACT, one process a rank; start it with torchrun, on one host or several.

    Each rank needs its own files of ARTIFACT (rank<i>.*, *.rank<i>.onnx) and those that name no rank.
    """
    import torch  # noqa: F401 - so that no rank is late for the others because it still imports

    rank, ranks = _place()
    store = _store(rank, ranks)
    watch = Watch(store.clone(), rank, ranks)
    watch.take_signals()
    watch.start()
    try:
        engine = _prepare(store, Path(artifact), prompt, rank, ranks)
        found = _run(engine, prompt, max_new_tokens)
    except Rejected:
        watch.leave()
        raise
    except Exception as error:
        watch.leave(first_line(error))
        raise
    if rank == 0:
        _show(found, prompt, as_json)
    watch.leave()
    _close()


class Rejected(Exception):
    """The run cannot start, on any rank: what this one has to say of it, if anything."""

    def __init__(self, said: VaccError | None, exit_code: int) -> None:
        super().__init__()
        self.said, self.exit_code = said, exit_code


def _place() -> tuple[int, int]:
    """Rank and number of ranks as torchrun tells them; raises UserError without it."""
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise UserError(
            "this is one rank of several, and nothing says which",
            f"start it with `torchrun --nproc-per-node N -m {MODULE} ARTIFACT --prompt TEXT`",
        ) from None


def _store(rank: int, ranks: int) -> Any:
    """The store that torchrun keeps, for this attempt."""
    import torch.distributed as dist

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", rank, ranks)))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"rank {rank} does not reach the others: {first_line(error)}") from error
    return dist.PrefixStore(f"vacc_opt/{attempt}", store)


def _prepare(store: Any, path: Path, prompt: str, rank: int, ranks: int) -> RankEngine:
    """Open what this rank needs and hear that the others could too; raises Rejected on every rank if one could not."""
    import torch
    import torch.distributed as dist

    problem: VaccError | None = None
    engine: RankEngine | None = None
    try:
        engine = _open(path, prompt, rank, ranks)
    except VaccError as error:
        problem = error
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    said = {"message": problem.message, "code": problem.exit_code} if problem is not None else None
    store.set(f"ready/{rank}", json.dumps({"problem": said, "gpu": on_gpu and dist.is_nccl_available()}))
    reports = [json.loads(one) for one in _all(store, [f"ready/{r}" for r in range(ranks)])]
    problems = [report["problem"] for report in reports]
    found = next((one for one in problems if one is not None), None)
    if found is not None:
        # what all ranks have to say is said by the first of them
        mine = problem if said is not None and said not in problems[:rank] else None
        alone = len({json.dumps(one) for one in problems}) > 1
        if mine is not None and alone:
            mine = UserError(f"rank {rank}: {mine.message}", mine.hint)
        raise Rejected(mine, found["code"])
    assert engine is not None
    gpu = all(report["gpu"] for report in reports)
    if gpu:
        engine.group = Group(rank, ranks, torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
        torch.cuda.set_device(engine.group.device)
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=ranks)
    return engine


def _open(path: Path, prompt: str, rank: int, ranks: int) -> RankEngine:
    """The engine with its sessions; raises UserError for damaged files or another number of ranks."""
    try:
        artifact = open_artifact(path, rank)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from error
    if artifact.ranks != ranks:
        raise UserError(
            f"{path}: has {artifact.ranks} ranks, and {ranks} processes were started",
            f"torchrun must start {artifact.ranks} in all: --nnodes times --nproc-per-node",
        )
    check_prompt(artifact, prompt)
    engine = RankEngine(artifact, rank)
    engine.load()
    return engine


def _all(store: Any, keys: Sequence[str]) -> list[bytes]:
    """The values of keys once all are there; a rank that never sets its own is the watch's concern."""
    while not store.check(list(keys)):
        time.sleep(0.02)
    found: list[bytes] = store.multi_get(list(keys))
    return found


def _run(engine: RankEngine, prompt: str, max_new_tokens: int) -> Generation:
    try:
        return generate(engine.artifact, engine, prompt, max_new_tokens=max_new_tokens)
    except RuntimeError as error:  # an exchange broke off: the watch will find out who is lost, and end this process
        time.sleep(SILENCE + 3 * INTERVAL)
        raise CheckError(f"rank {engine.group.rank}: an exchange failed: {first_line(error)}") from error


def _show(found: Generation, prompt: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found.to_json(), ensure_ascii=False))
        return
    click.echo(f"Q: {prompt}\nA: {found.text}")
    click.echo(f"  generate   {found}, {found.prefill_seconds + found.decode_seconds:.1f} s", err=True)


def _close() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()


def main(args: Sequence[str] | None = None) -> int:
    """Run one rank and give its exit code: 0 done, 1 a check failed or a rank was lost, 2 the input cannot be used."""
    try:
        command.main(args=None if args is None else list(args), prog_name=MODULE, standalone_mode=False)
    except click.ClickException as error:
        return _say(error.format_message(), None, 2) if os.environ.get("RANK", "0") == "0" else 2
    except Rejected as rejected:
        if rejected.said is not None:
            _say(rejected.said.message, rejected.said.hint, rejected.exit_code)
        return rejected.exit_code
    except VaccError as error:
        return _say(error.message, error.hint, error.exit_code)
    return 0


def _say(message: str, hint: str | None, code: int) -> int:
    lines = [f"error: {message}", *([f"  {hint}"] if hint else [])]
    sys.stderr.write("".join(f"{line}\n" for line in lines))  # in one piece: the ranks share a terminal
    return code


if __name__ == "__main__":
    sys.exit(main())

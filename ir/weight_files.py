"""Constants to safetensors files, many files in one pass: what several share is read once, in tiles, on all cores.

The format is the published one: 8 bytes of header length, JSON, data. Its ``__metadata__`` holds the SHA-256 of each
tensor, taken while it was written, so that the digest of the header alone vouches for the whole file, and tensors can
be checked one by one, in any order (:mod:`vacc_opt.ir.weight_check`). numpy, digests, reads and writes release the lock
of the interpreter, so threads are enough; each holds one step of a few tiles, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import numpy_helper

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.file_reads import shared_reads
from vacc_opt.ir.tensor import TensorExpr, Transposed
from vacc_opt.ir.types import DType
from vacc_opt.ir.weights import operands, stored_parts, without_round_trips

STEP_BYTES = 32 << 20  # of weight files behind the rows that one thread works on at a time
METADATA, DIGEST = "__metadata__", "sha256 "
NAMES = {
    DType.FLOAT: "F32",
    DType.FLOAT16: "F16",
    DType.BFLOAT16: "BF16",
    DType.DOUBLE: "F64",
    DType.INT8: "I8",
    DType.UINT8: "U8",
    DType.INT16: "I16",
    DType.UINT16: "U16",
    DType.INT32: "I32",
    DType.UINT32: "U32",
    DType.INT64: "I64",
    DType.UINT64: "U64",
    DType.BOOL: "BOOL",
    DType.FLOAT8E4M3FN: "F8_E4M3",
    DType.FLOAT8E5M2: "F8_E5M2",
}
Progress = Callable[[int, int], None]
_NO_DIGEST = "0" * 64  # as long as a digest: the header keeps its size


@dataclass(frozen=True)
class WeightFile:
    """What is to be written: a path, and the tensors by name."""

    path: Path
    tensors: Mapping[str, TensorExpr]

    def header(self, digests: Mapping[str, str]) -> bytes:
        """The header with its length, tensors in name order."""
        entries: dict[str, object] = {}
        at = 0
        for name, expr in sorted(self.tensors.items()):
            # what the format has no name for is stored as bytes; ONNX files say what they mean
            shape = list(expr.shape) if expr.dtype in NAMES else [expr.nbytes]
            offsets = [at, at + expr.nbytes]
            entries[name] = {"dtype": NAMES.get(expr.dtype, "U8"), "shape": shape, "data_offsets": offsets}
            at += expr.nbytes
        found = {DIGEST + name: digests.get(name, _NO_DIGEST) for name in entries}
        text = json.dumps({**({METADATA: found} if found else {}), **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def offsets(self) -> dict[str, int]:
        """Where the data of each tensor begins, in bytes from the start of the file."""
        found: dict[str, int] = {}
        at = len(self.header({}))
        for name, expr in sorted(self.tensors.items()):
            found[name] = at
            at += expr.nbytes
        return found

    @property
    def nbytes(self) -> int:
        """Size of the data, without the header."""
        return sum(expr.nbytes for expr in self.tensors.values())


@dataclass
class _Target:
    """A value that is made once, the places that it goes to, and its digest so far."""

    name: str
    expr: TensorExpr
    places: list[tuple[int, int]] = field(default_factory=list)  # (file descriptor, byte offset)
    digest: Any = field(default_factory=hashlib.sha256)

    @property
    def rows(self) -> int:
        """Rows that it can be cut between, 0 where it is made whole."""
        bits = math.prod(self.expr.shape[1:]) * self.expr.dtype.bits
        return 0 if not self.expr.shape or bits % 8 else self.expr.shape[0]

    @property
    def cost(self) -> int:
        """Bytes that making all of it may read or write."""
        return max(self.expr.nbytes, *(part.nbytes for part in stored_parts(self.expr)), 1)

    def write(self, low: int, high: int) -> int:
        """Make rows ``low`` to ``high`` (all, when it is made whole) and write them everywhere; bytes written."""
        array = self.expr.read((slice(low, high),) if self.rows else None)
        data = _bytes(array, self.expr.dtype)
        start = low * (self.expr.nbytes // self.rows) if self.rows else 0
        self.digest.update(data)
        for file, offset in self.places:
            _pwrite(file, data, offset + start)
        return len(data) * len(self.places)


def write_weight_files(
    files: Sequence[WeightFile], *, workers: int = 1, progress: Progress | None = None
) -> list[dict[str, int]]:
    """Write all ``files``; gives the byte offset of each tensor, by file. Equal inputs give equal bytes, whatever
    the number of ``workers`` (threads) and the order of the mappings. The files are synced to the disk.

    ``progress`` hears (bytes written, bytes in all) in the calling thread.

    Raises:
        UserError: a weight cannot be read or has no code, or there is no space for it all.
        OSError: a file cannot be written. What was written stays.
    """
    offsets = [file.offsets() for file in files]
    total = sum(file.nbytes for file in files)
    if not files:
        return []
    _check_space(files[0].path.absolute().parent, total)
    with contextlib.ExitStack() as opened, _written(files[0].path.parent):
        handles = [opened.enter_context(_created(file)) for file in files]
        targets: dict[str, _Target] = {}
        named: list[dict[str, _Target]] = []
        for file, handle, places in zip(files, handles, offsets, strict=True):
            named.append({})
            for name, given in sorted(file.tensors.items()):
                expr = without_round_trips(given)
                target = targets.setdefault(expr.key, _Target(name, expr))
                target.places.append((handle, places[name]))
                named[-1][name] = target
        _run(_groups(list(targets.values())), workers, lambda done: progress(done, total) if progress else None)
        for file, handle, found in zip(files, handles, named, strict=True):
            digests = {name: target.digest.hexdigest() for name, target in found.items()}
            _pwrite(handle, file.header(digests), 0)
            os.fsync(handle)
    return offsets


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """Let an error of writing, which knows a file by number only, name ``path``."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error


@contextlib.contextmanager
def _created(file: WeightFile) -> Iterator[int]:
    handle = os.open(file.path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(handle, len(file.header({})) + file.nbytes)
        yield handle
    finally:
        os.close(handle)


def _check_space(directory: Path, total: int) -> None:
    room = os.statvfs(directory)
    free = room.f_bavail * room.f_frsize
    if free < total:
        raise UserError(
            f"{directory}: no space for the weights: they need {total:,} bytes, {free:,} are free",
            "free some, or choose another `workspace.path`",
        )


def _groups(targets: Sequence[_Target]) -> list[list[_Target]]:
    """Targets that share a tensor of a file, together; groups with most to do come first."""
    head: dict[int, int] = {}

    def root(one: int) -> int:
        while head.setdefault(one, one) != one:
            head[one] = head[head[one]]
            one = head[one]
        return one

    owner: dict[object, int] = {}
    for index, target in enumerate(targets):
        for part in stored_parts(target.expr):
            head[root(index)] = root(owner.setdefault(part, index))
    found: dict[int, list[_Target]] = {}
    for index, target in enumerate(targets):
        found.setdefault(root(index), []).append(target)
    return sorted(found.values(), key=lambda group: -sum(target.expr.nbytes * len(target.places) for target in group))


def _run(groups: Sequence[Sequence[_Target]], workers: int, heard: Callable[[int], None]) -> None:
    """Make all groups on ``workers`` threads; ends them when one fails or the wait is interrupted."""
    said: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work(group: Sequence[_Target]) -> None:
        try:
            for step in _steps(group):
                if stop.is_set():
                    return
                said.put(step())
        except BaseException:
            stop.set()
            raise
        finally:
            said.put(None)

    with ThreadPoolExecutor(max(1, workers), "weights") as pool:
        try:
            jobs: list[Future[None]] = [pool.submit(work, group) for group in groups]
            done, left = 0, len(jobs)
            while left:
                count = said.get()
                if count is None:
                    left -= 1
                    continue
                done += count
                heard(done)
        finally:
            stop.set()
        for job in jobs:
            job.result()


def _steps(group: Sequence[_Target]) -> Iterator[Callable[[], int]]:
    """Pieces of work in the order in which the digests need them; a call gives the bytes that it wrote."""
    by_rows: dict[int, list[_Target]] = {}
    for target in group:
        by_rows.setdefault(target.rows, []).append(target)
    for rows, targets in sorted(by_rows.items()):
        # the widest first: what it reads of a file holds what the narrower ones need
        together = sorted(targets, key=lambda target: -target.expr.nbytes)
        turned = any(_is_turned(target.expr) for target in together)
        step = rows and max(1, STEP_BYTES * rows // sum(target.cost for target in together))
        for low in range(0, rows, step) if rows else [0]:
            yield partial(_step, together, low, min(low + step, rows), turned)


def _step(targets: Sequence[_Target], low: int, high: int, turned: bool) -> int:
    with contextlib.nullcontext() if turned else shared_reads():
        count = 0
        for target in targets:
            try:
                count += target.write(low, high)
            except UserError as error:
                raise UserError(f"weight {target.name}: {error.message}", error.hint) from error
    return count


def _is_turned(expr: TensorExpr) -> bool:
    """Rows of it are columns of a file: to keep whole rows of the file would be to keep all of it."""
    return isinstance(expr, Transposed) or any(_is_turned(part) for part in operands(expr))


def _bytes(array: npt.NDArray[Any], dtype: DType) -> memoryview:
    if dtype.bits < 8:
        return memoryview(numpy_helper.from_array(array).raw_data)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _pwrite(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count

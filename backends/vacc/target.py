"""The machine a schedule is made for: a YAML file in which every number says where it comes from.

Units are fixed: bytes and cycles of the core clock. A number is written `64`, `2MiB` or
`{value: 64, provenance: "public: ..."}`; a bare one takes the `provenance` of its section, or of the nearest section
around it. Every field is required, so no number can come from a default that the file does not show.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from vacc_opt.backends.vacc.schedule import ALIGN
from vacc_opt.ir.errors import UserError, did_you_mean

_TARGETS = Path(__file__).parent / "targets"
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_OPERANDS = ("f32", "f16", "i8")  # types that the array multiplies
_HOW = "write `public: SOURCE`, `measured: RUN` or `assumed`"
_PROVENANCE = re.compile(r"(public: .+|measured: .+|assumed)")


def parse_bytes(value: Any) -> Any:
    """Read `2MiB` as 2097152; anything that is not such a text is returned as it is.

    >>> parse_bytes("2MiB")
    2097152
    """
    match = re.fullmatch(r"(\d+)\s*(B|KiB|MiB|GiB)?", value) if isinstance(value, str) else None
    return int(match[1]) * _UNITS[match[2] or ""] if match else value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Cycles = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Dtypes = Annotated[dict[str, Rate], Field(min_length=1)]


class _Section(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=False)


class Ddr(_Section):
    """Memory of a die, shared by its cores: `efficiency` derates `bytes_per_cycle`, `latency` is of one request."""

    bytes_per_cycle: Rate
    efficiency: Annotated[float, Field(gt=0, le=1)]
    latency: Cycles
    burst: Bytes
    capacity: Bytes

    @property
    def effective_bytes_per_cycle(self) -> float:
        """Bytes a cycle that a stream of long requests reaches."""
        return self.bytes_per_cycle * self.efficiency


class Die(_Section):
    """One die: `cores` equal cores on one DDR memory. A rank of a program runs on one die."""

    cores: Count
    ddr: Ddr


class Accumulators(_Section):
    """f32 accumulator memory of the array.

    Sums that exceed `bytes` stay in SRAM and cross its port, in and out, at `sram_bytes_per_cycle` for each product
    that adds to them, while the array works; `null` for an array that cannot do that.
    """

    bytes: Bytes
    sram_bytes_per_cycle: Rate | None


class Matrix(_Section):
    """A weight-stationary array of `rows_k` x `cols_n`; a pass streams m rows of activations through it.

    `macs_per_cycle` goes by the type of the activations (int8 weights under f16 activations run at the f16 rate).
    """

    rows_k: Count
    cols_n: Count
    macs_per_cycle: Dtypes
    weight_load_bytes_per_cycle: Rate
    fill: Cycles
    acc: Accumulators

    def pass_cycles(self, m: int, dtype: str, weight_itemsize: int) -> int:
        """Cycles of one pass of `m` rows; weights of the next pass load meanwhile and may take longer."""
        tile = self.rows_k * self.cols_n
        stream = m * tile / self.macs_per_cycle[dtype]
        return max(math.ceil(stream), math.ceil(tile * weight_itemsize / self.weight_load_bytes_per_cycle))

    def port_cycles(self, m: int, n: int, first: bool) -> int:
        """Cycles in which m x n sums leave for SRAM and, but for those of the `first` product, come from there."""
        rate = self.acc.sram_bytes_per_cycle
        return math.ceil(m * n * (4 if first else 8) / rate) if rate else 0

    def cycles(self, m: int, n: int, k: int, dtype: str, weight_itemsize: int) -> int:
        """Array cycles of an m x n x k product without the pipeline fill: whole passes, tails cost a full one."""
        passes = math.ceil(k / self.rows_k) * math.ceil(n / self.cols_n)
        return passes * self.pass_cycles(m, dtype, weight_itemsize)


class Vector(_Section):
    """The vector engine: `lanes` elements a cycle for an operation that costs 1, and a start-up an operation."""

    lanes: Count
    startup: Cycles


class Sram(_Section):
    """Scratch memory of a core, in `banks` equal parts one after the other; `null` where none are known.

    `align` is that of schedules, `ALIGN`: another one is refused.
    Engines that do not share their buffers use banks of their own (see `banks`).
    """

    bytes: Bytes
    align: Bytes
    banks: Count | None

    @property
    def bank_bytes(self) -> int | None:
        """Bytes of a bank."""
        return self.bytes // self.banks if self.banks else None

    def whole_banks(self, size: int) -> int:
        """`size` bytes rounded up to whole banks; without banks as they are."""
        return -(-size // self.bank_bytes) * self.bank_bytes if self.bank_bytes else size


class Dma(_Section):
    """DMA of a core: `issue` cycles a descriptor, `max_outstanding` requests in flight.

    A request moves a tile, whatever its size; that as many of `chunk` bytes hide the latency of the DDR is checked of
    a target, and no more.
    """

    issue: Cycles
    max_outstanding: Count
    chunk: Bytes
    bytes_per_cycle: Rate


class Core(_Section):
    """One core: array, vector engine, scratch memory, DMA."""

    matrix: Matrix
    vector: Vector
    sram: Sram
    dma: Dma


class Links(_Section):
    """Links between dies in a ring: bytes a cycle of one direction, cycles a hop, link engines a die."""

    bytes_per_cycle: Rate
    hop_latency: Cycles
    engines: Count


_SECTIONS: dict[str, type[BaseModel]] = {
    "die": Die, "die.ddr": Ddr, "core": Core, "core.matrix": Matrix, "core.matrix.acc": Accumulators,
    "core.vector": Vector, "core.sram": Sram, "core.dma": Dma, "links": Links,
}  # fmt: skip


class Target(_Section):
    """A machine. `numbers_from` maps the dotted path of every number to its provenance.

    The name stands as one word in schedules. With several `dies`, programs have no more ranks than these; a target of
    one die stands for as many as a program has ranks.
    """

    name: Annotated[str, Field(pattern=r"^\S+$")]
    version: Count
    clock_mhz: Rate
    dies: Count
    links: Links | None
    die: Die
    core: Core
    numbers_from: dict[str, str]

    @property
    def sha(self) -> str:
        """Content hash (16 hex digits) of every field that is not null, and of every provenance."""
        text = json.dumps(self.model_dump(mode="json", exclude_none=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def assumed(self) -> list[str]:
        """Dotted paths of the numbers that nobody published or measured."""
        return sorted(path for path, source in self.numbers_from.items() if source == "assumed")

    def seconds(self, cycles: float) -> float:
        """Time of `cycles` at the core clock."""
        return cycles / (self.clock_mhz * 1e6)

    def to_yaml(self) -> str:
        """A target file that loads as this machine, the provenance of each number beside it."""
        tree = self.model_dump(exclude={"numbers_from"})
        return "".join(f"{line}\n" for line in _file_lines(tree, self.numbers_from))

    def numbers(self) -> Iterator[tuple[str, float, str]]:
        """(dotted path, value, provenance) of every number, in the order of the file."""
        for path, value in _leaves(self.model_dump(exclude={"numbers_from", "name", "version"})):
            yield path, value, self.numbers_from[path]


def target_names() -> list[str]:
    """Names of the targets that ship with the package."""
    return sorted(path.stem for path in _TARGETS.glob("*.yaml"))


def target_file(name_or_path: str | Path) -> Path:
    """The YAML file of a shipped target, or the path itself; raises UserError for an unknown name."""
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        path = _TARGETS / f"{name_or_path}.yaml"
        if not path.is_file():
            raise UserError(f"unknown target `{name_or_path}`", did_you_mean(str(name_or_path), target_names()))
    return path


def load_target(name_or_path: str | Path) -> Target:
    """Load a shipped target by name, or a YAML file by path; raise UserError where it is not a valid machine."""
    path = target_file(name_or_path)
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"target file {path} cannot be read: {error}") from error
    except YAMLError as error:
        raise UserError(f"target file {path} is not YAML: {' '.join(str(error).split())}") from error
    return parse_target(raw, str(path))


def parse_target(raw: Any, where: str = "target") -> Target:
    """Build a Target from the parsed YAML; `where` names the file in messages. Raises UserError."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: a target is a mapping of sections", f"start from {_TARGETS / 'vacc-reference.yaml'}")
    sources: dict[str, str] = {}
    plain = _strip(raw, "", None, sources, where)
    try:
        target = Target.model_validate(plain | {"numbers_from": sources})
    except ValidationError as error:
        raise _explain(error, where) from None
    _check_numbers(target, where)
    return target


def number_path(target: Target, key: str) -> str:
    """The dotted path of a number, which may be null, from its end: `ddr.latency` is `die.ddr.latency`.

    Raises UserError for a key that names no number or several.
    """
    tree = target.model_dump(exclude={"numbers_from", "name", "version"})
    paths = [path for path, _ in _leaves(tree, nulls=True) if path not in _SECTIONS]
    found = [key] if key in paths else [path for path in paths if path.endswith(f".{key}")]
    if not found:
        endings = [".".join(path.split(".")[start:]) for path in paths for start in range(path.count(".") + 1)]
        raise UserError(f"target {target.name} has no number `{key}`", did_you_mean(key, endings))
    if len(found) > 1:
        raise UserError(f"`{key}` is one of several numbers of target {target.name}", f"write {' or '.join(found)}")
    return found[0]


def overlay(target: Target, changes: Mapping[str, Any]) -> Target:
    """The target with other numbers, by dotted path or the end of one; they count as `assumed` and show in its name.

    Raises UserError for an unknown key, a value that the field does not take, or numbers that do not go together.
    """
    if not changes:
        return target
    tree = target.model_dump()
    for key, value in changes.items():
        path = number_path(target, key)
        *sections, field = path.split(".")
        section = tree
        for name in sections:
            section = section[name]
        section[field] = value
        tree["numbers_from"][path] = "assumed"
    tree["name"] = f"{target.name}+{','.join(f'{key}={value}' for key, value in changes.items())}"
    try:
        changed = Target.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, f"target {tree['name']}") from None
    _check_numbers(changed, f"target {tree['name']}")
    return changed


def _strip(
    raw: Mapping[str, Any], path: str, inherited: str | None, sources: dict[str, str], where: str
) -> dict[str, Any]:
    """Separate values from provenance: returns the plain tree, fills `sources`."""
    default = _provenance(raw["provenance"], path or "the file", where) if "provenance" in raw else inherited
    plain: dict[str, Any] = {}
    for key, value in raw.items():
        full = f"{path}.{key}" if path else str(key)
        if key == "provenance":
            continue
        if isinstance(value, Mapping) and "value" in value:
            unknown = sorted(set(value) - {"value", "provenance"})
            if unknown:
                raise UserError(f"{where}: {full}: unknown key `{unknown[0]}`", "a number has `value` and `provenance`")
            source = _provenance(value["provenance"], full, where) if "provenance" in value else default
            plain[key] = value["value"]
        elif isinstance(value, Mapping):
            plain[key] = _strip(value, full, default, sources, where)
            continue
        else:
            source = default
            plain[key] = value
        if (key in {"name", "version"} and not path) or value is None:
            continue
        if source is None:
            raise UserError(f"{where}: {full} has no provenance", _HOW)
        sources[full] = source
    return plain


def _provenance(text: Any, what: str, where: str) -> str:
    if not isinstance(text, str) or not _PROVENANCE.fullmatch(text):
        raise UserError(f"{where}: provenance of {what} is {text!r}", _HOW)
    return text


def _explain(error: ValidationError, where: str) -> UserError:
    """The first problem that pydantic found, with the nearest field name for an unknown key."""
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        fields = _fields(tuple(str(part) for part in problem["loc"][:-1]))
        return UserError(f"{where}: unknown key `{path}`", did_you_mean(str(problem["loc"][-1]), fields))
    if problem["type"] == "missing":
        return UserError(f"{where}: `{path}` is missing", "every number of a target is stated, none has a default")
    return UserError(f"{where}: {path} = {problem['input']!r}: {problem['msg']}")


def _fields(path: tuple[str, ...]) -> list[str]:
    """Field names of the section at `path`."""
    fields = _SECTIONS.get(".".join(path), Target).model_fields
    return [name for name in fields if name != "numbers_from"]


def _check_numbers(target: Target, where: str) -> None:
    """Refuse numbers that do not go together."""
    _check_littles_law(target, where)
    _check_types(target, where)
    sram = target.core.sram
    if sram.align != ALIGN:
        raise UserError(f"{where}: core.sram.align = {sram.align}, but slots of schedules start at {ALIGN}s")
    if sram.banks and sram.bytes % (sram.banks * ALIGN):
        raise UserError(
            f"{where}: {sram.bytes} bytes of SRAM are not {sram.banks} equal banks of whole {ALIGN} bytes",
            "change core.sram.bytes or core.sram.banks",
        )


def _check_types(target: Target, where: str) -> None:
    """Refuse an array whose rates are not those of the types of activations."""
    rates = target.core.matrix.macs_per_cycle
    for name in rates:
        if name not in _OPERANDS:
            raise UserError(f"{where}: unknown type `core.matrix.macs_per_cycle.{name}`", did_you_mean(name, _OPERANDS))
    for name in _OPERANDS:
        if name not in rates:
            raise UserError(
                f"{where}: `core.matrix.macs_per_cycle.{name}` is missing", f"types are {', '.join(_OPERANDS)}"
            )


def _check_littles_law(target: Target, where: str) -> None:
    """Refuse a target whose DMA cannot keep its own DDR busy: requests in flight >= latency x bandwidth."""
    in_flight = target.die.cores * target.core.dma.max_outstanding * target.core.dma.chunk
    needed = target.die.ddr.latency * target.die.ddr.effective_bytes_per_cycle
    if in_flight < needed:
        raise UserError(
            f"{where}: {in_flight} bytes in flight cannot hide {target.die.ddr.latency} cycles of DDR latency"
            f" at {target.die.ddr.effective_bytes_per_cycle:g} B/cycle ({needed:.0f} bytes needed)",
            "raise core.dma.max_outstanding or core.dma.chunk",
        )


def _file_lines(tree: Mapping[str, Any], sources: Mapping[str, str], path: str = "", indent: str = "") -> Iterator[str]:
    """Lines of YAML, in which texts and numbers are written as in JSON."""
    for key, value in tree.items():
        full = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from _file_lines(value, sources, full, f"{indent}  ")
        elif full in sources:
            yield f"{indent}{key}: {{value: {json.dumps(value)}, provenance: {_quoted(sources[full])}}}"
        else:
            yield f"{indent}{key}: {_quoted(value)}"


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _leaves(tree: Mapping[str, Any], path: str = "", nulls: bool = False) -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        full = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield from _leaves(value, full, nulls)
        elif nulls or value is not None:
            yield full, value

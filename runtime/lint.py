"""What is known to go wrong with configurations and checkpoints: one function a rule, each finding with a fix."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vacc_opt.frontends.checkpoint import index_of_shards
from vacc_opt.frontends.vamc_config import mistakes
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.runtime.lint_subject import Subject, read_object
from vacc_opt.runtime.plan import POSITIONS

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One mistake: the rule, where, what is wrong, and what to do; an ``error`` keeps ``compile`` from working."""

    rule: str
    severity: Severity
    message: str
    fix: str

    def to_json(self) -> dict[str, str]:
        """Plain values for ``json.dumps``."""
        return asdict(self)


Problem = tuple[Severity, str, str]  # severity, message, fix
Check = Callable[[Subject], Iterator[Problem]]


@dataclass(frozen=True)
class Rule:
    """A check by name, with the sentence that the documentation has of it."""

    name: str
    about: str
    check: Check

    def findings(self, subject: Subject) -> list[Finding]:
        """What the rule finds."""
        return [Finding(self.name, *problem) for problem in self.check(subject)]


RULES: dict[str, Rule] = {}  # in the order in which people correct things


def rule(name: str) -> Callable[[Check], Check]:
    """Register a check; its docstring is what the documentation says of it."""

    def register(check: Check) -> Check:
        RULES[name] = Rule(name, " ".join((check.__doc__ or "").split()), check)
        return check

    return register


def lint(file: Path, overrides: Sequence[str] = ()) -> list[Finding]:
    """All findings about a configuration and its checkpoint, in the order of the rules.

    Raises:
        UserError: the file is missing or no YAML mapping.
    """
    subject = Subject(file, overrides)
    return [finding for one in RULES.values() for finding in one.findings(subject)]


def reference_page() -> str:
    """The page of the documentation: every rule."""
    lines = [f"| `{one.name}` | {one.about} |" for one in RULES.values()]
    return "\n".join([_PAGE, "| rule | what it finds |", "|---|---|", *lines, ""])


_PAGE = """# What `vacc-opt lint` finds

`vacc-opt lint CONFIG.yaml` reads a configuration and the headers of its checkpoint, no weight, and names what is known
to go wrong, each with a fix. The exit code is 1 when there is an error: something that keeps `compile` from working. A
warning is worth a look.
`--json` prints a list for machines. This page is written by `vacc-opt lint --markdown`.
"""


# the configuration alone


@rule("schema")
def _schema(subject: Subject) -> Iterator[Problem]:
    """Misspelt, misplaced or missing keys; values that are no choice; sequence lengths that are not multiples of 16."""
    for mistake in mistakes(subject.data, subject.locations):
        yield "error", mistake.message, mistake.hint or "see `frontends/vamc_config.py` for the type"


@rule("int8-without-quantize")
def _int8(subject: Subject) -> Iterator[Problem]:
    """`backend.dtype: int8` in a file that does not say what is quantized."""
    if subject.get("backend.dtype") == "int8" and subject.get("frontend.quantize") is None:
        message = f"{subject.at('backend.dtype')} = int8, and there is no frontend.quantize"
        yield "error", message, "add `frontend.quantize.type`, such as w8a16_gptq, or set `dtype: fp16`"


@rule("calibration-text")
def _calibration(subject: Subject) -> Iterator[Problem]:
    """A quantization that learns from text (GPTQ, or KV scales that no file gives) in a file without `dataset`."""
    kind = str(subject.get("frontend.quantize.type") or "")
    scales = subject.get("frontend.quantize.kv_scales") or subject.model.get("kv_cache_path")
    needs = kind.endswith("_gptq") or ("kv8" in kind and not scales)
    if needs and subject.get("backend.dtype") != "fp32" and subject.get("dataset") is None:
        message = f"{subject.at('frontend.quantize.type')} = {kind} learns from text, and there is no dataset"
        yield (
            "error",
            message,
            "add `dataset.name` and `dataset.path`" + (", or give `kv_scales`" if not kind.endswith("_gptq") else ""),
        )


@rule("name-of-settings")
def _settings_in_name(subject: Subject) -> Iterator[Problem]:
    """A `name` that says another type, number of ranks or length than the file sets."""
    name = str(subject.get("name") or "").lower()
    tp, said = subject.get("frontend.model_kwargs.tp") or 1, re.search(r"(?:^|[-_])tp(\d+)(?=[-_]|$)", name)
    if said and int(said[1]) != tp:
        message = f"{subject.at('name')} says tp{said[1]}, frontend.model_kwargs.tp is {tp}"
        yield "warning", message, f"write tp{tp} in the name, or set `tp: {said[1]}`"
    dtype, typed = subject.get("backend.dtype") or "fp16", re.search(r"(?:^|[-_])(fp16|int8|fp32)(?=[-_]|$)", name)
    if typed and typed[1] != dtype:
        message = f"{subject.at('name')} says {typed[1]}, backend.dtype is {dtype}"
        yield "warning", message, f"write {dtype} in the name, or set `dtype: {typed[1]}`"
    lengths = re.search(r"-(\d+)-(\d+)(?:-kv8)?$", name)
    given = subject.get("frontend.shape.input_ids")
    rows = [row if isinstance(row, list) else [] for row in given] if isinstance(given, list) else []
    if lengths and rows and not all(int(n) in row for n, row in zip(lengths.groups(), [*rows, []], strict=False)):
        message = f"{subject.at('name')} says lengths {lengths[1]} and {lengths[2]}, input_ids are {given}"
        yield "warning", message, "make them agree: the name is the folder that the artifact goes to"


@rule("name-of-checkpoint")
def _checkpoint_in_name(subject: Subject) -> Iterator[Problem]:
    """A file or `name` that says another version or size of a model family than the checkpoint's path."""
    checkpoint = Path(str(subject.get("frontend.checkpoint") or "")).name
    for what, text in ((subject.at("name"), str(subject.get("name") or "")), (str(subject.file), subject.file.stem)):
        for kind, ours in _models(text).items():
            theirs = _models(checkpoint).get(kind)
            if theirs and not ours & theirs:
                message = f"{what} is of {kind} {', '.join(sorted(ours))}, the checkpoint {checkpoint} of "
                fix = "correct `frontend.checkpoint` and `name`; one of them was copied from another model's file"
                yield "warning", message + ", ".join(sorted(theirs)), fix


def _models(text: str) -> dict[str, set[str]]:
    """Versions by family, and sizes: ``qwen1.5-7b`` is of qwen 1.5 and of size 7b."""
    text = re.sub(r"(?<![a-z])(?:tp|int|fp|bf|kv|w|a)\d+", "", text.lower())
    found: dict[str, set[str]] = {}
    for family, version in re.findall(r"([a-z]{3,})[-_]?(\d+(?:\.\d+)?)(?![\d.]*[bm])", text):
        found.setdefault(family, set()).add(version)
    for size in re.findall(r"(?<![\d.])(\d+(?:[._]\d+)?)b(?![a-z\d])", text):
        found.setdefault("size", set()).add(f"{size.replace('_', '.')}b")
    return found


# the checkpoint


@rule("missing-shards")
def _shards(subject: Subject) -> Iterator[Problem]:
    """Files that the index of the shards names and that are not there."""
    index = index_of_shards(subject.directory) if subject.directory is not None else None
    if index is None:
        return
    weights = read_object(index).get("weight_map")
    files = set(weights.values()) if isinstance(weights, dict) else set()
    lost = sorted(f for f in map(str, files) if not (index.parent / f).is_file())
    if lost:
        message = f"{index}: {len(lost)} of {len(files)} shards are missing: {', '.join(lost[:4])}"
        yield "error", message, "download them into the same directory"


@rule("checkpoint")
def _checkpoint(subject: Subject) -> Iterator[Problem]:
    """A checkpoint that cannot be opened: no such path, no config.json, truncated or damaged files."""
    if isinstance(subject.opened, UserError) and not list(_shards(subject)):
        yield "error", subject.opened.message, subject.opened.hint or "download it again"


@rule("auto-map")
def _auto_map(subject: Subject) -> Iterator[Problem]:
    """`auto_map` in config.json that names Python files which are not there."""
    entries = subject.model.get("auto_map")
    if subject.directory is None or not isinstance(entries, dict):
        return
    files = {f"{str(one).split('--')[-1].partition('.')[0]}.py" for one in entries.values()}
    lost = sorted(name for name in files if not (subject.directory / name).is_file())
    if lost:
        trusted = subject.get("frontend.trust_remote_code") is True
        message = f"{subject.json_file}: auto_map names {', '.join(lost)}, not in the directory"
        fix = "copy the files from where the weights are from" + (
            "" if trusted else ", or remove auto_map: it is not used"
        )
        yield "error" if trusted else "warning", message, fix


_KEYS = ("_attn_implementation", "insert_slice", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
         "rope_scaling", "tie_word_embeddings", "pretraining_tp")  # fmt: skip


@rule("config-json-keys")
def _json_keys(subject: Subject) -> Iterator[Problem]:
    """Misspelt keys of config.json, which are ignored: `attn_implementation` without underscore, `insert_slcie`."""
    for key in subject.model:
        hint = did_you_mean(key, _KEYS) if sorted(key.strip("_")) in [sorted(k.strip("_")) for k in _KEYS] else ""
        if key not in _KEYS and hint.startswith("did you mean"):
            yield "warning", f"{subject.json_file}: the key {key} is ignored", hint


@rule("pretraining-tp")
def _pretraining_tp(subject: Subject) -> Iterator[Problem]:
    """`pretraining_tp` above 1 in config.json, with which upstream cannot export; here it changes nothing."""
    if (ranks := subject.number("pretraining_tp")) is not None and ranks > 1:
        message = f"{subject.json_file}: pretraining_tp is {ranks}, a split of the sums that older code makes"
        yield "warning", message, "set `pretraining_tp: 1`; the weights are the same"


_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@rule("layers")
def _layers(subject: Subject) -> Iterator[Problem]:
    """`num_hidden_layers` in config.json that disagrees with the layers in the weights."""
    key = next((k for k in ("num_hidden_layers", "num_layers", "n_layer") if subject.number(k) is not None), None)
    if subject.checkpoint is None or key is None:
        return
    stored = {int(found[1]) for name in subject.checkpoint.tensors if (found := _LAYER.search(name))}
    if stored and max(stored) + 1 != subject.number(key):
        message = f"{subject.json_file}: {key} is {subject.number(key)}, the weights have {max(stored) + 1} layers"
        yield "error", message, f"set `{key}: {max(stored) + 1}`"


_MOBILLAMA = "MobiLlamaForCausalLM"


@rule("kv-heads")
def _kv_heads(subject: Subject) -> Iterator[Problem]:
    """`num_key_value_heads` in config.json that does not match the rows of the key projection."""
    hidden, heads, kv_heads = subject.number("hidden_size"), subject.heads, subject.kv_heads
    if subject.checkpoint is None or hidden is None or not heads or kv_heads is None:
        return
    width = subject.number("head_dim") or hidden // heads
    rows = Counter(t.shape[0] for n, t in subject.checkpoint.tensors.items() if n.endswith("k_proj.weight"))
    wrong = [found for found in rows if width > 0 and found != kv_heads * width]
    if wrong:
        message = f"{subject.json_file}: num_key_value_heads is {kv_heads}, the key projections have {wrong[0]} rows"
        fits = wrong[0] % width == 0
        fix = f"set `num_key_value_heads: {wrong[0] // width}`" if fits else f"head_dim {width} does not divide them"
        unread = _MOBILLAMA in (subject.model.get("architectures") or ())  # as many as query heads, whatever it says
        yield "warning" if unread else "error", message + f" of {width} a head", fix


@rule("tensors")
def _tensors(subject: Subject) -> Iterator[Problem]:
    """Tensors that the model of config.json has and the weights lack, or have in another shape, or without scales."""
    wrong_heads = any(severity == "error" for severity, _, _ in _kv_heads(subject))
    if subject.checkpoint is None or list(_layers(subject)) or wrong_heads:
        return
    from vacc_opt.frontends.huggingface import build_module
    from vacc_opt.frontends.shared_layers import find_shared_layers

    if subject.get("frontend.trust_remote_code") is True:
        return  # its code says which tensors it has, and lint runs none
    try:
        checkpoint = find_shared_layers(subject.checkpoint)
        module, _ = build_module(checkpoint.config)
    except UserError as error:
        yield "error", error.message, error.hint or "compare config.json with the original"
        return
    wanted = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    lost = [name for name in wanted if name not in checkpoint.tensors]
    if lost:
        message = f"{checkpoint.path}: {len(lost)} tensors are missing: {', '.join(lost[:3])}"
        yield "error", message, "the config and the weights are of different models, or a shard is missing"
    stored = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    wrong = [name for name, shape in wanted.items() if stored.get(name, shape) != shape]
    if wrong:
        first = wrong[0]
        message = f"{checkpoint.path}: {len(wrong)} tensors have a wrong shape: {first} is {list(stored[first])}"
        fix = "correct the sizes in config.json, or use the weights that belong to it"
        yield "error", f"{message}, config.json makes it {list(wanted[first])}", fix
    for name in [name for name in wanted if name in checkpoint.tensors]:
        try:
            checkpoint.scales_of(name)
        except UserError as error:
            yield "error", error.message, error.hint or ""
            return


# both together


@rule("length")
def _length(subject: Subject) -> Iterator[Problem]:
    """Sequence lengths beyond the positions that the model was trained for."""
    largest = subject.number(*POSITIONS)
    rows = subject.get("frontend.shape.input_ids")
    lengths = [n for row in rows if isinstance(row, list) for n in row] if isinstance(rows, list) else []
    longest = max((n for n in lengths if isinstance(n, int)), default=0)
    if largest is not None and longest > largest:
        message = f"{subject.at('frontend.shape.input_ids')} reaches {longest} tokens, the model {largest} positions"
        yield "error", message, f"at most {largest // 16 * 16}"


@rule("ranks")
def _ranks(subject: Subject) -> Iterator[Problem]:
    """More ranks than the model has query heads."""
    tp = subject.get("frontend.model_kwargs.tp")
    if isinstance(tp, int) and subject.heads and tp > subject.heads:
        message = f"{subject.at('frontend.model_kwargs.tp')} = {tp}, but the model has {subject.heads} query heads"
        yield "error", message, f"the largest tp is {subject.heads}"


@rule("align-qkv")
def _align_qkv(subject: Subject) -> Iterator[Problem]:
    """Heads that do not divide over the ranks without `align_qkv`, which upstream then needs."""
    tp = subject.get("frontend.model_kwargs.tp")
    if not isinstance(tp, int) or tp < 1 or subject.get("frontend.model_kwargs.align_qkv") is True:
        return
    counts = (("query", subject.heads), ("KV", subject.kv_heads))
    uneven = [f"{count} {kind} heads" for kind, count in counts if count and count % tp]
    if uneven:
        message = f"{subject.at('frontend.model_kwargs.tp')} = {tp}, over which {' and '.join(uneven)} do not divide"
        yield "warning", message, "add `align_qkv: true` for upstream's compiler; this one aligns them unasked"

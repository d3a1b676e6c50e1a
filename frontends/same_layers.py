"""Which layers of a model run the same operations: seen by a run without data, so that one stands for the others.

A layer may be left out of an export only if it cannot be told from the second one: in every layer behind it the same
ATen operators run in the same order, on the layer's own weights, its own cache, what the layer before it gave and what
all layers share, with the same numbers; its modules have the same settings; and one tensor goes from layer to layer and
on to what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from vacc_opt.frontends.caches import AsIfPadded, CacheForm
from vacc_opt.frontends.repeat_layers import KEPT, Layers

_BATCH = 2
_SIZES = ((4, 6), (512, 1 << 17))  # tokens of a call and of the past: code may branch on lengths, so also long ones
_OF_LAYER = ("cache", "layer", "beside")  # kinds of tokens whose second entry is a layer
Token = tuple[Any, ...]


class _Different(Exception):
    """A layer can be told from the others, or what it runs cannot be seen."""


@dataclass
class _Seen:
    """A run: operations of each layer and of what all layers share, and what became logits and caches."""

    layers: list[list[Token]]
    shared: list[Token] = field(default_factory=list)
    logits: Token = ()
    caches: list[list[Token]] = field(default_factory=list)


def layer_lists(module: nn.Module) -> list[Layers]:
    """What may be the layers of ``module``: lists of modules that are more than those exported and one."""
    lists = ((path, part) for path, part in module.named_modules() if isinstance(part, nn.ModuleList))
    return [Layers(path, len(part)) for path, part in lists if len(part) > KEPT + 1]


def find_same_layers(module: nn.Module, mode: FakeTensorMode, cache: CacheForm) -> Layers | None:
    """The layers of ``module``, if those behind the second one cannot be told from it; None if they can."""
    found = [layers for layers in layer_lists(module) if layers.count == cache.layers]
    if len(found) != 1:
        return None
    layers = found[0]
    try:
        _compare_settings(module.get_submodule(layers.path))
        same = all(_run_alike(module, mode, cache, layers, *sizes) for sizes in _SIZES)
    except (_Different, IndexError, AttributeError, RuntimeError, TypeError, ValueError):
        return None  # the whole model is exported, and says what is wrong with it
    return layers if same else None


def _run_alike(module: nn.Module, mode: FakeTensorMode, cache: CacheForm, layers: Layers, seq: int, past: int) -> bool:
    """In a call of ``seq`` tokens behind ``past`` no layer can be told from the second, with all or with two layers."""
    known = _Known()
    whole = _run(module, mode, cache, layers, known, seq, past)
    with first_layers(module, layers):
        short = _run(module, mode, replace(cache, layers=KEPT), layers, known, seq, past)
    handed = {token[1:] for _, tokens in whole.layers[1] for token in tokens if token[0] == "before"}
    return (
        all(one == whole.layers[1] for one in whole.layers[KEPT:])
        and all(one == whole.caches[1] for one in whole.caches[KEPT:])
        and (short.layers, short.caches) == (whole.layers[:KEPT], whole.caches[:KEPT])
        and (short.shared, short.logits) == (whole.shared, whole.logits)
        and len(handed) == 1
        and known.read_by(whole.logits) == handed
    )


@contextmanager
def first_layers(module: nn.Module, layers: Layers) -> Iterator[None]:
    """Within the block the model has its first layers only."""
    parent_path, _, name = layers.path.rpartition(".")
    parent = module.get_submodule(parent_path)
    whole = parent._modules[name]
    assert isinstance(whole, nn.ModuleList)
    parent._modules[name] = whole[:KEPT]
    try:
        yield
    finally:
        parent._modules[name] = whole


def _compare_settings(layers: nn.Module) -> None:
    """Plain attributes and buffers are equal, or number the layer."""
    parts = [list(layer.modules()) for layer in layers.children()]
    for distance, one in enumerate(parts[KEPT:], 1):
        for mine, theirs in zip(one, parts[1], strict=True):
            settings, others = _settings(mine), _settings(theirs)
            buffers, kept = (dict(part.named_buffers(recurse=False)) for part in (mine, theirs))
            if settings.keys() != others.keys() or buffers.keys() != kept.keys():
                raise _Different
            for name, value in settings.items():
                numbers = type(value) is int and type(others[name]) is int and value - others[name] == distance
                if value != others[name] and not numbers:
                    raise _Different
            if not all(torch.equal(buffer, kept[name]) for name, buffer in buffers.items()):
                raise _Different


def _settings(part: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {"": type(part)}
    return found | {name: v for name, v in vars(part).items() if isinstance(v, (int, float, str, type(None)))}


class _Known:
    """Numbers for operations outside the layers that belong to one layer, and what each reads of its layer."""

    def __init__(self) -> None:
        self._numbers: dict[Token, int] = {}
        self._reads: list[frozenset[Token]] = []

    def number(self, operation: Token, arguments: Sequence[Token]) -> int:
        """The number of an operation; equal ones have one number."""
        if operation not in self._numbers:
            self._numbers[operation] = len(self._reads)
            own = {token[1:] for token in arguments if token[0] == "layer"}
            self._reads.append(frozenset(own.union(*(self.read_by(token) for token in arguments))))
        return self._numbers[operation]

    def read_by(self, token: Token) -> frozenset[Token]:
        """What a token without its layer stands for among the results of that layer."""
        return self._reads[token[1]] if token and token[0] == "beside" else frozenset()


def _without_layer(token: Token) -> Token:
    return (token[0], *token[2:]) if token[0] in _OF_LAYER else token


def _run(
    module: nn.Module, mode: FakeTensorMode, cache: CacheForm, layers: Layers, known: _Known, seq: int, before: int
) -> _Seen:
    recorder = _Recorder(module, layers, known)
    with mode, torch.no_grad():
        tokens, positions = (torch.zeros(_BATCH, seq, dtype=torch.int64) for _ in range(2))
        mask = torch.ones(_BATCH, before + seq, dtype=torch.int64)
        stacked = torch.zeros(2 * cache.layers, _BATCH, cache.kv_heads, before, cache.head_dim)
        past = list(stacked.unbind())
        for name, tensor in (("ids", tokens), ("mask", mask), ("positions", positions)):
            recorder.name(tensor, ("input", name))
        for index, tensor in enumerate(past):
            recorder.name(tensor, ("cache", index // 2, index % 2))
        with recorder, AsIfPadded(mask), _Literals(recorder):
            given = cache.given(past)
            result = module(
                input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=given, use_cache=True
            )
            taken = cache.taken(result.past_key_values)
    seen = recorder.seen
    last = len(seen.layers) - 1
    seen.logits = recorder.result(result.logits, last)
    seen.caches = [[recorder.result(part, n // 2) for part in taken[n : n + 2]] for n in range(0, len(taken), 2)]
    return seen


class _Recorder(TorchDispatchMode):  # type: ignore[misc,unused-ignore]
    """Writes down each operator with its arguments, by layer; a tensor is what made it, relative to the layer.

    Outside the layers an operator belongs to the layer whose cache or result it reads, if to any, else to all layers.
    """

    def __init__(self, module: nn.Module, layers: Layers, known: _Known) -> None:
        super().__init__()
        self.seen = _Seen([[] for _ in range(len(module.get_submodule(layers.path)))])
        self._path, self._module, self._known = layers.path, module, known
        self.literal: str | None = None  # arguments of the `torch.tensor` that runs
        self._layer: int | None = None
        self._tokens: dict[int, Token] = {}
        self._alive: list[torch.Tensor] = []  # so that no id is given twice
        self._hooks: list[Any] = []
        for name, tensor in (*module.named_buffers(), *module.named_parameters()):
            self.name(tensor, ("weight", name))

    def name(self, tensor: torch.Tensor, token: Token) -> None:
        """Call a tensor by a token."""
        self._tokens[id(tensor)] = token
        self._alive.append(tensor)

    def result(self, tensor: torch.Tensor, layer: int) -> Token:
        """The token of a result that must belong to a layer, without the layer."""
        token = self._tokens[id(tensor)]
        if token[0] not in _OF_LAYER or token[1] != layer:
            raise _Different
        return _without_layer(token)

    def __enter__(self) -> Any:
        for index, layer in enumerate(self._module.get_submodule(self._path).children()):
            self._hooks.append(layer.register_forward_pre_hook(self._entering(index)))
            self._hooks.append(layer.register_forward_hook(self._leaving))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def _entering(self, index: int) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._layer = index

        return enter

    def _leaving(self, *_: Any) -> None:
        self._layer = None

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and keep it."""
        arguments, _ = tree_flatten((args, kwargs or {}))
        tokens = [self._token(one) if isinstance(one, torch.Tensor) else ("", repr(one)) for one in arguments]
        result = func(*args, **(kwargs or {}))
        made = self._keep(str(func), tokens)
        for number, tensor in enumerate(tree_flatten(result)[0]):
            if isinstance(tensor, torch.Tensor):
                self.name(tensor, (*made, number))
        return result

    def _keep(self, operator: str, tokens: Sequence[Token]) -> Token:
        if self._layer is not None:
            record = self.seen.layers[self._layer]
            record.append((operator, tuple(self._relative(token) for token in tokens)))
            return ("layer", self._layer, len(record) - 1)
        owners = {token[1] for token in tokens if token[0] in _OF_LAYER}
        if len(owners) > 1:
            raise _Different
        bare = [_without_layer(token) for token in tokens]
        if owners:
            return ("beside", owners.pop(), self._known.number((operator, *bare), bare))
        if all(token[0] in ("", "constant", "fresh") for token in tokens):
            return ("fresh", self._known.number((operator, *bare), bare))
        self.seen.shared.append((operator, *bare))
        return ("shared", len(self.seen.shared) - 1)

    def _token(self, tensor: torch.Tensor) -> Token:
        known = self._tokens.get(id(tensor))
        if known is not None:
            return known
        if self.literal is None:
            raise _Different
        return ("constant", self.literal)

    def _relative(self, token: Token) -> Token:
        assert self._layer is not None
        if token[0] == "layer" and token[1] in (self._layer, self._layer - 1):
            return ("here" if token[1] == self._layer else "before", *token[2:])
        if token[0] in ("cache", "beside"):
            return (token[0], token[1] - self._layer, *token[2:])
        own = f"{self._path}.{self._layer}."
        if token[0] == "weight" and token[1].startswith(own):
            return ("own", token[1].removeprefix(own))
        return token


class _Literals(TorchFunctionMode):  # type: ignore[misc,unused-ignore]
    """Tells a recorder what numbers a tensor is made of, which operators do not show."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Keep the arguments of ``torch.tensor`` while it runs."""
        if func is not torch.tensor:
            return func(*args, **(kwargs or {}))
        self._recorder.literal = repr((args, kwargs))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._recorder.literal = None

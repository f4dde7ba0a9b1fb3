"""What a captured program took for granted about Python state, and the cheap check before every step that it still holds."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from operator import is_
from types import CodeType, FunctionType, MethodType
from typing import Any, final

import torch
from torch import nn

from polyaccel.errors import PrepareError

from .attributes import placed
from .packing import Identity
from .shared_objects import shared_objects

_log = logging.getLogger(__name__)
_MANY = 8  # states of one model before the user is told what makes them
_SCALARS = (bool, int, float, str, bytes, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ABSENT = object()
# Hooks that torch calls for every module there is.
_EVERYWHERE = tuple(
    getattr(torch.nn.modules.module, name)
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
)
_EVERY_MODULE = frozenset(vars(nn.Module()))
_OWN = frozenset({"_parameters", "_buffers", "_modules", "_version", "dump_patches", "call_super_init"})


@final
class ModuleToken:
    """Stands for one state of a module tree: modes, flags, scalar attributes, submodules, what is trainable."""

    __slots__ = ("_values", "is_training", "trainable")

    def __init__(
        self, is_training: bool, trainable: frozenset[str], values: Sequence[tuple[dict[str, Any], str, Any]]
    ) -> None:
        self.is_training = is_training
        self.trainable = trainable
        self._values = tuple(values)

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside, the modules' plain attributes are those of this state: what was recorded is captured as it was recorded."""
        changed = [(own, key, own.get(key, _ABSENT)) for own, key, value in self._values if own.get(key) is not value]
        for own, key, value in self._values:
            own[key] = value
        try:
            yield
        finally:
            for own, key, value in changed:
                if value is _ABSENT:
                    own.pop(key, None)
                else:
                    own[key] = value


@final
class ModuleGuard:
    """Gives the token of a module's present state; the same state gives the same token again."""

    def __init__(self, module: nn.Module, names: Mapping[int, str]) -> None:
        self.module = module
        self.ignored: dict[tuple[int, str], tuple[dict[str, Any], str, str]] = {}  # plain counters, by place
        self.looked_at: set[tuple[int, str]] = set()  # numbers that decide something: never ignored again
        self._names = names  # parameters and buffers that are managed, by id
        self._scalars: list[tuple[dict[str, Any], str]] = []
        self._scalar_values: list[Any] = []
        self._objects: list[tuple[dict[str, Any], str]] = []
        self._object_values: list[Any] = []
        self._containers: list[Mapping[Any, Any]] = []  # what may grow or shrink: attributes, hooks, submodules, slots
        self._sizes: list[int] = []
        self._collections: list[Any] = []  # lists, dicts and sets in attributes: their plain values count
        self._collection_values: list[Any] = []
        self._token: ModuleToken | None = None
        self._tokens: dict[tuple[Any, ...], ModuleToken] = {}

    def token(self) -> ModuleToken:
        """The token of now. Raises PrepareError for parameters or buffers that were put in after prepare."""
        if (
            self._token is not None
            and list(map(len, self._containers)) == self._sizes
            and [holder.get(key) for holder, key in self._scalars] == self._scalar_values
            and all(map(is_, [holder.get(key) for holder, key in self._objects], self._object_values))
            and list(map(_plain_part, self._collections)) == self._collection_values
        ):
            return self._token
        self._walk()
        self._token = self._find()
        return self._token

    def ignore(self, places: Mapping[tuple[int, str], tuple[dict[str, Any], str, str]]) -> None:
        """Let the values of these attributes (by id of their dict, and key) count no longer; the present state keeps its token."""
        self.looked_at |= self.ignored.keys() - places.keys()
        if places == self.ignored:
            return
        more = places.keys() >= self.ignored.keys()
        self.ignored = dict(places)
        token = self._token
        self._token = None
        if token is not None and more:
            self._walk()
            self._token = self._tokens[self._state()] = token

    def owned(self) -> set[int]:
        """The ids of the dicts whose plain values decide: of the modules, and of objects that they hold."""
        modules = {id(module.__dict__) for module in self.module.modules()}
        return modules | {id(own) for _, own in shared_objects(self.module.named_modules())}

    def also(self, values: Sequence[tuple[tuple[dict[str, Any], str, str], Any]]) -> None:
        """The state with these values in their places, by which forward does the same, gets the token of the present one."""
        self._walk()
        token = self._tokens.get(self._state())
        if token is None:
            return
        with placed(values):
            self._walk()
            self._tokens.setdefault(self._state(), token)
        self._walk()
        self._token = token

    def _note_many(self) -> None:
        """Say once what makes a model be captured again and again."""
        if len(self._tokens) == _MANY:
            places = [(holder, key) for holder, key in (*self._scalars, *self._objects)]
            seen = list(self._tokens)[-2:]
            changed = sorted(
                {key for (_, key), a, b in zip(places, *(one[1:][0] + one[2] for one in seen), strict=False) if a != b}
            )
            _log.warning(
                "%s was captured for %d states of its attributes; %s changes often, and every value is compiled anew",
                type(self.module).__name__,
                _MANY,
                ", ".join(changed) or "its structure",
            )

    def _find(self) -> ModuleToken:
        trainable = frozenset(
            self._names[id(p)] for p in self.module.parameters() if p.requires_grad and id(p) in self._names
        )
        state = self._state()
        token = self._tokens.get(state)
        if token is None:
            token = self._tokens[state] = ModuleToken(self.module.training, trainable, self._plain_values())
            self._note_many()
        return token

    def _state(self) -> tuple[Any, ...]:
        return (
            tuple((id(holder), key) for holder, key in (*self._scalars, *self._objects)),
            tuple((type(value), value) for value in self._scalar_values),
            tuple(Identity(value) for value in self._object_values),
            repr(self._collection_values),
        )

    def _plain_values(self) -> list[tuple[dict[str, Any], str, Any]]:
        own = self.owned()
        places = zip((*self._scalars, *self._objects), (*self._scalar_values, *self._object_values), strict=True)
        return [(holder, key, value) for (holder, key), value in places if id(holder) in own]

    def _walk(self) -> None:
        scalars: list[tuple[dict[str, Any], str]] = []
        objects: list[tuple[dict[str, Any], str]] = []
        containers: list[Mapping[Any, Any]] = list(_EVERYWHERE)
        collections: list[Any] = []
        objects.extend((hooks, key) for hooks in _EVERYWHERE for key in hooks)
        for path, module in self.module.named_modules():
            own = module.__dict__
            containers += (own, module._parameters, module._buffers, module._modules, *(own[hooks] for hooks in _HOOKS))
            for key, value in own.items():
                if (id(own), key) in self.ignored:
                    continue
                if isinstance(value, _SCALARS) and key not in _OWN:
                    scalars.append((own, key))
                elif isinstance(value, torch.Tensor | nn.Module | FunctionType | MethodType):
                    objects.append((own, key))
                elif key not in _EVERY_MODULE and isinstance(value, list | dict | set | tuple):
                    collections.append(value)
            objects.extend((module._modules, key) for key in module._modules)
            objects.extend((own[hooks], key) for hooks in _HOOKS for key in own[hooks])
            for holder in (module._parameters, module._buffers):
                for key, tensor in holder.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in self._names:
                        raise PrepareError(
                            f"{f'{path}.' if path else ''}{key} of {type(self.module).__name__} was put in after prepare",
                            "build the whole model before accelerator.prepare, and change values with load_state_dict or copy_",
                        )
                    objects.append((holder, key))
                    if holder is module._parameters:
                        scalars.append((tensor.__dict__, "_requires_grad"))
        for _, own in shared_objects(self.module.named_modules()):
            plain = (name for name, value in own.items() if isinstance(value, _SCALARS))
            scalars.extend((own, name) for name in plain if (id(own), name) not in self.ignored)
        self._containers, self._sizes = containers, list(map(len, containers))
        self._collections, self._collection_values = collections, list(map(_plain_part, collections))
        self._scalars, self._objects = scalars, objects
        self._scalar_values = [holder.get(key) for holder, key in scalars]
        self._object_values = [holder.get(key) for holder, key in objects]


def _plain_part(collection: Any) -> Any:
    if isinstance(collection, dict):
        return {key: value for key, value in collection.items() if isinstance(value, _SCALARS)}, len(collection)
    return [value for value in collection if isinstance(value, _SCALARS)], len(collection)


# -- functions -----------------------------------------------------------------------------------------------------------


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@final
class FunctionGuard:
    """The names outside a function that it reads: closure cells, defaults, and the globals it mentions."""

    def __init__(self, function: Any) -> None:
        plain = function.__func__ if isinstance(function, MethodType) else function
        self.code: CodeType | None = plain.__code__ if isinstance(plain, FunctionType) else None
        self._globals: tuple[str, ...] = ()
        if self.code is not None:
            names = {name for code in _codes(self.code) for name in code.co_names}
            self._globals = tuple(sorted(name for name in names if name in plain.__globals__))

    def outside(self, function: Any) -> dict[str, Any]:
        """What a function of this code sees now, by name: cells and defaults whole, globals only where they are data."""
        found: dict[str, Any] = {}
        if isinstance(function, MethodType):
            found["self"] = function.__self__
            function = function.__func__
        if not isinstance(function, FunctionType):
            found["function"] = function
            return found
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                found[name] = cell.cell_contents
            except ValueError:  # a name that is not bound yet
                continue
        if function.__defaults__:
            found["defaults"] = function.__defaults__
        if function.__kwdefaults__:
            found["keyword defaults"] = function.__kwdefaults__
        scope = function.__globals__
        for name in self._globals:
            value = scope.get(name)
            if isinstance(value, (*_SCALARS, torch.Tensor, nn.Module)):
                found[name] = value
        return found

"""Attributes that a model's forward changes: a program leaves Python alone, so what forward would have done is done after each call.

A counter that nothing else looks at is counted on. A plain value that decides something gets its new value, and the next call is
captured for it. Tensors and other objects that forward keeps exist only inside the program: using them afterwards is refused, but
for those that depend on sizes alone (a mask that is made once): they are as before, and every capture makes them anew.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, final

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree

from polyaccel.errors import PrepareError

from .shared_objects import shared_objects

if TYPE_CHECKING:
    from .guards import ModuleGuard
    from .scope import CaptureScope

_PLAIN = (bool, int, float, str, bytes, complex, type(None))
_TORCHS_OWN = frozenset({*vars(nn.Module()), "forward", "_flat_weights", "_flat_weight_refs"}) - {"training"}
_ABSENT = object()

Place = tuple[dict[str, Any], str, str]  # the module's __dict__, the key in it, the name for messages


_LIKE = frozenset(
    {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
)
_CASTS = frozenset({"to", "type_as"})  # their further operands give a dtype
_RANDOM = ("rand", "normal", "bernoulli", "dropout", "multinomial", "poisson", "uniform", "exponential")


@final
class Constants:
    """The tensors of one capture that depend on nothing but sizes and numbers: masks, positions, tables of angles."""

    def __init__(self) -> None:
        self._found: dict[int, torch.Tensor] = {}

    def note(self, func: Any, given: Any, result: Any) -> None:
        """`func` gave `result` for the operands in `given`."""
        name = str(getattr(func, "__name__", ""))
        if any(word in name for word in _RANDOM):
            return
        operands = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]
        if name in _CASTS:
            operands = operands[:1]
        if name in _LIKE or all(map(self.holds, operands)):
            made = [result] if isinstance(result, torch.Tensor) else result if type(result) in (list, tuple) else []
            self._found.update({id(tensor): tensor for tensor in made if isinstance(tensor, torch.Tensor)})

    def holds(self, value: Any) -> bool:
        """Whether a tensor, or every leaf of a list, tuple or dict, is a constant. Plain tensors from outside are."""
        if isinstance(value, torch.Tensor):
            is_inside = isinstance(value, FakeTensor | FunctionalTensor) or hasattr(value, "_recorder")
            return id(value) in self._found or not is_inside
        if type(value) in (list, tuple, dict):
            return all(self.holds(leaf) for leaf in pytree.tree_leaves(value))
        return type(value) in _PLAIN


@dataclass(frozen=True, slots=True)
class Change:
    """One attribute before and after forward."""

    place: Place
    before: Any
    after: Any


@final
class Watch:
    """The attributes of one model when its first call in a capture began."""

    def __init__(self, guard: ModuleGuard) -> None:
        self.guard = guard
        self._before = [(path, module.__dict__, dict(module.__dict__)) for path, module in guard.module.named_modules()]
        self._shared = [(name, own, dict(own)) for name, own in shared_objects(guard.module.named_modules())]
        self._structure = self._parts()

    def changes(self) -> list[Change]:
        """What has another value now. Nothing where forward changed hooks or submodules: it sets itself up anew in every capture."""
        if self._parts() != self._structure:
            return []
        found = []
        for path, own, before in self._before:
            for key, value in own.items():
                old = before.get(key, _ABSENT)
                if key in _TORCHS_OWN or old is value or (type(old) is type(value) in _PLAIN and old == value):
                    continue
                found.append(Change((own, key, f"{path}.{key}" if path else key), old, value))
        for name, own, before in self._shared:
            for key, value in own.items():
                old = before.get(key, _ABSENT)
                is_same = old is value or (type(old) is type(value) in _PLAIN and old == value)
                kinds = {type(value), type(value if old is _ABSENT else old)}
                if not is_same and kinds <= {*_PLAIN, Counted}:
                    found.append(Change((own, key, f"{name}.{key}"), old, value))
        return found

    def _parts(self) -> list[Any]:
        modules = list(self.guard.module.modules())
        return [
            (id(m), [len(v) for k, v in vars(m).items() if k in _TORCHS_OWN and isinstance(v, dict)]) for m in modules
        ]


@final
class Counted:
    """In the place of a counter: numbers may be added to it, and any other use is noticed."""

    def __init__(self, total: float = 0) -> None:
        object.__setattr__(self, "_total", total)

    def __add__(self, other: Any) -> Counted:
        if type(other) not in (int, float):
            raise Looked
        return Counted(_total_of(self) + other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Counted:
        return self + -other

    def __getattribute__(self, name: str) -> Any:
        # Module.__setattr__ asks every value whether it is a parameter.
        if name == "__class__" and str(sys._getframe(1).f_globals.get("__name__", "")).startswith("torch.nn."):
            return Counted
        raise Looked

    def _look(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise Looked

    __bool__ = __len__ = __iter__ = __getitem__ = __call__ = __hash__ = __eq__ = __ne__ = __lt__ = __gt__ = _look
    __le__ = __ge__ = __mul__ = __rmul__ = __rsub__ = __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __pow__ = (
        _look
    )
    __neg__ = __abs__ = __float__ = __int__ = __index__ = __str__ = __repr__ = __format__ = __contains__ = _look


class Looked(Exception):
    """A counter's value was used."""


def _total_of(counted: Counted) -> float:
    total: float = object.__getattribute__(counted, "_total")
    return total


@final
class KeptInForward:
    """In the place of what forward kept in an attribute."""

    def __init__(self, name: str, kind: str) -> None:
        object.__setattr__(self, "_said", (name, kind))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        raise self._refusal()

    def _refusal(self) -> PrepareError:
        name, kind = object.__getattribute__(self, "_said")
        return PrepareError(
            f"forward keeps a {kind} in its attribute {name}, which exists only inside the compiled program",
            "return it from forward, or write it to a registered buffer (register_buffer)",
        )

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise self._refusal()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        kept = next(value for value in (*args, *(kwargs or {}).values()) if isinstance(value, KeptInForward))
        raise kept._refusal()

    __bool__ = __len__ = __iter__ = __getitem__ = __call__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = _refuse
    __neg__ = __abs__ = __float__ = __int__ = __index__ = __format__ = __contains__ = _refuse

    def __repr__(self) -> str:
        name, kind = object.__getattribute__(self, "_said")
        return f"<{kind} that forward kept in {name}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptInForward:
        return self


@final
class Effects:
    """What one call does to Python attributes."""

    __slots__ = ("_counters", "_values")

    def __init__(self, counters: Sequence[tuple[Place, float]] = (), values: Sequence[tuple[Place, Any]] = ()) -> None:
        self._counters = tuple(counters)
        self._values = tuple(values)

    def apply(self) -> None:
        """Do it; once per call of the program."""
        for (own, key, _), delta in self._counters:
            own[key] = own[key] + delta
        for (own, key, _), value in self._values:
            own[key] = value


NO_EFFECTS = Effects()


def learn(scope: CaptureScope, again: Callable[[], CaptureScope]) -> Effects:
    """What the calls that ran in `scope` do to attributes; `again()` runs them anew on fake tensors, in a scope of its own.

    Counters are found by a run with stand-ins in their places: it must do the same operations and touch no stand-in. From then on
    the model's guard ignores them; one that a later capture does look at is guarded again.
    """
    guards = [watch.guard for watch in scope.watches]
    numbers = {
        (id(change.place[0]), change.place[1]): change.place
        for change in scope.changes
        if type(change.before) in (int, float) and type(change.after) in (int, float)
    }
    known = set().union(*(guard.looked_at for guard in guards))
    candidates = {**{key: place for guard in guards for key, place in guard.ignored.items()}, **numbers}
    candidates = {key: place for key, place in candidates.items() if key not in known}
    counters = _counters(scope, again, candidates)
    for guard in guards:
        own = guard.owned()
        guard.ignore({key: candidates[key] for key in counters if key[0] in own})
        guard.looked_at |= {key for key in candidates if key not in counters and key[0] in own}
    # What forward makes once from sizes alone, and what it notes beside it, is made anew in every capture: nothing is left behind.
    cached = {
        id(change.place[0])
        for change in scope.changes
        if type(change.after) not in _PLAIN and scope.constants.holds(change.after)
    }
    values = [
        (change.place, change.after if type(change.after) in _PLAIN else _kept(change))
        for change in scope.changes
        if (id(change.place[0]), change.place[1]) not in counters
        and not (id(change.place[0]) in cached and scope.constants.holds(change.after))
    ]
    _settle(scope, again, counters, [pair for pair in values if type(pair[1]) in _PLAIN])
    return Effects([(candidates[key], delta) for key, delta in counters.items() if delta], values)


def _settle(
    scope: CaptureScope,
    again: Callable[[], CaptureScope],
    counters: Mapping[Key, float],
    values: Sequence[tuple[Place, Any]],
) -> None:
    """What forward fills in for itself (the kind of problem in a configuration): where it does the same afterwards, both states are one."""
    if not values:
        return
    with placed(values):
        try:
            second = again()
        except Exception:  # noqa: BLE001 - the next call is captured for its own state, and says what is wrong with it
            return
    further = [change for change in second.changes if (id(change.place[0]), change.place[1]) not in counters]
    if second.trace.steps == scope.trace.steps and not any(type(change.after) in _PLAIN for change in further):
        for guard in [watch.guard for watch in scope.watches]:
            own = guard.owned()
            guard.also([pair for pair in values if id(pair[0][0]) in own])


@contextlib.contextmanager
def placed(values: Sequence[tuple[Place, Any]]) -> Iterator[None]:
    """Inside, attributes have these values."""
    saved = [(own, key, own.get(key, _ABSENT)) for (own, key, _), _ in values]
    try:
        for (own, key, _), value in values:
            own[key] = value
        yield
    finally:
        for own, key, value in saved:
            if value is _ABSENT:
                own.pop(key, None)
            else:
                own[key] = value


def _kept(change: Change) -> KeptInForward:
    kind = "tensor" if isinstance(change.after, torch.Tensor) else type(change.after).__name__
    return KeptInForward(change.place[2], kind)


Key = tuple[int, str]


def _counters(
    scope: CaptureScope, again: Callable[[], CaptureScope], candidates: Mapping[Key, Place]
) -> dict[Key, float]:
    """Those of the candidates that are nothing but counters, with what a call adds to each."""
    if not candidates:
        return {}
    found = _tried(scope, again, candidates)
    if found is None:
        found = {}
        if len(candidates) > 1:
            for key, place in candidates.items():
                found.update(_tried(scope, again, {key: place}) or {})
    return found


def _tried(
    scope: CaptureScope, again: Callable[[], CaptureScope], candidates: Mapping[Key, Place]
) -> dict[Key, float] | None:
    try:
        with placed([(place, Counted()) for place in candidates.values()]):
            second = again()
    except Exception:  # noqa: BLE001 - whatever a stand-in broke: the run with the real values says what is the user's own
        return None
    if second.operations != scope.operations:
        return None
    totals: dict[Key, float] = dict.fromkeys(candidates, 0)
    for change in second.changes:
        place = (id(change.place[0]), change.place[1])
        if place in totals:
            if type(change.after) is not Counted:
                return None
            totals[place] = _total_of(change.after)
    return totals

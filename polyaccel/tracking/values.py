"""What a script logs, made into plain values without waiting for a device on the training thread.

`take` runs there: it copies what could change later and leaves arrays on a device where they are. `settle` runs on the writer's thread
and waits for them. Frameworks are told apart by what their arrays can do, none is imported.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import PurePath
from typing import Any, Protocol

MAX_ELEMENTS = 1024  # a longer array is no metric: its shape is recorded instead of its values
_PLAIN = (float, int, str, bool, type(None))
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class StartsFetch(Protocol):
    """A value that knows how to come to the host: a bridge's tensor, or any third party's."""

    def start_fetch(self, *, compute: bool = False) -> Callable[[], Any] | None:
        """A function that gives the present value as numpy and may wait, on any thread. None: it is still to be computed, which
        `compute=True` starts."""
        ...

    def detach(self) -> Any:
        """The same value, safe from later writes."""
        ...


class Late:
    """A value on its way: `start` is called on the training thread at the next log (None: it is under way already), `finish` on
    the writer's thread."""

    __slots__ = ("finish", "start")

    def __init__(
        self, finish: Callable[[], Any] | None, start: Callable[[], Callable[[], Any] | None] | None = None
    ) -> None:
        self.finish = finish
        self.start = start


def take(values: Mapping[str, Any], waiting: list[Late]) -> dict[str, Any]:
    """A snapshot of logged values; those that cannot be fetched before the next log are noted in `waiting`."""
    taken = {}
    for key, value in values.items():
        taken[key] = value if type(value) in _PLAIN else _take(value, waiting)
    return taken


def _take(value: Any, waiting: list[Late]) -> Any:
    if isinstance(value, Mapping):
        return take(value, waiting)
    if isinstance(value, (list, tuple)):
        return [item if type(item) in _PLAIN else _take(item, waiting) for item in value]
    kind = type(value)  # asked instead of the value: an attribute of a lazy tensor may be costly
    if not hasattr(kind, "dtype"):
        return value
    if hasattr(kind, "start_fetch"):
        return _take_from_bridge(value, waiting)
    if hasattr(kind, "copy_to_host_async"):
        return Late(partial(_host_of_jax, value))  # immutable: the reference is the snapshot
    if hasattr(kind, "detach") and hasattr(kind, "device"):
        return _take_tensor(value, waiting)
    if hasattr(value, "__array__"):
        copied = value.__array__()
        return copied.item() if copied.size == 1 else copied.copy()
    return value


def _take_from_bridge(value: StartsFetch, waiting: list[Late]) -> Late:
    finish = value.start_fetch()
    if finish is not None:
        return Late(finish)
    # Not computed yet: usually the loss, before backward. The step computes it; asking now would run the model a second time.
    pending = value.detach()
    late = Late(None, lambda: pending.start_fetch(compute=True))
    waiting.append(late)
    return late


def _take_tensor(tensor: Any, waiting: list[Late]) -> Any:
    own = tensor.detach()
    kind = own.device.type
    if kind == "cpu":
        return own.item() if own.numel() == 1 else own.clone()
    if kind == "xla":
        # A lazy device: the copy becomes part of the next program, and is fetched when that one has been sent.
        copied = own.clone()
        late = Late(None, lambda: copied.cpu)
        waiting.append(late)
        return late
    host = own.to("cpu", non_blocking=True)
    event = sys.modules[type(own).__module__.partition(".")[0]].Event(own.device)  # the tensor's own framework
    event.record()

    def finish() -> Any:
        event.synchronize()
        return host

    return Late(finish)


def _host_of_jax(array: Any) -> Any:
    if not array.is_fully_addressable and array.is_fully_replicated:
        array = array.addressable_data(0)
    return array.__array__()


def start(waiting: list[Late]) -> None:
    """Start every fetch that had to wait for the next log; on the training thread."""
    for late in waiting:
        if late.start is not None:
            late.finish, late.start = late.start(), None


def fetch(values: Mapping[str, Any]) -> dict[str, Any] | Callable[[], dict[str, Any]]:
    """The numbers of values; where some are on a device still, a function that waits for them and gives all of them."""
    waiting: list[Late] = []
    taken = take(values, waiting)
    start(waiting)
    if any(isinstance(value, Late) for value in taken.values()):
        return partial(settle, taken)
    settled: dict[str, Any] = settle(taken)
    return settled


def settle(value: Any) -> Any:
    """Numbers, text, lists and dicts, with every late value fetched; objects of other kinds (a vendor's own) stay as they are."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Late):
        return settle(value.finish() if value.finish is not None else None)
    if isinstance(value, Mapping):
        return {str(key): settle(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [settle(item) for item in value]
    if isinstance(value, (bool, int, float, str)):  # subclasses: np.float64, IntEnum
        return value.value if isinstance(value, enum.Enum) else _narrow(value)
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return _of_array(value)
    return value


def _of_array(array: Any) -> Any:
    size = math.prod(array.shape)
    if size > MAX_ELEMENTS:
        return {"shape": list(array.shape), "dtype": str(array.dtype)}
    if size == 1:
        return _number(array.item())
    return settle(array.tolist())


def _number(value: Any) -> Any:
    # numpy gives the scalars of foreign types (bfloat16) as objects of their own; complex numbers have no JSON.
    if isinstance(value, complex):
        return str(value)
    return value if type(value) in _PLAIN else float(value)


def _narrow(value: Any) -> Any:
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def to_json(value: Any) -> Any:
    """A settled value as JSON can hold it: NaN and infinities as the texts "NaN", "Infinity", "-Infinity", foreign objects by type."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return {"object": f"{type(value).__module__}.{type(value).__qualname__}"}


def from_json(value: Any) -> Any:
    """The number that `to_json` wrote as a text; everything else as it is."""
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def plain_config(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts, lists, numbers and texts: of a mapping, argparse.Namespace or dataclass, at any depth.

    Keys become texts; sets are sorted; enums give their value, paths and classes their name, other objects their repr.
    """
    plain = _plain(config)
    return plain if isinstance(plain, dict) else {"config": plain}


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Namespace):
        return _plain(vars(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, type) or callable(value):
        return getattr(value, "__qualname__", repr(value))
    settled = settle(value.detach() if hasattr(value, "detach") else value)
    return settled if type(settled) in _PLAIN or isinstance(settled, (list, dict)) else repr(value)


def flatten(values: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Nested dicts as one: {"a": {"b": 1}} -> {"a.b": 1}. Lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update({f"{key}{separator}{name}": item for name, item in flatten(value, separator).items()})
        else:
            flat[str(key)] = value
    return flat

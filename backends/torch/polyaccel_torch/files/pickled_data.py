"""Reads a pickle as data: nothing that it names is imported and nothing is called, so that a foreign one cannot run code.

torch's distributed checkpoints describe themselves by a pickled `.metadata`. Its instructions are carried out on plain containers;
an object becomes a `Pickled`, which says of what class it claims to be and what it was made of.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from polyaccel.errors import CheckpointError


@dataclass(slots=True, eq=False)
class Pickled:
    """An object in a pickle: its dotted class or function, the arguments that it was made with, and its state."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    is_made: bool = field(default=False)

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute of an object whose state is a dict."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class _Mark:
    pass


def read_pickle(data: bytes) -> Any:
    """The value as dicts, lists, tuples, plain values and `Pickled`. A dict keyed by objects becomes a list of (key, value) pairs.

    Raises CheckpointError for instructions that describe no data (persistent ids, extension codes) and for damaged bytes.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.carry_out(opcode.name, argument)
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the pickle is damaged: {error}", "take another copy of the checkpoint") from error
    raise CheckpointError("the pickle has no end", "take another copy of the checkpoint")


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def carry_out(self, name: str, argument: Any) -> None:
        if name in _IGNORED:
            return
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            self.stack.append(argument)
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise CheckpointError(
                f"the pickle has an instruction {name}, which describes no plain data",
                "save the checkpoint again with the library that wrote it, without custom objects",
            )

    def above_mark(self) -> list[Any]:
        position = max(i for i, value in enumerate(self.stack) if isinstance(value, _Mark))
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items

    def memoize(self, argument: Any) -> None:
        self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("a tuple has too few items")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(target, _Pairs) or not isinstance(key, (str, int, tuple)):
                target = self._as_pairs(target)
                target.append((key, value))
            else:
                target[key] = value

    def _as_pairs(self, target: Any) -> _Pairs:
        # A dict that turns out to be keyed by objects: `Pickled` has no value to be compared by.
        if isinstance(target, _Pairs):
            return target
        pairs = _Pairs(target.items())
        for place, value in self.memo.items():
            if value is target:
                self.memo[place] = pairs
        self.stack[-1] = pairs
        return pairs

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError(f"a {type(target).__name__} is extended")
        target.extend(items)

    def find(self, dotted: str) -> None:
        self.stack.append(Pickled(dotted))

    def make(self) -> None:
        arguments = self.stack.pop()
        made = self.stack.pop()
        if not isinstance(made, Pickled) or made.is_made or not isinstance(arguments, tuple):
            raise ValueError("something that is no class is called")
        self.stack.append(Pickled(made.name, arguments, is_made=True))

    def build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Pickled) or not self.stack[-1].is_made:
            raise ValueError("something that is no object is given a state")
        self.stack[-1].state = state


class _Pairs(list[tuple[Any, Any]]):
    pass


_IGNORED = frozenset({"PROTO", "FRAME"})
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": _Mark,
}
_LITERALS = frozenset(
    {
        "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
        "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    }
)  # fmt: skip
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MEMOIZE": lambda machine, _: machine.memoize(None),
    "BINPUT": lambda machine, place: machine.memoize(place),
    "LONG_BINPUT": lambda machine, place: machine.memoize(place),
    "BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "LONG_BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.above_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": lambda machine, _: machine.stack.append(machine.above_mark()),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.above_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.above_mark()),
    "GLOBAL": lambda machine, dotted: machine.find(dotted.replace(" ", ".")),
    "STACK_GLOBAL": lambda machine, _: machine.find(f"{machine.stack.pop(-2)}.{machine.stack.pop()}"),
    "REDUCE": lambda machine, _: machine.make(),
    "NEWOBJ": lambda machine, _: machine.make(),
    "BUILD": lambda machine, _: machine.build(),
}

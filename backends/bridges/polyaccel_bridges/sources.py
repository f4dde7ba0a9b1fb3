"""Where an operation came from: the module path and the user's line, noted on every fx node while PyTorch captures."""

from __future__ import annotations

import functools
import linecache
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode

from polyaccel.errors import UnsupportedError

_MODULE_CALL: CodeType = nn.Module._call_impl.__code__
_OURS = frozenset({"torch", "jax", "polyaccel", "polyaccel_bridges", "polyaccel_jax"})
_META = "polyaccel_source"
_DRAW = "polyaccel_draw"
_RECOMPUTED = "polyaccel_recomputed"


@dataclass(frozen=True, slots=True)
class Source:
    """The path of the module that ran an operation and the user's line; both may be unknown (empty)."""

    module_path: str = ""
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        where = f"in module {self.module_path!r}" if self.module_path else "outside any module"
        if not self.file:
            return where
        text = linecache.getline(self.file, self.line).strip()
        return f"{where}, {self.file}:{self.line}" + (f": {text}" if text else "")


NOWHERE = Source()


_OF_LIBRARY, _OF_INSTALLED, _OF_USER = range(3)


@functools.cache  # asked for every frame of the stack at every operation
def _owner(file: str, module: str) -> int:
    """Whose code this is: PyTorch's, jax's or ours; an installed package's; or the user's own."""
    if module.partition(".")[0] in _OURS:
        return _OF_LIBRARY
    is_installed = "site-packages" in file or "dist-packages" in file or file.startswith("<")
    return _OF_INSTALLED if is_installed else _OF_USER


def source_of(frames: Iterator[tuple[FrameType, int]], paths: Mapping[int, str]) -> Source:
    """The source that `frames` (innermost first, each with its line) point to.

    The line is the innermost one outside PyTorch and installed packages; where there is none, the innermost one outside
    PyTorch and polyaccel.
    """
    module_path = ""
    installed: tuple[str, int] | None = None
    for frame, line in frames:
        if frame.f_code is _MODULE_CALL:
            if not module_path:
                module_path = paths.get(id(frame.f_locals.get("self")), "")
            continue
        owner = _owner(frame.f_code.co_filename, frame.f_globals.get("__name__") or "")
        if owner == _OF_USER:
            module_path = module_path or _enclosing_module(frame.f_back, paths)
            return Source(module_path, frame.f_code.co_filename, line)
        if owner == _OF_INSTALLED:
            installed = installed or (frame.f_code.co_filename, line)
    return Source(module_path, *(installed or ("", 0)))


def _enclosing_module(frame: FrameType | None, paths: Mapping[int, str]) -> str:
    while frame is not None:
        if frame.f_code is _MODULE_CALL:
            path = paths.get(id(frame.f_locals.get("self")), "")
            if path:
                return path
        frame = frame.f_back
    return ""


def _running_frames() -> Iterator[tuple[FrameType, int]]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def source_of_error(error: BaseException, paths: Mapping[int, str]) -> Source:
    """Where `error` was raised, in the user's words."""
    frames: list[tuple[FrameType, int]] = []
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        frames.append((traceback.tb_frame, traceback.tb_lineno))
        traceback = traceback.tb_next
    return source_of(iter(reversed(frames)), paths)


def source_of_node(node: Node) -> Source:
    """What `SourceNotes` wrote on `node`."""
    source = node.meta.get(_META, NOWHERE)
    assert isinstance(source, Source)
    return source


def draw_of_node(node: Node) -> int | None:
    """The number of the random draw that `node` makes, or None where it makes none."""
    draw: int | None = node.meta.get(_DRAW)
    return draw


def is_recomputed(node: Node) -> bool:
    """Whether a backward pass repeats this forward operation instead of keeping its result (`torch.utils.checkpoint`)."""
    return _RECOMPUTED in node.meta


class SourceNotes(TorchDispatchMode):
    """While active, writes the source of every operation (and the number of every random draw) on the nodes that it adds to `graph`.

    A backward operation gets the source of its forward operation: autograd numbers them alike. The number of a random draw
    is kept in torch's own CPU generator, as its seed, so that code which saves and restores the generator's state to repeat
    a computation (`torch.utils.checkpoint`) draws the same numbers again.
    """

    def __init__(self, graph: Graph, paths: Mapping[int, str]) -> None:
        super().__init__()
        self._graph = graph
        self._paths = paths
        self._by_sequence: dict[int, Source] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._linalg_check_errors.default:
            return None  # it raises by value; functionalization would order it by tokens, which no program here carries
        backward = torch._C._current_autograd_node()
        source = None if backward is None else self._by_sequence.get(backward._sequence_nr())
        if source is None:
            source = source_of(_running_frames(), self._paths)
        if backward is None:
            self._by_sequence.setdefault(torch.autograd._get_sequence_nr() - 1, source)
        if kwargs and kwargs.get("generator") is not None:
            raise UnsupportedError(
                f"{func} draws from a torch.Generator of its own, whose state a compiled program cannot advance: {source}",
                "leave `generator` out: the draws then follow set_seed, or use the torch backend",
            )
        # Backward formulas run without gradients; a forward that is repeated inside a backward pass records them.
        repeated = backward is not None and torch.is_grad_enabled()
        result = func(*args, **(kwargs or {}))
        self._note(source, repeated)
        return result

    def _note(self, source: Source, repeated: bool) -> None:
        for node in reversed(self._graph.nodes):
            if _META in node.meta:
                break
            node.meta[_META] = source
            if repeated:
                node.meta[_RECOMPUTED] = True
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                draw = torch.default_generator.initial_seed()
                node.meta[_DRAW] = draw
                torch.default_generator.manual_seed(draw + 1)

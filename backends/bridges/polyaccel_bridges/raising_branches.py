"""Branches on a value whose one side only raises (`assert (x > 0).all()`, `if labels.max() >= n: raise`), seen in the bytecode.

A captured program takes the other side, and what it gives is NaN where the branch would have raised.
"""

from __future__ import annotations

import dis
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor

from polyaccel.errors import PrepareError

_log = logging.getLogger(__name__)
_BETWEEN = frozenset({"CACHE", "TO_BOOL", "NOP", "EXTENDED_ARG", "PRECALL", "NOT_TAKEN"})
# What the raising side must not do before it raises; what it calls for its message is left out with it.
_ACTS = ("STORE_", "DELETE_", "RETURN_", "YIELD_", "IMPORT_", "RERAISE", "BEFORE_WITH", "SETUP_")


@dataclass(frozen=True, slots=True)
class Raise:
    """A read of `tensor` that decides whether the user's code raises: it does where the tensor's truth value is `when`."""

    tensor: torch.Tensor
    when: bool
    place: str

    def happens(self) -> torch.Tensor:
        """Whether it raises, as a 0-dim tensor."""
        truth = self.tensor.detach().reshape(()).bool()
        return truth if self.when else truth.logical_not()


def raise_of(tensor: torch.Tensor, frame: FrameType | None) -> Raise | None:
    """The Raise that `frame`, which reads the truth value of `tensor`, stands at; None where both sides go on, or another catches it."""
    if frame is None or tensor.numel() != 1 or is_functorch_wrapped_tensor(tensor):
        return None
    when = _raises_when(frame.f_code, frame.f_lasti)
    return None if when is None else Raise(tensor, when, f"{frame.f_code.co_filename}:{frame.f_lineno}")


def poisoned(outputs: Sequence[torch.Tensor], raises: Sequence[Raise]) -> list[torch.Tensor]:
    """`outputs`, the floating ones NaN, and their gradients too, where one of `raises` happens. Raises PrepareError if none is floating."""
    if not raises:
        return list(outputs)
    if not any(out.is_floating_point() or out.is_complex() for out in outputs):
        raise PrepareError(
            f"whether {raises[0].place} raises depends on the value of a tensor, and no output is floating to be NaN in its place",
            "check the value outside of the model, or use the torch backend",
        )
    for place in dict.fromkeys(found.place for found in raises):
        _log.info("%s raises by the value of a tensor: on jax the outputs are NaN there", place)
    any_happens = torch.stack([found.happens() for found in raises]).any()
    factor = torch.where(any_happens, math.nan, 1.0)
    return [out * factor.to(out.dtype) if out.is_floating_point() or out.is_complex() else out for out in outputs]


@lru_cache(maxsize=4096)
def _raises_when(code: CodeType, at: int) -> bool | None:
    """The truth value at which the branch of the read at offset `at` only raises."""
    steps = list(dis.get_instructions(code))
    # A call may stand at its last cache entry.
    index = max(index for index, step in enumerate(steps) if step.offset <= at)
    if not _is_read(steps, index):
        return None
    index = _jump_after(steps, index)
    jump = steps[index]
    if not jump.opname.startswith("POP_JUMP_") or not jump.opname.endswith(("_IF_TRUE", "_IF_FALSE")):
        return None
    target = _place_of(steps, jump.argval)
    jumps_when = jump.opname.endswith("_IF_TRUE")
    if _only_raises(code, steps, target) == _only_raises(code, steps, index + 1):
        return None
    return jumps_when if _only_raises(code, steps, target) else not jumps_when


def _jump_after(steps: Sequence[dis.Instruction], index: int) -> int:
    """The place of what follows a read; of the read itself where it jumps."""
    if not steps[index].opname.startswith("POP_JUMP_"):
        index += 1
        while steps[index].opname in _BETWEEN:
            index += 1
    return index


def _place_of(steps: Sequence[dis.Instruction], offset: int) -> int:
    return next(index for index, step in enumerate(steps) if step.offset == offset)


def _is_read(steps: Sequence[dis.Instruction], index: int) -> bool:
    """Whether this instruction asks for the truth value that is jumped by: the jump itself, or `x.item()` right before it."""
    step = steps[index]
    if step.opname == "CALL":
        names = [before.argval for before in steps[:index] if before.opname not in _BETWEEN][-1:]
        return step.arg == 0 and names == ["item"]
    if step.opname == "COMPARE_OP":  # asks for the truth value itself since Python 3.13
        return step.argrepr.startswith("bool(")
    return step.opname == "TO_BOOL" or step.opname.startswith("POP_JUMP_")


def _only_raises(code: CodeType, steps: Sequence[dis.Instruction], index: int) -> bool:
    """Whether the instructions from here on lead to a raise that nothing in this function catches, and to nothing else."""
    for step in steps[index:]:
        if step.opname == "RAISE_VARARGS":
            return not _is_caught(code, steps, step.offset)
        if step.opname.startswith(_ACTS) or step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
            return False
    return False


def _is_caught(code: CodeType, steps: Sequence[dis.Instruction], offset: int) -> bool:
    """Whether a `try` surrounds this instruction; a `with` does not count."""
    table: Any = dis.Bytecode(code)  # the stubs do not know of `exception_entries`
    handlers = [_place_of(steps, e.target) for e in table.exception_entries if e.start <= offset < e.end]
    return any(steps[handler + 1].opname != "WITH_EXCEPT_START" for handler in handlers)

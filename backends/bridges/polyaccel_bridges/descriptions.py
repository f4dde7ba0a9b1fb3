"""What a captured program was specialised on, in the user's words: the engine explains a recompile by what changed among these."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .packing import Key, leaves_of, names_of_leaves, thaw

if TYPE_CHECKING:
    from .modules import ManagedModel

_LONGEST = 60


def name_of(function: Any) -> str:
    """The name of a function as its author wrote it."""
    return str(getattr(function, "__qualname__", None) or type(function).__name__).replace("<locals>.", "")


def shown(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """A tensor's dtype and shape: `int64[2, 64]`."""
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def short(value: Any) -> str:
    """A value's repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def facts_of_arguments(function: Any, arguments: Key, leaf: Callable[[tuple[Any, ...]], Any]) -> dict[str, str]:
    """By path (`batch['input_ids']`) what `leaf` says of each leaf; leaves of which it says None are left out.

    `arguments` is the key of (args, kwargs).
    """
    args, kwargs = thaw(arguments, lambda described: _Said(leaf(described)))
    facts: dict[str, str] = {}
    for name, value in (*zip(_parameter_names(function, len(args)), args, strict=True), *kwargs.items()):
        for path, found in zip(names_of_leaves(value, name), leaves_of(value), strict=True):
            text = found.text if isinstance(found, _Said) else short(found)
            if text is not None:
                facts[path] = text
    return facts


def facts_of_models(models: Iterable[ManagedModel]) -> dict[str, str]:
    """Mode and number of trainable parameters of each model."""
    facts: dict[str, str] = {}
    for model in models:
        token = model.guard.token()
        name = type(model.module).__name__
        facts[f"mode of {name}"] = "training" if token.is_training else "evaluation"
        facts[f"trainable parameters of {name}"] = str(len(token.trainable))
    return facts


class _Said:
    """A leaf's words; no container, so that it stays a leaf."""

    __slots__ = ("text",)

    def __init__(self, text: str | None) -> None:
        self.text = text


def _parameter_names(function: Any, count: int) -> list[str]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in positional]
    return [names[index] if index < len(names) else f"argument {index}" for index in range(count)]

"""The seam's part about gradient windows: token weights with one normaliser per window, and a tail window of its true size."""

from __future__ import annotations

import math
from typing import Any, Final, Protocol

from polyaccel.errors import UnsupportedError

UNWEIGHTED: Final = object()  # the window's backward calls so far gave no weight
MIXED = "weighted and unweighted backward calls in one accumulation window have no common normaliser"
MIXED_HINT = "pass weight= to every backward of the window, or to none; optimizer.step() or zero_grad() ends a window"


class WeightingEngine(Protocol):
    """What an engine does with gradients between the last backward of a window and its update.

    `backward(loss, scale=..., weight=w)` adds w * d(loss) instead of scale * d(loss), and counts w; what has been counted is kept in
    `gradient_state.window_weights`, an object of the engine's own, which the core and real updates set to None where a window ends.
    No weight may make an engine compile anew or wait for its device.
    """

    def normalise_gradients(self) -> None:
        """Divide the gradients by the window's total weight over all data shards; all zeros where that is 0. Every process must
        call it. A further weighted backward before the update adds to the same window."""
        ...

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients of all prepared models. No value of `factor` compiles anew."""
        ...

    def read_weight(self) -> float:
        """This process's part of the open window's total weight (a mean over data shards where they share one); waits for the device."""
        ...

    def write_weight(self, total: float) -> None:
        """Continue an open window with this total. Gradients are written as `read_gradients` gave them."""
        ...


def checked_weight(weight: Any) -> Any:
    """A weight as user code gave it. Raises UnsupportedError for what can be none, without looking at values on a device."""
    if isinstance(weight, str):
        return weight
    if isinstance(weight, (int, float)) and not isinstance(weight, bool):
        if not math.isfinite(weight) or weight < 0:
            raise UnsupportedError(
                f"weight={weight} is no count", "give how many tokens or samples the loss is a mean over"
            )
        return float(weight)
    shape = getattr(weight, "shape", None)
    if shape is None or math.prod(shape) != 1:
        what = type(weight).__name__ if shape is None else f"an array of shape {tuple(shape)}"
        raise UnsupportedError(
            f"weight is {what}",
            "give one number, a scalar array, or the name of an auxiliary value of the loss function",
        )
    return weight


def named_weight(result: Any, name: str) -> Any:
    """The auxiliary value of this name in what a loss function returned. Raises UnsupportedError where there is none."""
    aux = result[1] if isinstance(result, tuple) and len(result) == 2 else None
    if not isinstance(aux, dict) or name not in aux:
        known = f"its auxiliary values are {', '.join(map(repr, aux))}" if isinstance(aux, dict) else "it returned none"
        raise UnsupportedError(
            f"weight={name!r} names no auxiliary value of the loss function: {known}",
            f"return (loss, {{{name!r}: count}}), with the count that the loss is a mean over",
        )
    return aux[name]


def refuse_name_for_value(name: str) -> UnsupportedError:
    """For a weight by name beside a loss value, which has no auxiliary values."""
    return UnsupportedError(
        f"backward(loss, weight={name!r}) got a loss value, and a name is that of an auxiliary value of a loss function",
        f"pass the count itself, or accelerator.backward(loss_fn, model, batch, weight={name!r})",
    )

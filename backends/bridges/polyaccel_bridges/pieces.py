"""Recordings over several data shards or several recordings at once, composed of separately captured pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from polyaccel.errors import UnsupportedError
from polyaccel.protocols import ArraySpec

if TYPE_CHECKING:
    from .tape_calls import TapeRecipe


def composed_program(
    recipe: TapeRecipe, specs: Sequence[ArraySpec], *, with_grads: bool, num_shards: int, shard_call: Any
) -> Any:
    """The program of a recipe."""
    raise UnsupportedError("composed recordings", "later")

"""Batches on their way to a GPU: copied on a stream of their own while earlier batches are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from polyaccel import trees


class StreamFeeder:
    """`place` starts the copy of a host batch; `hand_out` orders the computation after it. Leaves with a `.to` are moved.

    The copy overlaps with computation if the host batch is in pinned memory (`DataLoader(pin_memory=True)`).
    """

    def __init__(self, device: torch.device, lift: Callable[[Any, Any], Any] | None) -> None:
        self._device = device
        self._lift = lift
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def place(self, batch: Any) -> tuple[Any, Any]:
        """(placed batch, event of its arrival); returns before the copy is done."""
        if self._stream is None:
            return trees.map_leaves(self._move, batch), None
        with torch.cuda.stream(self._stream):
            placed = trees.map_leaves(self._move, batch)
            return placed, self._stream.record_event()

    def hand_out(self, host: Any, arrival: tuple[Any, Any]) -> Any:
        """What user code gets: the placed batch, usable on the current stream."""
        placed, event = arrival
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            for leaf in trees.flatten(placed)[0]:
                if isinstance(leaf, torch.Tensor):
                    leaf.record_stream(current)  # its memory was allocated on the copying stream
        return placed if self._lift is None else self._lift(host, placed)

    def _move(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.to(self._device, non_blocking=True)
        return leaf.to(self._device) if hasattr(leaf, "to") else leaf

"""Gradients of an open accumulation window for a run of any number of processes.

They are saved with one entry per data shard that had gradients of its own. As many data shards take back their own; any other number takes
their mean, which is what the exchange at the end of the window would have made of them. So it is with the weights that they carry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polyaccel.checkpoint.read import Saved
from polyaccel.checkpoint.run import Run
from polyaccel.protocols import Shard
from polyaccel.weighting import UNWEIGHTED


def gradients_for(saved: Saved, group: str, place: tuple[int, int] | None) -> Iterator[Shard]:
    """The gradients of data shard `place[0]` of `place[1]`, without the dim of shards; None: those of the global batch."""
    for name, (dtype, shape) in saved.arrays(group).items():
        pieces = list(saved.shards(group, [name]))
        if shape[0] == 1 or (place is not None and shape[0] == place[1]):
            wanted = place[0] if shape[0] > 1 and place is not None else 0
            for piece in pieces:
                if piece.offset[0] <= wanted < piece.offset[0] + piece.data.shape[0]:
                    data = piece.data[wanted - piece.offset[0]]
                    yield Shard(name, shape[1:], piece.offset[1:], dtype, data)
        else:
            yield _mean(name, shape, dtype, pieces)


def window_weights(run: Run) -> list[float] | None:
    """What every process has counted in an open window; None without one, or without weights. Every process must call it."""
    if not run.is_in_window or run.window.window_weights in (None, UNWEIGHTED):
        return None
    return [float(total) for total in run.engine.collectives.all_gather_object(run.engine.read_weight())]


def restore_weights(run: Run, is_open: bool, totals: list[float] | None) -> None:
    """Let the window go on with its weights, or as one that has none."""
    run.window.window_weights = UNWEIGHTED if is_open and totals is None else None
    if totals is not None:
        topology = run.engine.topology
        is_same = run.data_shard is not None and len(totals) == topology.num_processes
        run.engine.write_weight(totals[topology.process_index] if is_same else sum(totals) / len(totals))


def _mean(name: str, shape: tuple[int, ...], dtype: str, pieces: list[Shard]) -> Shard:
    import numpy as np

    total: Any = np.zeros(shape[1:], np.float64)
    for piece in pieces:
        where = tuple(slice(o, o + n) for o, n in zip(piece.offset[1:], piece.data.shape[1:], strict=True))
        total[where] += _widened(piece.data, dtype).sum(0, dtype=np.float64)
    kind = "float64" if dtype == "float64" else "float32"
    return Shard(name, shape[1:], (0,) * (len(shape) - 1), kind, (total / shape[0]).astype(kind))


def _widened(data: Any, dtype: str) -> Any:
    import numpy as np

    if dtype == "bfloat16":  # the upper half of a float32
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data

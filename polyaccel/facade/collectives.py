"""Values of all processes, brought together, and loops that are not equally long on all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from polyaccel.facade.parts import Parts
from polyaccel.joining import Joining
from polyaccel.metrics import BatchRows


class Collectives(Parts):
    """Accelerate's gather family."""

    def gather(self, tensor: Any) -> Any:
        """Every array of a tree concatenated along dim 0 over processes; a scalar becomes shape (num_processes,).

        One process returns its input. Every process must call it, with arrays of equal shapes.
        """
        return self._gathering.gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """`gather` without the samples that fill up a loader's last batch, so that every sample counts once.

        What is no array is gathered as an object, one entry of a list per sample; a dict keeps its structure. With
        `use_gather_object` arrays are too: they may differ in shape. It is about the batch of the innermost running loop over a
        prepared loader, or of one that was left just now; every process that has a part of that batch must call it, with trees of
        one structure.
        """
        topology, (rows, is_left) = self._engine.topology, self.gradient_state.batch_rows
        sharing = self.plan.num_processes_per_shard
        batch = BatchRows(topology.process_index // sharing, topology.num_processes // sharing, rows, is_left)
        return self._gathering.gather_for_metrics(input_data, batch, as_objects=use_gather_object)

    @contextmanager
    def join_uneven_inputs(self, joinables: Iterable[Any], even_batches: bool | None = None) -> Iterator[None]:
        """Inside, the processes may have different numbers of batches: those that are done wait for the others.

        `joinables` are prepared models. `even_batches` holds for loaders of indexed data inside, None: the setting. With even batches
        nothing else happens; without, a process that is done takes its part in the others' gradient exchanges (see `joined` of the
        torch engine), or, where an engine cannot do that, UnsupportedError is raised. Every process must enter it.
        """
        joining = Joining(
            self._engine,
            self._prepared,
            self.gradient_state,
            self.plan,
            can_join="uneven_inputs" in self._features,
        )
        with joining.uneven_inputs(joinables, even_batches):
            yield

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Every array of a tree reduced over processes ("sum", "mean", "max", "min"), times `scale`: new arrays, also in one process."""
        return self._gathering.reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
        """Every array padded along `dim` to the longest of all processes, so that it can be gathered."""
        return self._gathering.pad_across_processes(tensor, dim, pad_index, pad_first)

    def broadcast(self, tensor: Any, from_process: int = 0) -> Any:
        """Every array of a tree as process `from_process` has it."""
        return self._gathering.broadcast(tensor, from_process)

    def gather_object(self, objects: list[Any]) -> list[Any]:
        """Lists of plain values and arrays of all processes, joined in process order."""
        return self._gathering.gather_object(objects)

    def broadcast_object_list(self, objects: list[Any], from_process: int = 0) -> list[Any]:
        """The list of process `from_process`, written into `objects` on all processes."""
        return self._gathering.broadcast_object_list(objects, from_process)

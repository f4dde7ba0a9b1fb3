"""The part of the seam that is between processes: exchanging values of user code, and meeting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from polyaccel.collective_calls import CollectiveCalls
    from polyaccel.store import Store

Array = Any  # an array of the engine's framework


class Collectives(Protocol):
    """Between processes. Every process must call each of them, in the same order. Arrays are the engine's own.

    In a job of several processes, each operation runs inside `with calls(operation, detail)`, and looks while it waits (`calls.look`):
    what that raises ends it. Operations begun with a name or detail that differ are a CollectiveError.
    """

    calls: CollectiveCalls

    def all_gather(self, array: Array) -> Array:
        """Concatenate along dim 0 over processes; a scalar gives shape (num_processes,). Shapes must be equal."""
        ...

    def all_reduce(self, array: Array, operation: Literal["sum", "mean", "max", "min"]) -> Array:
        """Reduce elementwise over processes; a new array."""
        ...

    def broadcast(self, array: Array, from_process: int) -> Array:
        """The array of one process, on all of them."""
        ...

    def all_gather_object(self, value: Any) -> list[Any]:
        """JSON-like or array values (see `polyaccel.wire`) of all processes, in process order."""
        ...

    def barrier(self, tag: str) -> None:
        """Return when every process has arrived at the barrier of this name."""
        ...

    def store(self) -> Store:
        """A new connection to the texts that the processes of the job share, for a thread of its own; alone, a MemoryStore.

        The only one of these that a process may use without the others, and beside an operation of the main thread.
        """
        ...

"""Values of all processes brought together: Accelerate's gather family, over trees, on an engine's few collectives."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from polyaccel import trees
from polyaccel.agreement import require_equal
from polyaccel.errors import ConfigError, UnsupportedError, nearest
from polyaccel.metrics import BatchRows, Columns, is_array
from polyaccel.protocols import Bridge, Engine

REDUCTIONS = ("sum", "mean", "max", "min", "none")


class Gathering:
    """Collectives over nested values of user code; the script's bridge translates each array into the engine's and back.

    With one process every operation returns its input. Every process must call each operation, with trees of equal structure.
    With `debug` the processes first tell each other what they called and with what: another call, another number of arrays, another
    shape or dtype is a CollectiveError on all of them, before any array moves. `num_processes_per_shard` neighbours have the same batches:
    `gather_for_metrics` counts them once, everything else counts processes.
    """

    def __init__(
        self,
        engine: Engine,
        script_bridge: Callable[[], Bridge | None],
        *,
        debug: bool = False,
        num_processes_per_shard: int = 1,
    ) -> None:
        self._engine = engine
        self._sharing = num_processes_per_shard
        self._script_bridge = script_bridge
        self.debug = debug

    @property
    def num_processes(self) -> int:
        """Processes that take part."""
        return self._engine.topology.num_processes

    def gather(self, tree: Any) -> Any:
        """Every array concatenated along dim 0 over processes; a scalar becomes shape (num_processes,)."""
        if self.num_processes == 1:
            return tree
        self._check("gather", tree)
        return self._map(self._engine.collectives.all_gather, tree, "gather")

    def gather_object(self, value: Any) -> list[Any]:
        """The lists of all processes, joined in process order; a value that is no list or tuple counts as a list of one."""
        mine = value if isinstance(value, (list, tuple)) else [value]
        if self.num_processes == 1:
            return mine  # type: ignore[return-value]  # a tuple stays one
        self._check("gather_object")
        return [item for part in self._engine.collectives.all_gather_object(mine) for item in part]

    def gather_for_metrics(self, tree: Any, batch: BatchRows, *, as_objects: bool = False) -> Any:
        """`gather`, without the samples that only fill up the last batch, and `gather_object` for what is no array.

        Only the processes that hold rows of the batch have to call it. See `metrics.Columns` for what stays of a tree.
        """
        if self.num_processes == 1 and batch.rows is None:
            return tree
        batch.require_known()
        columns = Columns(tree, as_objects=as_objects)
        if batch.present == tuple(range(batch.num_processes)):
            self._check("gather_for_metrics", tree if not columns.columns else (), any_shape=batch.rows is not None)
        collectives = self._between(batch.present, batch)
        lengths = [[int(array.shape[0])] * len(batch.present) if len(array.shape) else [] for array in columns.arrays]
        if collectives is not None and lengths and not batch.is_even:
            everyone = collectives.all_gather_object([mine[:1] for mine in lengths])
            lengths = [[length for part in row for length in part] for row in zip(*everyone, strict=True)]
        arrays = [
            self._gathered_rows(array, of_array, batch, collectives)
            for array, of_array in zip(columns.arrays, lengths, strict=True)
        ]
        entries = [
            entries[: batch.kept(len(entries), batch.process, f"a list of {type(entries[0]).__name__}")]
            if entries
            else []
            for entries in columns.columns
        ]
        if collectives is not None and entries:
            everyone = collectives.all_gather_object(entries)
            require_equal(
                "gather_for_metrics needs trees of one structure on all processes",
                [f"{len(part)} lists" for part in everyone],
                "make every process give the same entries",
            )
            entries = [[entry for part in column for entry in part] for column in zip(*everyone, strict=True)]
        return columns.rebuilt(arrays, entries)

    def _between(self, present: tuple[int, ...], batch: BatchRows) -> Any:
        """Collectives between the processes that have these parts of a batch, this one among them; None for this one alone."""
        if len(present) == 1:
            return None
        if len(present) == self.num_processes:
            return self._engine.collectives
        # Of the processes that have the same part, each meets those that stand in its own place among their neighbours.
        place = self._engine.topology.process_index - batch.process * self._sharing
        present = tuple([part * self._sharing + place for part in present])
        among = getattr(self._engine.collectives, "among", None)
        if among is None and len(present) * self._sharing == self.num_processes:
            return _OncePerShard(self._engine.collectives, self._sharing)
        if among is None:
            raise UnsupportedError(
                f"gather_for_metrics: only processes {', '.join(map(str, present))} of {self.num_processes} hold samples of this batch",
                "use even_batches=True, so that every process has a part of every batch",
            )
        return among(present)

    def _gathered_rows(self, array: Any, lengths: list[int], batch: BatchRows, collectives: Any) -> Any:
        """The rows of an array that belong to real samples, of all processes; `lengths` are its lengths on those present."""
        whose = f"an array of shape {tuple(array.shape)}"
        is_scalar = not len(array.shape)
        if collectives is None:
            return array if is_scalar else array[: batch.kept(array.shape[0], batch.process, whose)]
        if batch.rows is None or is_scalar:
            gathered = self._map(collectives.all_gather, array, "gather_for_metrics")
            return gathered if batch.rows is None else gathered[: sum(batch.rows.real(p) > 0 for p in batch.present)]
        longest = max(lengths)
        gathered = self._map(collectives.all_gather, _pad(array, 0, longest, 0, False), "gather_for_metrics")
        if gathered.shape[0] == longest:  # it is the global array, on every process
            return gathered[: batch.kept_of_whole(longest, whose)]
        parts = [
            (number * longest, batch.kept(length, process, whose))
            for number, (process, length) in enumerate(zip(batch.present, lengths, strict=True))
        ]
        total = sum(kept for _, kept in parts)
        if all(start + kept == following for (start, kept), (following, count) in pairwise(parts) if count):
            return gathered[:total]
        return gathered[[row for start, kept in parts for row in range(start, start + kept)]]

    def reduce(self, tree: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Every array reduced elementwise over processes, then multiplied by `scale`: a copy, also in one process; "none" gives the
        input back."""
        if reduction not in REDUCTIONS:
            raise ConfigError(f"reduction={reduction!r} is unknown", nearest(str(reduction), REDUCTIONS))
        if reduction == "none":
            return tree
        operation: Any = reduction
        if self.num_processes > 1:
            self._check(f"reduce({reduction})", tree)
            tree = self._map(lambda array: self._engine.collectives.all_reduce(array, operation), tree, "reduce")
        elif scale == 1.0:
            tree = trees.map_leaves(_copied, tree)
        return tree if scale == 1.0 else trees.map_leaves(lambda leaf: leaf * scale if is_array(leaf) else leaf, tree)

    def broadcast(self, tree: Any, from_process: int = 0) -> Any:
        """Every array as process `from_process` has it."""
        self._check_process(from_process)
        if self.num_processes == 1:
            return tree
        self._check(f"broadcast(from_process={from_process})", tree)
        return self._map(lambda array: self._engine.collectives.broadcast(array, from_process), tree, "broadcast")

    def broadcast_object_list(self, values: list[Any], from_process: int = 0) -> list[Any]:
        """The list of process `from_process`, written into `values` in place on all processes and returned."""
        self._check_process(from_process)
        if self.num_processes > 1:
            self._check(f"broadcast_object_list(from_process={from_process})")
            mine = values if self._engine.topology.process_index == from_process else []
            values[:] = self._engine.collectives.all_gather_object(mine)[from_process]
        return values

    def pad_across_processes(self, tree: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
        """Every array padded along `dim` with `pad_index` to the longest on any process; arrays without that dim stay."""
        if self.num_processes == 1:
            return tree
        self._check(f"pad_across_processes(dim={dim})", tree, any_shape=True)
        leaves, structure = trees.flatten(tree)
        shapes = [list(leaf.shape) if is_array(leaf) else None for leaf in leaves]
        everyone = self._engine.collectives.all_gather_object(shapes)

        def pad(position: int, leaf: Any) -> Any:
            shape = shapes[position]
            if shape is None or not -len(shape) <= dim < len(shape):
                return leaf
            axis = dim % len(shape)
            return _pad(leaf, axis, max(other[position][axis] for other in everyone), pad_index, pad_first)

        return structure.unflatten([pad(position, leaf) for position, leaf in enumerate(leaves)])

    def any_process(self, flag: bool, call: str) -> bool:
        """Whether `flag` is set on one process at least; `call` is what user code called."""
        if self.num_processes == 1:
            return flag
        self._check(call)
        return any(self._engine.collectives.all_gather_object(flag))

    def _check(self, call: str, tree: Any = (), *, any_shape: bool = False) -> None:
        """With `debug`: raises CollectiveError unless every process is at this call, with arrays like these."""
        if not self.debug:
            return
        mine = [_described(leaf, any_shape) for leaf in trees.flatten(tree)[0]]
        calls, arrays = zip(*self._engine.collectives.all_gather_object((call, mine)), strict=True)
        path = "make every process take the same path through the script"
        require_equal("the processes called different collectives", calls, path)
        counts = [f"{len(given)} values" for given in arrays]
        require_equal(f"{call} needs trees of one structure on all processes", counts, path)
        for position, rows in enumerate(zip(*arrays, strict=True)):
            which = f" (value {position} of {len(mine)} differs)" if len(mine) > 1 else ""
            require_equal(
                f"{call} needs arrays of one {'dtype and number of dims' if any_shape else 'shape and dtype'} on all processes{which}",
                rows,
                "use accelerator.pad_across_processes first, or convert the dtype",
            )

    def _map(self, operation: Callable[[Any], Any], tree: Any, name: str) -> Any:
        bridge = self._script_bridge()

        def one(leaf: Any) -> Any:
            if not is_array(leaf):
                raise UnsupportedError(
                    f"{name} got a {type(leaf).__name__}: {leaf!r:.60}",
                    "gather arrays, or use gather_object for plain values",
                )
            return operation(leaf) if bridge is None else bridge.lift(operation(bridge.lower(leaf, "value")))

        return trees.map_leaves(one, tree)

    def _check_process(self, from_process: int) -> None:
        if not 0 <= from_process < self.num_processes:
            raise ConfigError(
                f"from_process={from_process} is no process of this job of {self.num_processes}",
                "processes count from 0",
            )


class _OncePerShard:
    """Collectives of all processes, of which `sharing` neighbours have the same values: the first of each counts."""

    def __init__(self, collectives: Any, sharing: int) -> None:
        self._collectives = collectives
        self._sharing = sharing

    def all_gather(self, array: Any) -> Any:
        """Of one process per data shard; an array that is whole already stays whole."""
        size = array.shape[0] if len(array.shape) else 1
        whole = self._collectives.all_gather(array)
        if len(array.shape) and whole.shape[0] == size:
            return whole
        parts = whole.reshape(-1, self._sharing, size, *array.shape[1:])[:, 0]
        return parts.reshape(-1, *array.shape[1:])

    def all_gather_object(self, value: Any) -> list[Any]:
        """Of one process per data shard."""
        return self._collectives.all_gather_object(value)[:: self._sharing]


def _copied(leaf: Any) -> Any:
    if hasattr(leaf, "clone"):  # torch
        return leaf.clone()
    return leaf.copy() if type(leaf).__module__ == "numpy" else leaf  # arrays of jax never change


def _described(leaf: Any, any_shape: bool) -> str:
    if not is_array(leaf):
        return type(leaf).__name__
    dtype = str(leaf.dtype).removeprefix("torch.")
    return f"{len(leaf.shape)} dims {dtype}" if any_shape else f"{tuple(leaf.shape)} {dtype}"


def _pad(array: Any, axis: int, size: int, value: float, first: bool) -> Any:
    missing = size - array.shape[axis]
    if not missing:
        return array
    shape = (*array.shape[:axis], size, *array.shape[axis + 1 :])
    kept = slice(missing, None) if first else slice(None, size - missing)
    where: tuple[Any, ...] = (*([slice(None)] * axis), kept)
    if hasattr(array, "new_full"):  # torch
        padded = array.new_full(shape, value)
        padded[where] = array
        return padded
    widths = [(0, 0)] * len(shape)
    widths[axis] = (missing, 0) if first else (0, missing)
    return array.__array_namespace__().pad(
        array, widths, constant_values=value
    )  # numpy and jax arrays know their namespace

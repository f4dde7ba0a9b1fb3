"""Values of all processes brought together: Accelerate's gather family, over trees, on an engine's few collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polyaccel import trees
from polyaccel.agreement import require_equal
from polyaccel.errors import ConfigError, UnsupportedError, nearest
from polyaccel.protocols import Bridge, Engine

REDUCTIONS = ("sum", "mean", "max", "min", "none")


class Gathering:
    """Collectives over nested values of user code; the script's bridge translates each array into the engine's and back.

    With one process every operation returns its input. Every process must call each operation, with trees of equal structure.
    With `debug` the processes first tell each other what they called and with what: another call, another number of arrays, another
    shape or dtype is an UnsupportedError on all of them, before any array moves.
    """

    def __init__(self, engine: Engine, script_bridge: Callable[[], Bridge | None], *, debug: bool = False) -> None:
        self._engine = engine
        self._script_bridge = script_bridge
        self._debug = debug

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

    def gather_object(self, value: list[Any]) -> list[Any]:
        """The lists of all processes, joined in process order."""
        if self.num_processes == 1:
            return value
        self._check("gather_object")
        return [item for part in self._engine.collectives.all_gather_object(value) for item in part]

    def gather_for_metrics(self, tree: Any, num_real: int) -> Any:
        """`gather`, without the samples that only fill up the last batch: the first `num_real` rows stay (-1: all).

        A tree without arrays is gathered as objects; a dict of plain values as a list of one dict per process.
        """
        leaves, _ = trees.flatten(tree)
        if leaves and not any(is_array(leaf) for leaf in leaves):
            rows = self.gather_object(list(tree) if isinstance(tree, (list, tuple)) else [tree])
            return rows[:num_real] if num_real >= 0 and isinstance(tree, (list, tuple)) else rows
        gathered = self.gather(tree)
        if num_real < 0:
            return gathered
        return trees.map_leaves(lambda leaf: leaf[:num_real] if is_array(leaf) and len(leaf.shape) else leaf, gathered)

    def reduce(self, tree: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Every array reduced elementwise over processes, then multiplied by `scale`; "none" gives the input back."""
        if reduction not in REDUCTIONS:
            raise ConfigError(f"reduction={reduction!r} is unknown", nearest(str(reduction), REDUCTIONS))
        if reduction == "none":
            return tree
        operation: Any = reduction
        if self.num_processes > 1:
            self._check(f"reduce({reduction})", tree)
            tree = self._map(lambda array: self._engine.collectives.all_reduce(array, operation), tree, "reduce")
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
        """With `debug`: raises UnsupportedError unless every process is at this call, with arrays like these."""
        if not self._debug:
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


def is_array(value: Any) -> bool:
    """True for an array of any framework."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


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

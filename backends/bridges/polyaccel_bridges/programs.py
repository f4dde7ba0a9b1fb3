"""A captured fx graph compiled once into a flat list of instructions, which `replay.py` interprets inside any jax trace."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from polyaccel.errors import UnsupportedError

from .lowerings import Lowering, lowering_of, promotion
from .recomputation import barrier
from .sources import draw_of_node, source_of_node

# Where and how a tensor is stored says nothing about its value.
_STORAGE_ARGUMENTS = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking"})


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """The numpy dtype of a torch dtype. Raises UnsupportedError for quantized and other dtypes that jax does not have."""
    try:
        return promotion.numpy_dtype(dtype)
    except KeyError:
        raise UnsupportedError(f"jax has no dtype for {dtype}", "use the torch backend for this model") from None


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """Shape and numpy dtype of one array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of an earlier value among a program's values."""

    index: int


@dataclass(frozen=True, slots=True)
class Instruction:
    """One operation: its lowering, its arguments (earlier values as Slots) and what its result must look like."""

    lowering: Lowering
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    draw: int | None
    result: int
    expected: ArraySpec | tuple[ArraySpec | None, ...] | None
    frees: tuple[int, ...]
    name: str
    source: str


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A pure function from arrays to arrays: the inputs come first among its values, then `constants`."""

    input_names: tuple[str, ...]
    input_specs: tuple[ArraySpec, ...]
    constants: tuple[np.ndarray[Any, Any], ...]
    instructions: tuple[Instruction, ...]
    num_values: int
    outputs: tuple[Slot | None, ...]
    output_specs: tuple[ArraySpec | None, ...]

    @property
    def num_inputs(self) -> int:
        """How many arrays it takes."""
        return len(self.input_specs)

    @property
    def draws_randomly(self) -> bool:
        """Whether running it needs a PRNG key."""
        return any(step.lowering.is_random for step in self.instructions)


def refuse_missing(graph: Graph, outputs: Iterable[Node | None]) -> None:
    """Raise UnsupportedError naming every operation that `outputs` need and that cannot be lowered, with its module and line."""
    missing: dict[str, list[str]] = {}
    live = _needed((), outputs)
    for node in graph.nodes:
        if node in live and node.op == "call_function":
            reason = _why_not_lowered(node)
            if reason is None:
                continue
            where = f"{source_of_node(node)}{reason}"
            places = missing.setdefault(str(node.target), [])
            if where not in places:
                places.append(where)
    if missing:
        lines = [f"  {name} {place}" for name, places in missing.items() for place in places]
        raise UnsupportedError(
            f"{len(missing)} operation{'s have' if len(missing) > 1 else ' has'} no lowering to jax:\n"
            + "\n".join(lines),
            "write that part with other torch operations, register a lowering with polyaccel_bridges.lowerings.table.lowers, "
            "or use the torch backend",
        )


def _why_not_lowered(node: Node) -> str | None:
    """None: it can be. Otherwise what to add to its place: nothing where no lowering exists, or that lowering's own reason."""
    lowering = _lowering_of(node)
    if lowering is None:
        return ""
    if lowering.refuses is None:
        return None
    args, kwargs = map_arg((node.args, node.kwargs), lambda used: used.meta.get("val"))
    reason = lowering.refuses(*args, **kwargs)
    return None if reason is None else f": {reason}"


def constant_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The values of a CPU tensor as a numpy array that shares no memory with it."""
    dtype = numpy_dtype(tensor.dtype)
    plain = tensor.detach().contiguous().resolve_conj().resolve_neg().cpu()
    if dtype.kind == "V" or dtype.name.startswith(("bfloat", "float8")):  # numpy knows these through ml_dtypes alone
        words = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
        return plain.view(words).numpy().copy().view(dtype)
    return plain.numpy().copy()


def spec_of(value: Any) -> ArraySpec | tuple[ArraySpec | None, ...] | None:
    """The specs of a fake tensor, or of a sequence of them; None for anything else."""
    if isinstance(value, torch.Tensor):
        return ArraySpec(tuple(int(size) for size in value.shape), numpy_dtype(value.dtype))
    if isinstance(value, list | tuple):
        return tuple(
            ArraySpec(tuple(v.shape), numpy_dtype(v.dtype)) if isinstance(v, torch.Tensor) else None for v in value
        )
    return None


def compile_program(module: GraphModule, inputs: Mapping[str, Node], outputs: Sequence[Node | None]) -> Program:
    """The part of `module`'s graph that `outputs` need, as a Program of `inputs` (any nodes: what comes before them is cut off)."""
    live = _needed(inputs.values(), outputs)
    slots: dict[Node, int] = {node: index for index, node in enumerate(inputs.values())}
    constants: dict[int, tuple[int, np.ndarray[Any, Any]]] = {}  # by tensor: one that is used twice is kept once
    for node in module.graph.nodes:
        if node in live and node.op == "get_attr":
            tensor = _attribute(module, str(node.target))
            if id(tensor) not in constants:
                constants[id(tensor)] = (len(inputs) + len(constants), constant_array(tensor))
            slots[node] = constants[id(tensor)][0]
    num_values = len(inputs) + len(constants)
    last_use: dict[int, Node] = {}
    body = [node for node in module.graph.nodes if node in live and node.op == "call_function"]
    for node in body:
        slots[node] = num_values
        num_values += 1
        for used in node.all_input_nodes:
            last_use[slots[used]] = node
    kept = {slots[node] for node in outputs if node is not None}
    instructions = []
    for node in body:
        ended = {slots[used] for used in node.all_input_nodes} - kept
        frees = tuple(sorted(slot for slot in ended if last_use[slot] is node))
        instructions.append(_instruction(node, slots, frees))
    return Program(
        input_names=tuple(inputs),
        input_specs=tuple(_tensor_spec(node) for node in inputs.values()),
        constants=tuple(array for _, array in constants.values()),
        instructions=tuple(instructions),
        num_values=num_values,
        outputs=tuple(None if node is None else Slot(slots[node]) for node in outputs),
        output_specs=tuple(None if node is None else _tensor_spec(node) for node in outputs),
    )


def _tensor_spec(node: Node) -> ArraySpec:
    spec = spec_of(node.meta["val"])
    assert isinstance(spec, ArraySpec)
    return spec


def _needed(inputs: Iterable[Node], outputs: Iterable[Node | None]) -> set[Node]:
    given = set(inputs)
    live: set[Node] = set()
    waiting = [node for node in outputs if node is not None]
    while waiting:
        node = waiting.pop()
        if node in live or node in given:
            continue
        live.add(node)
        waiting.extend(node.all_input_nodes)
    return live


def _attribute(module: GraphModule, path: str) -> torch.Tensor:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    assert isinstance(value, torch.Tensor)
    return value


def _project(values: Any, index: int) -> Any:
    return values[index]


_STRUCTURAL: dict[Any, Lowering] = {operator.getitem: Lowering(_project), barrier: Lowering(barrier)}


def _lowering_of(node: Node) -> Lowering | None:
    target: Any = node.target
    return _STRUCTURAL.get(target) or lowering_of(target)


def _instruction(node: Node, slots: dict[Node, int], frees: tuple[int, ...]) -> Instruction:
    def convert(value: Any) -> Any:
        if isinstance(value, Node):
            return Slot(slots[value])
        if isinstance(value, torch.dtype):
            return numpy_dtype(value)
        if isinstance(value, list | tuple):
            return tuple(convert(item) for item in value)
        return value

    lowering = _lowering_of(node)
    assert lowering is not None
    return Instruction(
        lowering=lowering,
        args=tuple(convert(arg) for arg in node.args),
        kwargs={name: convert(arg) for name, arg in node.kwargs.items() if name not in _STORAGE_ARGUMENTS},
        draw=draw_of_node(node) if lowering.is_random else None,
        result=slots[node],
        expected=spec_of(node.meta.get("val")),
        frees=frees,
        name=str(node.target),
        source=str(source_of_node(node)),
    )

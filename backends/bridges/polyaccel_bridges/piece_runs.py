"""One separately captured piece of a recording, run forward and backward: on every data shard, or once on whole values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import jax
import jax.numpy as jnp

from .graphs import VjpGraph
from .replay import run_vjp_backward, run_vjp_forward
from .shards import shared_by

Arrays = dict[str, Any]


@dataclass(slots=True)
class Saved:
    """What a piece's backward needs of its forward."""

    params: Arrays
    inputs: list[Any]
    residuals: list[Any]
    key: Any


@dataclass(frozen=True, slots=True, eq=False)
class PieceGraph:
    """A captured piece. A residual that is an input or a parameter itself is not kept twice: `sources` says what each one is."""

    graph: VjpGraph
    sources: tuple[tuple[str, Any], ...] = field(init=False)

    def __post_init__(self) -> None:
        graph = self.graph
        names = [name for name, _ in graph.state_names]
        slots = graph.forward.outputs[len(graph.output_specs) + len(graph.buffer_names) :]
        sources: list[tuple[str, Any]] = []
        kept = 0
        for slot in slots[: graph.num_residuals]:
            index = len(graph.forward.input_names) if slot is None else slot.index
            name = names[index] if index < len(names) else None
            if name is not None and dict(graph.state_names)[name]:
                sources.append(("param", name))
            elif len(names) <= index < len(graph.forward.input_names):
                sources.append(("input", index - len(names)))
            else:
                sources.append(("kept", kept))
                kept += 1
        object.__setattr__(self, "sources", tuple(sources))

    @property
    def draws_randomly(self) -> bool:
        """Whether it needs a key."""
        return self.graph.forward.draws_randomly or self.graph.backward.draws_randomly

    @property
    def param_names(self) -> tuple[str, ...]:
        """The parameters that it takes."""
        return tuple(name for name, is_param in self.graph.state_names if is_param)

    @property
    def buffer_names(self) -> tuple[str, ...]:
        """The buffers that it takes."""
        return tuple(name for name, is_param in self.graph.state_names if not is_param)

    def kept(self, residuals: Sequence[Any]) -> list[Any]:
        """The residuals that are neither inputs nor parameters."""
        return [value for value, (kind, _) in zip(residuals, self.sources, strict=False) if kind == "kept"]

    def residuals(self, params: Arrays, inputs: Sequence[Any], kept: Sequence[Any], key: Any) -> list[Any]:
        """All residuals, in the order in which the backward takes them."""
        found: dict[str, Any] = {"param": params, "input": inputs, "kept": kept}
        values: list[Any] = [found[kind][which] for kind, which in self.sources]
        return [*values, key] if self.graph.backward.draws_randomly else values


@final
class WholePiece:
    """A piece of user code on the values of one process; with several processes it is mapped over them (dim 0 of stacked values).

    `stacked` says which inputs have a dim for the processes.
    """

    def __init__(self, piece: PieceGraph, num_processes: int) -> None:
        self.piece = piece
        self.num_processes = num_processes

    def forward(
        self, params: Arrays, inputs: Sequence[Any], stacked: Sequence[bool], key: Any
    ) -> tuple[list[Any], Saved]:
        """(outputs, what backward needs)."""
        piece = self.piece

        def run(key: Any, inputs: list[Any]) -> tuple[list[Any], list[Any]]:
            outputs, _, residuals = run_vjp_forward(piece.graph, params, {}, inputs, key)
            return outputs, piece.kept(residuals)

        if self.num_processes == 1:
            outputs, kept = run(key, list(inputs))
            return outputs, Saved(params, list(inputs), kept, key)
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(self.num_processes))
        axes = [0 if flag else None for flag in stacked]
        outputs, kept = jax.vmap(run, in_axes=(0, axes))(keys, list(inputs))
        return outputs, Saved(params, list(inputs), kept, keys)

    def backward(self, saved: Saved, stacked: Sequence[bool], cotangents: Sequence[Any]) -> tuple[Arrays, list[Any]]:
        """(parameter gradients, input gradients)."""
        piece = self.piece

        def run(key: Any, inputs: list[Any], kept: list[Any], cotangents: list[Any]) -> tuple[Arrays, list[Any]]:
            residuals = piece.residuals(saved.params, inputs, kept, key)
            return run_vjp_backward(piece.graph, residuals, cotangents)

        if self.num_processes == 1:
            return run(saved.key, saved.inputs, saved.residuals, list(cotangents))
        axes = [0 if flag else None for flag in stacked]
        filled = [
            jnp.zeros((self.num_processes, *spec.shape), spec.dtype) if value is None else value
            for value, spec in zip(cotangents, piece.graph.output_specs, strict=True)
        ]
        grads, input_grads = jax.vmap(run, in_axes=(0, axes, 0, 0))(saved.key, saved.inputs, saved.residuals, filled)
        summed = [
            value if value is None or flag else value.sum(0) for value, flag in zip(input_grads, stacked, strict=True)
        ]
        return {name: value.sum(0) for name, value in grads.items()}, summed


@final
class ShardedPiece:
    """A model call: every data shard runs it on its own part of the batch.

    Inputs and outputs without a batch dim: the former are the same on all shards, the latter come out stacked over the shards
    (dim 0), and so do their cotangents go in.
    """

    def __init__(
        self,
        piece: PieceGraph,
        in_axes: Sequence[int | None],
        out_axes: Sequence[int | None],
        num_shards: int,
        shard_call: Any,
    ) -> None:
        self.piece = piece
        self.in_axes = tuple(in_axes)
        self.out_axes = tuple(out_axes)
        self.num_shards = num_shards
        self._shard_call = shard_call

    def _key(self, key_data: Any, like: Any, index: Any) -> Any:
        key = jax.random.wrap_key_data(key_data, impl=jax.random.key_impl(like))
        return key if self.num_shards == 1 else jax.random.fold_in(key, index)

    def forward(
        self, params: Arrays, buffers: Arrays, inputs: Sequence[Any], key: Any
    ) -> tuple[list[Any], Arrays, Saved]:
        """(outputs, written buffers, what backward needs)."""
        piece = self.piece
        graph = piece.graph
        param_names, buffer_names = piece.param_names, piece.buffer_names
        num_kept = sum(kind == "kept" for kind, _ in piece.sources)

        def run(index: Any, key_data: Any, *arrays: Any) -> tuple[Any, ...]:
            own = dict(zip(param_names, arrays, strict=False))
            held = dict(zip(buffer_names, arrays[len(param_names) :], strict=False))
            values = list(arrays[len(param_names) + len(buffer_names) :])
            with shared_by(self._shard_call):
                outputs, written, residuals = run_vjp_forward(graph, own, held, values, self._key(key_data, key, index))
            shown = [
                value if axis is not None else value[None] for value, axis in zip(outputs, self.out_axes, strict=True)
            ]
            return (
                *shown,
                *[written[name] for name in graph.buffer_names],
                *[value[None] for value in piece.kept(residuals)],
            )

        call = self._shard_call(
            run,
            (None, *[None] * (len(param_names) + len(buffer_names)), *self.in_axes),
            (
                *[0 if axis is None else axis for axis in self.out_axes],
                *[None] * len(graph.buffer_names),
                *[0] * num_kept,
            ),
        )
        results = call(
            jax.random.key_data(key),
            *[params[name] for name in param_names],
            *[buffers[name] for name in buffer_names],
            *inputs,
        )
        outputs, rest = list(results[: len(self.out_axes)]), results[len(self.out_axes) :]
        written = dict(zip(graph.buffer_names, rest, strict=False))
        return outputs, written, Saved(params, list(inputs), list(rest[len(graph.buffer_names) :]), key)

    def backward(self, saved: Saved, cotangents: Sequence[Any]) -> tuple[Arrays, list[Any]]:
        """(parameter gradients, input gradients), summed over the shards where an array is the same on all of them."""
        piece = self.piece
        graph = piece.graph
        names = [name for kind, name in piece.sources if kind == "param"]
        given = [index for index, value in enumerate(cotangents) if value is not None]
        wanted = [index for index, flag in enumerate(graph.input_grads) if flag]
        num_inputs, num_kept = len(saved.inputs), len(saved.residuals)

        def run(index: Any, key_data: Any, *arrays: Any) -> tuple[Any, ...]:
            own = dict(zip(names, arrays, strict=False))
            rest = arrays[len(names) :]
            inputs, rest = rest[:num_inputs], rest[num_inputs:]
            kept, rest = [value[0] for value in rest[:num_kept]], rest[num_kept:]
            seeds: list[Any] = [None] * len(graph.output_specs)
            for position, value in zip(given, rest, strict=True):
                seeds[position] = value if self.out_axes[position] is not None else value[0]
            residuals = piece.residuals(own, inputs, kept, self._key(key_data, saved.key, index))
            with shared_by(self._shard_call):
                grads, input_grads = run_vjp_backward(graph, residuals, seeds)
            return (*[grads[name] for name in graph.grad_names], *[input_grads[position] for position in wanted])

        out_axes: list[int | str] = ["sum"] * len(graph.grad_names)
        for position in wanted:
            axis = self.in_axes[position]
            out_axes.append("sum" if axis is None else axis)
        call = self._shard_call(
            run,
            (
                None,
                *[None] * len(names),
                *self.in_axes,
                *[0] * num_kept,
                *[0 if self.out_axes[position] is None else self.out_axes[position] for position in given],
            ),
            tuple(out_axes),
        )
        results = call(
            jax.random.key_data(saved.key),
            *[saved.params[name] for name in names],
            *saved.inputs,
            *saved.residuals,
            *[cotangents[position] for position in given],
        )
        input_grads: list[Any] = [None] * num_inputs
        for position, value in zip(wanted, results[len(graph.grad_names) :], strict=True):
            input_grads[position] = value
        return dict(zip(graph.grad_names, results, strict=False)), input_grads

"""The memory that a flax module needs, counted on shapes: `polyaccel estimate-memory`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

from polyaccel.errors import ConfigError, PrepareError, nearest
from polyaccel.estimates import TRAINING_PRECISIONS, Answer, Part, Question

_Tree = Any


def answer(question: Question) -> Answer:
    """Count it. Raises ConfigError for an unknown optimizer, PrepareError for a factory that makes no module."""
    notes: list[str] = []
    inputs = [jax.ShapeDtypeStruct(shape.shape, jnp.dtype(shape.dtype)) for shape in question.inputs]
    params, others, call = _shapes(question, inputs)
    parts = tuple(_part(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params))
    activations: dict[str, int] = {}
    if inputs and call is not None:
        for precision in question.precisions:
            if precision in TRAINING_PRECISIONS:
                activations[precision] = _temporaries(call, params, others, inputs, precision)
        notes.append(
            "activations: what the compiled forward and backward need beside parameters, gradients and inputs, as XLA plans it for the"
            " CPU; other compilers fuse more"
        )
    else:
        notes.append("activations are not counted: the module's inputs are not known (--input B,3,224,224)")
    layers: dict[str, tuple[Part, ...]] = {}
    for part in parts:
        owner = part.name.rpartition(".")[0]
        layers[owner] = (*layers.get(owner, ()), part)
    return Answer(
        dialect="flax",
        parameters=parts,
        buffers=tuple(
            _part(path, leaf, is_matrix=False)
            for path, leaf in jax.tree_util.tree_leaves_with_path(others)
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        ),
        trainable_count=sum(part.count for part in parts),
        trainable_bytes=sum(part.bytes for part in parts),
        optimizer_bytes=_optimizer_bytes(params, question),
        layers=layers,
        activations=activations,
        inputs=question.inputs if activations else (),
        notes=notes,
    )


def _shapes(question: Question, inputs: list[jax.ShapeDtypeStruct]) -> tuple[_Tree, _Tree, Callable[..., Any] | None]:
    """Parameters, what else the module holds, and its call of (parameters, others, inputs)."""
    found: list[Any] = []

    def make() -> None:
        found.append(question.factory())

    jax.eval_shape(make)
    module = found[0]
    if isinstance(module, nnx.Module):
        split: Any = nnx.split(nnx.eval_shape(question.factory), nnx.Param, ...)
        graph, params, others = split

        def run_nnx(params: _Tree, others: _Tree, *args: Any) -> Any:
            return nnx.merge(graph, params, others, copy=True)(*args)  # its statistics are written in this trace

        return params, others, run_nnx
    if not isinstance(module, linen.Module):
        raise PrepareError(
            f"{question.factory!r} made a {type(module).__name__}, and no flax module",
            "return the module, and it alone",
        )
    if not inputs:
        raise ConfigError(
            f"{type(module).__name__} has its parameters only once it has seen its inputs", "give --input B,3,224,224"
        )
    variables = dict(jax.eval_shape(lambda key, *args: linen.meta.unbox(module.init(key, *args)), _key(), *inputs))
    params = variables.pop("params", {})

    def run_linen(params: _Tree, others: _Tree, *args: Any) -> Any:
        rngs = {"dropout": jax.random.key(0)}
        return module.apply({"params": params, **others}, *args, rngs=rngs, mutable=list(others))[0]

    return params, variables, run_linen


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _part(path: Any, leaf: Any, is_matrix: bool = True) -> Part:
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    name = ".".join(keys[:-1] if keys[-1] == "value" else keys)  # nnx: what its variable holds
    count = math.prod(leaf.shape)
    is_floating = bool(jnp.issubdtype(leaf.dtype, jnp.floating))
    is_quantized = is_matrix and len(leaf.shape) >= 2 and is_floating and not name.endswith("embedding")
    return Part(name, count, count if is_quantized else 0, count * leaf.dtype.itemsize, is_floating)


def _temporaries(
    call: Callable[..., Any], params: _Tree, others: _Tree, inputs: list[jax.ShapeDtypeStruct], precision: str
) -> int:
    """Bytes that the compiled gradient of the mean of the outputs needs for a while."""
    dtype = jnp.dtype(precision)

    def narrow(value: Any) -> Any:
        return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value

    def loss(params: _Tree, others: _Tree, args: list[Any]) -> Any:
        outputs = call(jax.tree.map(narrow, params), others, *map(narrow, args))
        return sum(jnp.mean(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(outputs))

    compiled = jax.jit(jax.grad(loss)).lower(params, others, inputs).compile()
    analysis: Any = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes)


def _optimizer_bytes(params: _Tree, question: Question) -> int:
    known = {name: value for name, value in vars(optax).items() if callable(value) and not name.startswith("_")}
    name = question.optimizer.lower()
    if name not in known:
        raise ConfigError(f"--optimizer {question.optimizer} is none of optax", nearest(name, known))
    try:
        transformation = known[name](**{"learning_rate": 1e-3, **question.optimizer_settings})
        state = jax.eval_shape(transformation.init, params)
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"--optimizer {question.optimizer}: {error}", "see its arguments in optax") from error
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

"""When jax's own attention kernels serve a captured attention operation, and how its gradients come from jax's own derivative of them.

cudnn serves 16-bit attention on NVIDIA GPUs. Everywhere else attention.py computes, in blocks for long sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import jax
import jax.numpy as jnp

Implementation = Literal["cudnn", "blocks"]

_MIN_COMPUTE_CAPABILITY = 8.0  # of cudnn's flash attention
_MAX_HEAD_SIZE = 128  # larger ones only on some devices


def choose(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    dtype: Any,
    *,
    has_mask: bool,
    is_causal: bool,
    capability: float | None,
) -> Implementation:
    """Who computes attention of these shapes, (batch, heads, time, head), in this dtype.

    `capability`: of the NVIDIA GPU that programs are made for; None for any other device.
    """
    if capability is None or capability < _MIN_COMPUTE_CAPABILITY:
        return "blocks"
    times, sizes = (query[2], key[2]), (query[3], key[3], value[3])
    fits = (
        jnp.dtype(dtype) in (jnp.float16, jnp.bfloat16)
        and len(set(sizes)) == 1
        and sizes[0] % 8 == 0
        and sizes[0] <= _MAX_HEAD_SIZE
        and 0 not in (*query, *key)
        # The backward with a bias takes even lengths only, and a rectangle's causal mask is aligned differently in some versions.
        and not (has_mask and any(time % 2 for time in times))
        and not (is_causal and times[0] != times[1])
    )
    return "cudnn" if fits else "blocks"


@functools.cache
def gpu_capability() -> float | None:
    """The compute capability of the GPU that jax computes on by default; None without one, or where jax finds no cudnn for it."""
    if jax.default_backend() != "gpu":
        return None
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    try:
        found = float(capability) if capability is not None else None
    except ValueError:  # AMD's are names
        return None
    return found if found is not None and _has_cudnn() else None


def _has_cudnn() -> bool:
    shape = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), shape, shape, shape)
    except (RuntimeError, NotImplementedError):
        return False
    return True


# A program that holds both halves of an attention computes its forward once: the derivative is made with it and kept until the
# backward comes. Keyed by the identity of the forward's result.
_pairs: ContextVar[dict[int, tuple[Any, Any]] | None] = ContextVar("_pairs", default=None)


@contextmanager
def pairing(has_backward: bool) -> Iterator[None]:
    """Inside, which is one run of one program, a backward finds its forward. Without one in it, forwards keep nothing for it."""
    token = _pairs.set({} if has_backward else None)
    try:
        yield
    finally:
        _pairs.reset(token)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    *,
    is_causal: bool,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Attention of (batch, heads, time, head) by `jax.nn.dot_product_attention`; rows whose mask is -inf throughout give 0."""
    function = _function(mask, is_causal, scale, implementation)
    pairs = _pairs.get()
    if pairs is None:
        return function(query, key, value)
    out: jax.Array
    out, derivative = jax.vjp(function, query, key, value)
    pairs[id(out)] = (out, derivative)  # holding it keeps its id its own
    return out


def attend_backward(
    grad_out: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    mask: jax.Array | None,
    *,
    is_causal: bool,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of `attend`. Where the forward ran in another program it is computed again."""
    held = (_pairs.get() or {}).pop(id(out), None)
    if held is not None and held[0] is out:
        derivative = held[1]
    else:
        _, derivative = jax.vjp(_function(mask, is_causal, scale, implementation), query, key, value)
    grads: tuple[jax.Array, jax.Array, jax.Array] = derivative(grad_out.astype(query.dtype))
    return grads


def _function(
    mask: jax.Array | None, is_causal: bool, scale: float, implementation: Literal["cudnn", "xla"]
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    if mask is not None:
        mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)

    def function(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        wide = is_dead = None
        if mask is not None:
            # With -inf alone in a row kernels give NaN: a finite number in its place, and such rows are cut out below.
            wide = jnp.maximum(mask, jnp.asarray(float(jnp.finfo(query.dtype).min) / 2, mask.dtype)).astype(query.dtype)
            wide = jnp.broadcast_to(wide, (*mask.shape[:2], query.shape[2], key.shape[2]))
            is_dead = jnp.isneginf(mask).all(-1, keepdims=True)
        out = jax.nn.dot_product_attention(
            jnp.swapaxes(query, 1, 2),
            jnp.swapaxes(key, 1, 2),
            jnp.swapaxes(value, 1, 2),
            wide,
            is_causal=is_causal,
            scale=scale,
            implementation=implementation,
        )
        out = jnp.swapaxes(out, 1, 2)
        return out if is_dead is None else jnp.where(is_dead, jnp.zeros_like(out), out)

    return function

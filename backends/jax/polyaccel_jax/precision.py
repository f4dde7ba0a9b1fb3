"""Dynamic loss scaling on the device: the scale is state, a skipped update is a select, and no step waits for the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polyaccel.precision import LossScaling

ScalerState = tuple[Any, Any]  # (scale: float32, good steps in a row: int32), both scalars on the device


def initial_scaler(scaling: LossScaling) -> ScalerState:
    """The state before the first step, as host scalars."""
    return np.float32(scaling.init_scale), np.int32(0)


def all_finite(grads: Mapping[str, jax.Array]) -> jax.Array:
    """Whether no gradient has an infinite or undefined element; traceable."""
    finite = [jnp.isfinite(grad).all() for grad in grads.values()]
    return jnp.stack(finite).all() if finite else jnp.array(True)


def next_scaler(state: ScalerState, is_finite: jax.Array, scaling: LossScaling) -> ScalerState:
    """The state after an update (is_finite) or a skipped one, as torch.amp.GradScaler.update computes it; traceable."""
    scale, good_steps = state
    good_steps = jnp.where(is_finite, good_steps + jnp.int32(1), jnp.int32(0))
    grows = good_steps == scaling.growth_interval
    factor = jnp.where(is_finite, jnp.where(grows, scaling.growth_factor, 1.0), scaling.backoff_factor)
    grown = scale * factor.astype(jnp.float32)
    # A scale that would overflow stays: GradScaler keeps the last finite one too.
    scale = jnp.where(jnp.isfinite(grown), grown, scale)
    return scale, jnp.where(grows, jnp.int32(0), good_steps)

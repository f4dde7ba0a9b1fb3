"""Reshapes that are taken back: what comes out is the same, and was never reshaped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polyaccel_jax.round_trips import RoundTrips


def rerun(jaxpr, *args):
    trips, values = RoundTrips(), dict(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, trips.bind(eqn, [values[atom] for atom in eqn.invars]), strict=True))
    return values[jaxpr.outvars[0]]


def steps_to_the_result(jaxpr):
    """Names of the operations that the first result needs, each of one operand, last first."""
    made = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    names, at = [], jaxpr.outvars[0]
    while at in made:
        names.append(made[at].primitive.name)
        (at,) = made[at].invars
    return names


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: x.reshape(2, 3, 4).reshape(6, 4), []),
        (
            lambda x: x.reshape(2, 3, 4).astype(jnp.bfloat16).astype(jnp.float32).reshape(6, 4),
            ["convert_element_type"] * 2,
        ),
        (lambda x: x.reshape(24).reshape(2, 3, 4).astype(jnp.bfloat16).reshape(6, 4), ["convert_element_type"]),
        (lambda x: x.reshape(2, 3, 4).reshape(4, 6), ["reshape"] * 2),
        (lambda x: jnp.sin(x.reshape(2, 3, 4)).reshape(6, 4), ["reshape", "sin", "reshape"]),
        (lambda x: x.reshape(4, 6, order="F").reshape(6, 4), None),
    ],
)
def test_a_round_trip_through_another_shape_is_left_out(function, names):
    x = jnp.arange(24, dtype=jnp.float32).reshape(6, 4) / 7
    jaxpr = jax.make_jaxpr(function)(x).jaxpr
    again = jax.make_jaxpr(lambda x: rerun(jaxpr, x))(x).jaxpr
    if names is not None:
        assert steps_to_the_result(again) == names
    np.testing.assert_array_equal(rerun(jaxpr, x), function(x))

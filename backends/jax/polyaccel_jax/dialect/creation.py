"""Flax modules whose variables are computed by one compiled program, straight into the parts that the devices keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from flax import linen, nnx

if TYPE_CHECKING:
    from polyaccel_jax.mesh import DeviceMesh

_PARAMS = "params"


def create(make: Callable[[], Any], mesh: DeviceMesh) -> Any:
    """What `make` returns, an nnx module or a bound linen module, with variables that lie as the mesh keeps them.

    The values are those of `make()`: only the place where they are computed is another. What is no flax module is returned as it is.
    """
    found: list[Any] = []
    jax.eval_shape(lambda: found.append(make()))
    template = found[0]
    if isinstance(template, nnx.Module):
        graph = nnx.graphdef(nnx.eval_shape(make))
        return nnx.merge(graph, *initial(make, mesh)())
    if isinstance(template, linen.Module) and template.scope is not None:
        module, _ = template.unbind()
        params, others = initial(make, mesh)()
        return module.bind({_PARAMS: params, **others})
    return template


def initial(make: Callable[[], Any], mesh: DeviceMesh) -> Any:
    """The jitted program that computes (params, other variables), each device its own part of the former."""

    def variables() -> tuple[Any, Any]:
        module = make()
        if isinstance(module, nnx.Module):
            split: Any = nnx.split(module, nnx.Param, ...)
            return split[1], split[2]
        others = dict(module.unbind()[1])
        return others.pop(_PARAMS, {}), others

    params, others = jax.eval_shape(variables)
    if mesh.planner is not None:
        planned = (
            jax.tree.map(lambda leaf: mesh.keep([leaf])[0], params),
            jax.tree.map(lambda leaf: mesh.replicate([leaf])[0], others),
        )
        return lambda: planned
    shardings = jax.tree.map(mesh.kept, params), jax.tree.map(lambda leaf: mesh.replicated, others)
    return jax.jit(variables, out_shardings=shardings)

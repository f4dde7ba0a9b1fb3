"""Flax modules whose variables are computed by one compiled program, straight into the parts that the devices keep."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from flax import core, linen, nnx, traverse_util

from polyaccel.sharding.plan import ModelHints
from polyaccel_jax.dialect.partitioning import hints_of_boxes, hints_of_variables

if TYPE_CHECKING:
    from polyaccel_jax.mesh import DeviceMesh

_PARAMS = "params"
_made: weakref.WeakSet[nnx.Module] = (
    weakref.WeakSet()
)  # that nobody has written to before they are prepared, or reads afterwards


def create(make: Callable[[], Any], mesh: DeviceMesh) -> Any:
    """What `make` returns, an nnx module or a bound linen module, with variables that lie as the mesh keeps them.

    The values are those of `make()`: only the place where they are computed is another. What is no flax module is returned as it is.
    """
    with nnx.use_eager_sharding(False):  # nnx would ask for a mesh with axes of the names that its modules give dims
        return _create(make, mesh)


def _create(make: Callable[[], Any], mesh: DeviceMesh) -> Any:
    found: list[Any] = []
    jax.eval_shape(lambda: found.append(make()))
    template = found[0]
    if isinstance(template, nnx.Module):
        graph = nnx.graphdef(nnx.eval_shape(make))
        module = nnx.merge(graph, *initial(make, mesh)())
        _made.add(module)
        return module
    if isinstance(template, linen.Module) and template.scope is not None:
        module, _ = template.unbind()
        params, others = initial(make, mesh)()
        return module.bind({_PARAMS: params, **others})
    return template


def is_made_here(module: nnx.Module) -> bool:
    """Whether `create` made this module."""
    return module in _made


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
    shardings = _shardings(params, mesh), jax.tree.map(lambda leaf: mesh.replicated, others)
    if mesh.planner is not None:
        planned = jax.tree.map(mesh.planner.laid, (params, others), shardings)
        return lambda: planned
    return jax.jit(variables, out_shardings=shardings)


def _shardings(params: Any, mesh: DeviceMesh) -> Any:
    """For every leaf how `prepare` will keep it: by the same names, from the same hints."""
    if mesh.num_parts == 1:
        return jax.tree.map(lambda leaf: mesh.replicated, params)
    shapes, hints = _described(params)
    specs = mesh.plan_parameters(shapes, hints).specs
    leaves, treedef = jax.tree.flatten(params)
    kept = [mesh.sharding_of(specs[name]) for name in shapes]
    if len(kept) != len(leaves):
        raise AssertionError(f"{len(leaves)} arrays, and {len(kept)} names of parameters")
    return jax.tree.unflatten(treedef, kept)


def _described(params: Any) -> tuple[dict[str, tuple[int, ...]], ModelHints]:
    """Shapes by dotted name, in the order of `jax.tree.leaves`, and what the module says of them."""
    if isinstance(params, nnx.State):
        variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}
        return {name: tuple(v.get_value().shape) for name, v in variables.items()}, hints_of_variables(variables)
    boxes = {".".join(path): box for path, box in sorted(traverse_util.flatten_dict(core.unfreeze(params)).items())}
    return {name: tuple(linen.unbox(box).shape) for name, box in boxes.items()}, hints_of_boxes(boxes)

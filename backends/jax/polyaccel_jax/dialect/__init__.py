"""What flax scripts are made of, as programs: nnx and linen modules, optax transformations, loss functions, loaders.

Importing it imports no framework; each function imports the part that it needs.
"""

from __future__ import annotations

from typing import Any

from polyaccel.dialects import identify
from polyaccel.protocols import LoaderSpec, LossCall


def is_module(value: Any) -> bool:
    """Whether a value is a flax module of either kind."""
    return identify(value) == ("flax", "model")


def is_optimizer(value: Any) -> bool:
    """Whether a value is an optax transformation or an nnx.Optimizer."""
    return identify(value) == ("flax", "optimizer")


def create(make: Any, mesh: Any) -> Any:
    """What `make` returns, a flax module's variables computed where the mesh keeps them."""
    from polyaccel_jax.dialect import creation

    return creation.create(make, mesh)


def model_source(module: Any) -> Any:
    """A flax module as a ModelSource. Raises PrepareError for a linen module without variables."""
    from flax import nnx

    if isinstance(module, nnx.Module):
        from polyaccel_jax.dialect.nnx_modules import NnxSource

        return NnxSource(module)
    from polyaccel_jax.dialect.linen_modules import LinenSource

    return LinenSource(module)


def model_handle(source: Any, model: Any) -> Any:
    """What user code holds for a prepared module."""
    from polyaccel_jax.dialect.nnx_modules import NnxSource, PreparedNnx

    if isinstance(source, NnxSource):
        return PreparedNnx(source, model)
    from polyaccel_jax.dialect.linen_modules import PreparedLinen

    return PreparedLinen(source, model)


def optimizer_source(optimizer: Any, model: Any) -> Any:
    """An optax transformation or nnx.Optimizer as an OptimizerSource over the model's parameters."""
    from polyaccel_jax.dialect.optax_states import OptaxSource

    return OptaxSource(optimizer, model)


def optimizer_handle(source: Any, optimizer: Any) -> Any:
    """What user code holds for a prepared optimizer."""
    from polyaccel_jax.dialect.optax_states import PreparedOptax

    return PreparedOptax(source, optimizer)


def lower_call(call: LossCall, known: dict[Any, Any] | None = None) -> Any:
    """A loss function and its arguments as a ProgramCall; `known` keeps calls between steps."""
    from polyaccel_jax.dialect import functional

    return functional.lower_call(call, {} if known is None else known)


def prepare_loader(loader: Any, spec: LoaderSpec, engine: Any) -> Any:
    """A loader of any kind, cut over the data shards, with batches on their devices ahead of use."""
    from polyaccel_jax.dialect import loaders

    return loaders.prepare(loader, spec, engine)


def unwrap(handle: Any) -> Any:
    """The user's own object, with current values; a handle that a bridge made gives its source."""
    if "_polyaccel_model" in vars(handle):
        return handle._source.current()
    if "_polyaccel_optimizer" in vars(handle):
        return handle.unwrap()
    return handle.source

"""Loaders of flax scripts: anything that yields batches, grain's loaders and datasets, and loaders that a bridge cuts."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from polyaccel.data import PreparedLoader, prepared_loader, refuse_prepared
from polyaccel.protocols import LoaderSpec
from polyaccel_jax.dialect.batch_trees import flatten, is_placeable
from polyaccel_jax.dialect.iterables import HostIterable


def prepare(loader: Any, spec: LoaderSpec, engine: Any) -> PreparedLoader:
    """A PreparedLoader of this process's share of every global batch.

    `loader` is a HostLoader of a bridge, a grain loader or dataset, or any iterable of batches (trees of numpy or jax arrays
    with the batch as dim 0). Without `device_placement` its batches stay in host memory. Raises PrepareError for a loader that was
    prepared before, and UnsupportedError where process 0 is to read an iterable for the others.
    """
    refuse_prepared(loader)
    sharding = spec.sharding(engine.plan)
    topology = engine.topology
    if hasattr(loader, "shard") and hasattr(loader, "loader"):  # a HostLoader
        host = loader.shard(
            sharding,
            spec=spec,
            exchange=engine.collectives.all_gather_object if topology.num_processes > 1 else None,
            process_index=topology.process_index,
        )
    else:
        spec.check_iterable(loader, is_alone=topology.num_processes == 1)
        host = HostIterable(loader, sharding)
    wants_64bit = spec.lift is not None  # batches of a torch script keep int64

    def place(batch: Any) -> Any:
        with engine.dtypes(wants_64bit):
            return place_batch(batch, engine)

    return prepared_loader(
        host,
        place=place if spec.device_placement else None,
        lift=spec.lift if spec.device_placement else None,
        observer=engine.gradient_state,
        prefetch=spec.prefetch,
        in_background=spec.read_in_background,
        is_one_program=topology.num_processes > 1,
    )


def place_batch(batch: Any, engine: Any) -> Any:
    """The batch with its arrays on the mesh; leaves that are no arrays stay."""
    leaves, structure = flatten(batch)
    positions = [index for index, leaf in enumerate(leaves) if is_placeable(leaf)]
    placed = engine.place([to_array(leaves[index]) for index in positions])
    for index, array in zip(positions, placed, strict=True):
        leaves[index] = array
    return structure.unflatten(leaves)


def to_array(leaf: Any) -> Any:
    """A jax or numpy array of any framework's host array, without a copy where that is possible."""
    if isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    try:
        return np.asarray(leaf)
    except TypeError:  # a dtype that numpy lacks (bfloat16)
        return jax.dlpack.from_dlpack(leaf)

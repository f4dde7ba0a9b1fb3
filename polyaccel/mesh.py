"""The mesh that was asked for: named axes and their sizes. A value, not a set of devices; engines build theirs from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from polyaccel.errors import ConfigError, PlanError, nearest


@dataclass(frozen=True, slots=True)
class MeshSpec:
    """Sizes of the mesh axes, outermost first; -1 in one of them means "all devices that the others leave".

    `replica` and `data` repeat the parameters, `fsdp` shards them; all three split the batch. `tensor` and `sequence` split
    single layers and do not split the batch.
    """

    replica: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        for name, size in self.sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
                raise ConfigError(
                    f"mesh.{name}={size!r} is not an axis size",
                    "use a positive integer, or -1 for all remaining devices",
                )
        inferred = [name for name, size in self.sizes.items() if size == -1]
        if len(inferred) > 1:
            raise ConfigError(
                f"mesh axes {', '.join(inferred)} are all -1", "only one axis can be inferred: give the others a size"
            )

    @classmethod
    def of(cls, value: MeshSpec | Mapping[str, int] | None) -> MeshSpec:
        """A MeshSpec from what a user writes: a MeshSpec, a mapping of axis sizes, or None for pure data parallelism.

        In a mapping that names no `data`, an inferred axis elsewhere makes `data` 1.
        """
        if value is None:
            return cls()
        if isinstance(value, MeshSpec):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"mesh={value!r} is not a mesh", "write for example mesh={'data': 2, 'fsdp': 2}")
        known = [f.name for f in fields(cls)]
        for name in value:
            if name not in known:
                raise ConfigError(f"mesh axis {name!r} is unknown", nearest(str(name), known))
        sizes = dict(value)
        if -1 in sizes.values():
            sizes.setdefault("data", 1)
        return cls(**sizes)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name to size, outermost first."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def num_devices(self) -> int:
        """Devices of a resolved mesh (no -1 left)."""
        return math.prod(self.sizes.values())

    @property
    def num_data_shards(self) -> int:
        """Data-parallel replicas of a resolved mesh: the product of the axes that split the batch."""
        return self.replica * self.data * self.fsdp

    def resolve(self, num_devices: int) -> MeshSpec:
        """The same mesh with the -1 axis replaced by its size on `num_devices` devices. Raises PlanError if it does not fit."""
        inferred = next((name for name, size in self.sizes.items() if size == -1), None)
        known = math.prod(size for size in self.sizes.values() if size != -1)
        asked = " x ".join(f"{name}={size}" for name, size in self.sizes.items() if size != 1) or "one device"
        if inferred is None:
            if known != num_devices:
                raise PlanError(
                    f"mesh {asked} needs {known} devices, but this job has {num_devices}",
                    "set one axis to -1 to use all devices, or start the job on as many devices as the mesh has",
                )
            return self
        if num_devices % known:
            raise PlanError(
                f"mesh {asked} cannot fill {num_devices} devices: {num_devices} is not a multiple of {known}",
                "choose axis sizes whose product divides the number of devices",
            )
        return replace(self, **{inferred: num_devices // known})

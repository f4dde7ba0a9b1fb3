"""`accelerate.parallelism_config`: the sizes of parallel groups, and torch's mesh of them for scripts that build on it themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polyaccel.big_models import served
from polyaccel.compat.utils.dataclasses import TorchContextParallelConfig, TorchTensorParallelConfig
from polyaccel.compat.utils.environment import get_int_from_env, parse_choice_from_env
from polyaccel.config import parallel
from polyaccel.errors import ConfigError

__all__ = ["ParallelismConfig"]

_ORDER = ("dp_replicate", "dp_shard", "cp", "sp", "tp")  # outermost first
_DATA, _PARAMETERS, _LOSS = _ORDER[:2], ("dp_shard", "cp"), ("dp_replicate", "dp_shard", "cp")


@dataclass
class ParallelismConfig(parallel.ParallelismConfig):
    """The settings object of `polyaccel.config`; fields that are not given come from PARALLELISM_CONFIG_* at once.

    Raises ConfigError for sizes that are none, for cp_size with sp_size, and for a handler of another kind.
    """

    def __post_init__(self) -> None:
        prefix = "PARALLELISM_CONFIG_"
        for axis in _ORDER:
            if getattr(self, f"{axis}_size") is None:
                setattr(self, f"{axis}_size", get_int_from_env([f"{prefix}{axis.upper()}_SIZE"], 1))
        if self.cp_backend is None:
            self.cp_backend = parse_choice_from_env(prefix + "CP_BACKEND", "torch")
        if self.sp_backend is None:
            self.sp_backend = parse_choice_from_env(prefix + "SP_BACKEND", "deepspeed")
        super().__post_init__()
        if self.tp_enabled and self.tp_handler is None:
            self.tp_handler = TorchTensorParallelConfig()
        if self.cp_enabled and self.cp_handler is None:
            self.cp_handler = TorchContextParallelConfig()
        elif self.cp_enabled and not isinstance(self.cp_handler, TorchContextParallelConfig):
            raise ConfigError(
                f"cp_handler is a {type(self.cp_handler).__name__}",
                "give a TorchContextParallelConfig, or leave it out",
            )
        self.device_mesh: Any = None

    @property
    def left_to_the_engine(self) -> list[str]:
        """What the script itself has said about how, and not over how many devices."""
        named: frozenset[str] = vars(self)["_named"]
        return [name for name in super().left_to_the_engine if name in named]

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def _size(self, axis: str) -> int:
        return int(getattr(self, f"{axis}_size"))

    def _larger_than_one(self, axes: tuple[str, ...]) -> list[str]:
        return [axis for axis in axes if self._size(axis) > 1]

    @property
    def total_size(self) -> int:
        """Devices of the job."""
        return self.data_parallel_size * self.non_data_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Groups that get batches of their own."""
        return self._size("dp_replicate") * self._size("dp_shard")

    @property
    def non_data_parallel_size(self) -> int:
        """Devices that share a batch."""
        return self._size("tp") * self._size("cp") * self._size("sp")

    @property
    def dp_replicate_enabled(self) -> bool:
        """Whether parameters are repeated."""
        return self._size("dp_replicate") > 1

    @property
    def dp_shard_enabled(self) -> bool:
        """Whether parameters are shared."""
        return self._size("dp_shard") > 1

    @property
    def tp_enabled(self) -> bool:
        """Whether single layers are shared."""
        return self._size("tp") > 1

    @property
    def cp_enabled(self) -> bool:
        """Whether sequences are shared, by attention over all of them."""
        return self._size("cp") > 1

    @property
    def sp_enabled(self) -> bool:
        """Whether sequences are shared, by heads."""
        return self._size("sp") > 1

    # -- names of dimensions -------------------------------------------------------------------------------------------

    @property
    def dp_dim_names(self) -> list[str]:
        """Dimensions over which batches differ."""
        return self._larger_than_one(_DATA)

    @property
    def non_dp_dim_names(self) -> list[str]:
        """Dimensions over which a batch is shared."""
        return self._larger_than_one(("tp", "cp", "sp"))

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        """Dimensions over which parameters are cut."""
        return self._larger_than_one(_PARAMETERS)

    @property
    def dp_cp_dim_names(self) -> list[str]:
        """Dimensions over which a loss is a mean."""
        return self._larger_than_one(_LOSS)

    @property
    def fsdp_dim_names(self) -> list[str]:
        """Dimensions of torch's FSDP: copies, and the joint one over which parameters are cut."""
        return [*self._larger_than_one(("dp_replicate",)), "dp_shard_cp"]

    @property
    def active_mesh_dims(self) -> list[str]:
        """All dimensions of more than one device."""
        return self.dp_dim_names + self.non_dp_dim_names

    # -- torch's mesh --------------------------------------------------------------------------------------------------

    def _get_mesh(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        names = tuple(self._larger_than_one(_ORDER))
        return names, tuple(self._size(name) for name in names)

    def build_device_mesh(self, device_type: str) -> Any:
        """A new DeviceMesh of the dimensions of more than one device, with joint ones `dp`, `dp_shard_cp` and `dp_cp`; None without any.

        Needs torch, and a process group of `total_size` processes; every process must call it.
        """
        names, sizes = self._get_mesh()
        if not names:
            return None
        joint = {"dp": self.dp_dim_names, "dp_shard_cp": self.dp_shard_cp_dim_names, "dp_cp": self.dp_cp_dim_names}
        return served("named_mesh")(device_type, sizes, names, {name: parts for name, parts in joint.items() if parts})

    def get_device_mesh(self, device_type: str | None = None) -> Any:
        """That mesh, built once. Raises ConfigError without a type of device for the first time, and for another one later."""
        if self.device_mesh is None:
            if device_type is None:
                raise ConfigError("get_device_mesh: there is no mesh yet, and no device_type", "give 'cuda' or 'cpu'")
            self.device_mesh = self.build_device_mesh(device_type)
        elif device_type is not None and self.device_mesh.device_type != device_type:
            raise ConfigError(
                f"get_device_mesh: the mesh is of {self.device_mesh.device_type!r}, not of {device_type!r}",
                "make another ParallelismConfig for the other device",
            )
        return self.device_mesh

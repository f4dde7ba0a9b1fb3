"""Whether and how torch.compile takes prepared models: Accelerate's TorchDynamoPlugin."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyaccel.config.handler import KwargsHandler
from polyaccel.errors import ConfigError, nearest


class DynamoBackend(enum.StrEnum):
    """Accelerate's names of torch.compile backends; the setting compile_backend takes any that torch knows."""

    NO = "NO"
    EAGER = "EAGER"
    AOT_EAGER = "AOT_EAGER"
    INDUCTOR = "INDUCTOR"
    AOT_TS_NVFUSER = "AOT_TS_NVFUSER"
    NVPRIMS_NVFUSER = "NVPRIMS_NVFUSER"
    CUDAGRAPHS = "CUDAGRAPHS"
    OFI = "OFI"
    FX2TRT = "FX2TRT"
    ONNXRT = "ONNXRT"
    TENSORRT = "TENSORRT"
    AOT_TORCHXLA_TRACE_ONCE = "AOT_TORCHXLA_TRACE_ONCE"
    TORCHXLA_TRACE_ONCE = "TORCHXLA_TRACE_ONCE"
    TVM = "TVM"
    HPU_BACKEND = "HPU_BACKEND"
    NEURON = "NEURON"


@dataclass
class TorchDynamoPlugin(KwargsHandler):
    """Settings of torch.compile; every field is the setting `compile_...`, and a backend other than "no" is `compile`.

    Args:
        backend: a torch.compile backend, or "no"; None: not given.
        mode: "default", "reduce-overhead", "max-autotune", or another mode of torch.compile.
        fullgraph: refuse a model that torch.compile cannot take as one graph.
        dynamic: compile for changing shapes, or for each anew; None: torch finds out.
        options: options of the backend, in place of a mode.
        disable: leave models as they are, whatever the other fields say.
        use_regional_compilation: compile the blocks that a model repeats, and the rest, each for itself.

    Raises ConfigError for a backend that Accelerate does not name.
    """

    backend: DynamoBackend | str | None = None
    mode: str | None = None
    fullgraph: bool | None = None
    dynamic: bool | None = None
    options: Mapping[str, Any] | None = None
    disable: bool = False
    use_regional_compilation: bool | None = None

    def __post_init__(self) -> None:
        self.backend = None if self.backend is None else dynamo_backend(self.backend)

    def to_dict(self) -> dict[str, Any]:
        """Every field, copied; the backend in torch's spelling."""
        fields = super().to_dict()
        return {**fields, "backend": None if self.backend is None else str(self.backend).lower()}

    def to_kwargs(self) -> dict[str, Any]:
        """The fields that differ from their defaults and that torch.compile takes."""
        return {name: value for name, value in super().to_kwargs().items() if name != "use_regional_compilation"}

    def settings(self) -> dict[str, Any]:
        """The settings compile and compile_..."""
        given = {name: value for name, value in self.given().items() if value is not None}
        backend, regions = given.pop("backend", None), given.pop("use_regional_compilation", None)
        settings = {f"compile_{name}": value for name, value in given.items() if name != "disable"}
        if backend is not None:
            settings["compile"] = backend != DynamoBackend.NO
            if settings["compile"]:
                settings["compile_backend"] = str(backend).lower()
        if regions is not None:
            settings["compile_regions"] = regions
        if self.disable:
            settings["compile"] = False
        return settings


def dynamo_backend(name: DynamoBackend | str) -> DynamoBackend:
    """The backend of a name in any case. Raises ConfigError for an unknown one."""
    try:
        return DynamoBackend(str(name).upper())
    except ValueError:
        known = [backend.value.lower() for backend in DynamoBackend]
        raise ConfigError(
            f"dynamo backend {str(name)!r} is unknown: {nearest(str(name).lower(), known)}",
            "a backend that you have registered with torch yourself is the setting compile_backend",
        ) from None

"""What the arguments of an Accelerator mean together: settings objects are taken apart into the settings that they name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from polyaccel.config import absent
from polyaccel.config.accumulating import GradientAccumulationPlugin
from polyaccel.config.compiling import TorchDynamoPlugin
from polyaccel.config.exchange import DistributedDataParallelKwargs, InitProcessGroupKwargs
from polyaccel.config.handler import KwargsHandler
from polyaccel.config.loading import DataLoaderConfiguration
from polyaccel.config.numerics import AutocastKwargs, GradScalerKwargs
from polyaccel.config.parallel import FullyShardedDataParallelPlugin, ParallelismConfig, TorchTensorParallelPlugin
from polyaccel.config.profile import ProfileKwargs
from polyaccel.config.resolve import resolve
from polyaccel.config.schema import Config
from polyaccel.errors import ConfigError, UnsupportedError
from polyaccel.mesh import MeshSpec
from polyaccel.sharding.rules import ShardingRule

_SETTINGS = frozenset(field.name for field in fields(Config) if field.name == "mesh" or "help" in field.metadata)
_OBJECTS: Mapping[str, type[KwargsHandler]] = {
    "dataloader_config": DataLoaderConfiguration,
    "gradient_accumulation_plugin": GradientAccumulationPlugin,
    "dynamo_plugin": TorchDynamoPlugin,
    "parallelism_config": ParallelismConfig,
    "fsdp_plugin": FullyShardedDataParallelPlugin,
    "torch_tp_plugin": TorchTensorParallelPlugin,
}
_HANDLERS = (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
)


def config_of_arguments(given: Mapping[str, Any]) -> Config:
    """The Config of a constructor's arguments, by name; those that are None were not given, and others than settings are left alone.

    Raises ConfigError for arguments that contradict each other and for impossible values, UnsupportedError for what no engine has.
    """
    for name in absent.ARGUMENTS:
        if given.get(name) is not None:
            absent.refuse_argument(name)
    taken = _Taken({name: given[name] for name in _SETTINGS if given.get(name) is not None})
    if "sharding_rules" in taken.values:
        taken.values["sharding_rules"] = _texts_of_rules(taken.values["sharding_rules"])
    if taken.values.get("backend") == "auto":
        del taken.values["backend"]
    if taken.values.get("mixed_precision") == "fp8":
        raise UnsupportedError("mixed_precision='fp8' is not supported", "use mixed_precision='bf16'")
    if given.get("dynamo_backend") is not None:
        if given.get("dynamo_plugin") is not None:
            raise ConfigError("dynamo_backend and dynamo_plugin are both given", "give one of the two")
        taken.add("dynamo_backend", TorchDynamoPlugin(given["dynamo_backend"]).settings())
    for handler in handlers_of(given.get("kwargs_handlers")).values():
        taken.add(type(handler).__name__, handler.settings())
    for name, kind in _OBJECTS.items():
        taken.take_apart(name, given.get(name), kind)
    config = resolve(taken.values, origins=taken.origins)
    _check_together(config)
    return replace(config, remarks=tuple(taken.remarks))


def handlers_of(kwargs_handlers: Iterable[Any] | None) -> dict[type[KwargsHandler], KwargsHandler]:
    """The handlers of `Accelerator(kwargs_handlers=...)` by class. Raises ConfigError for two of one, and for others."""
    found: dict[type[KwargsHandler], KwargsHandler] = {}
    for handler in kwargs_handlers or ():
        kind = next((kind for kind in _HANDLERS if isinstance(handler, kind)), None)
        if kind is None:
            raise ConfigError(
                f"kwargs_handlers has a {type(handler).__name__}, which means nothing here",
                f"give objects of: {', '.join(kind.__name__ for kind in _HANDLERS)}",
            )
        if kind in found:
            raise ConfigError(f"kwargs_handlers has two {kind.__name__}", "give one")
        found[kind] = handler
    return found


def profile_settings(kwargs_handlers: Iterable[Any] | None) -> ProfileKwargs:
    """The ProfileKwargs among the handlers, or the default."""
    found = handlers_of(kwargs_handlers).get(ProfileKwargs)
    return found if isinstance(found, ProfileKwargs) else ProfileKwargs()


class _Taken:
    """Settings that arguments name, and which argument named each."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.origins: dict[str, str] = {}
        self.remarks: list[str] = []

    def take_apart(self, argument: str, settings: Any, kind: type[KwargsHandler]) -> None:
        """Add what a settings object names."""
        if settings is None:
            return
        if not isinstance(settings, kind):
            raise ConfigError(f"{argument} is a {type(settings).__name__}", f"give a polyaccel.utils.{kind.__name__}")
        named = settings.settings()
        if left := settings.left_to_the_engine:
            self.remarks.append(f"{argument}: {', '.join(left)}: no effect, the engine decides")
        if isinstance(settings, FullyShardedDataParallelPlugin) and MeshSpec.of(self.values.get("mesh")).fsdp != 1:
            named = {
                name: value for name, value in named.items() if name != "mesh"
            }  # says that, and the mesh given says how
        if isinstance(settings, TorchTensorParallelPlugin) and "mesh" in self.values:
            mesh = MeshSpec.of(self.values["mesh"])
            if mesh.tensor == settings.tp_size:
                return
            if self.origins.get("mesh") == "fsdp_plugin":  # which says -1: all devices that share no layer
                self.values["mesh"] = replace(mesh, tensor=settings.tp_size)
                return
        self.add(argument, named)

    def add(self, argument: str, named: Mapping[str, Any]) -> None:
        """Add settings by name. Raises ConfigError where another argument says otherwise."""
        for name, value in named.items():
            if value is None:
                continue
            if name in self.values and not _are_equal(name, self.values[name], value):
                first = f" of {self.origins[name]}" if name in self.origins else ""
                raise ConfigError(
                    f"{name}={self.values[name]!r}{first} contradicts {argument}, which says {name}={value!r}",
                    "give one of the two",
                )
            if name not in self.values:
                self.values[name], self.origins[name] = value, argument


def _are_equal(name: str, one: Any, other: Any) -> bool:
    return MeshSpec.of(one) == MeshSpec.of(other) if name == "mesh" else bool(one == other)


def _texts_of_rules(rules: Any) -> tuple[str, ...]:
    if isinstance(rules, (str, ShardingRule)) or not isinstance(rules, Iterable):
        raise ConfigError(f"sharding_rules={rules!r} is no list", "give a list: sharding_rules=[ShardingRule(...)]")
    return tuple(str(ShardingRule.of(rule)) for rule in rules)


def _check_together(config: Config) -> None:
    """Raises ConfigError for settings that are possible one by one and not together."""
    _ = config.precision  # raises for a scale that cannot be
    _ = config.parameter_rules  # raises for a text that is no rule
    if config.compile_options and config.compile_mode != "default":
        raise ConfigError(
            f"compile_mode={config.compile_mode!r} and compile_options={dict(config.compile_options)!r} are both given",
            "torch.compile takes one of the two",
        )
    if config.ddp_comm_wrapper != "no" and config.ddp_comm_hook == "no":
        raise ConfigError(
            f"ddp_comm_wrapper={config.ddp_comm_wrapper!r} wraps nothing: ddp_comm_hook is 'no'",
            f"use ddp_comm_hook={config.ddp_comm_wrapper!r}",
        )
    if config.ddp_comm_state_option and "power_sgd" not in config.ddp_comm_hook:
        raise ConfigError(
            f"ddp_comm_state_option={dict(config.ddp_comm_state_option)!r} are options of PowerSGD,"
            f" and ddp_comm_hook is {config.ddp_comm_hook!r}",
            "use ddp_comm_hook='power_sgd', or leave the options out",
        )

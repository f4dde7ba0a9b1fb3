"""What the arguments of an Accelerator mean together: settings objects are taken apart into the settings that they name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from polyaccel.config.accumulating import GradientAccumulationPlugin
from polyaccel.config.handler import KwargsHandler
from polyaccel.config.loading import DataLoaderConfiguration
from polyaccel.config.pending import refuse_pending
from polyaccel.config.resolve import resolve
from polyaccel.config.schema import Config
from polyaccel.errors import ConfigError

_SETTINGS = frozenset(field.name for field in fields(Config)) - {"sources"}
# Fields of settings objects whose setting has another name.
_RENAMED = {("gradient_accumulation_plugin", "num_steps"): "gradient_accumulation_steps"}
_OBJECTS: Mapping[str, type[KwargsHandler]] = {
    "dataloader_config": DataLoaderConfiguration,
    "gradient_accumulation_plugin": GradientAccumulationPlugin,
}


def config_of_arguments(given: Mapping[str, Any]) -> Config:
    """The Config of a constructor's arguments, by name; those that are None were not given, and others than settings are left alone.

    Raises ConfigError for arguments that contradict each other, and for impossible values.
    """
    arguments = {name: given[name] for name in _SETTINGS if given.get(name) is not None}
    if arguments.get("backend") == "auto":
        del arguments["backend"]
    for name in _OBJECTS:
        _take_apart(name, given.get(name), arguments)
    config = resolve(arguments)
    refuse_pending(config)
    return config


def _take_apart(argument: str, settings: Any, arguments: dict[str, Any]) -> None:
    """Add the settings that an object names to the arguments."""
    if settings is None:
        return
    expected = _OBJECTS[argument]
    if not isinstance(settings, expected):
        raise ConfigError(f"{argument} is a {type(settings).__name__}", f"give a polyaccel.utils.{expected.__name__}")
    for field, value in settings.given().items():
        name = _RENAMED.get((argument, field), field)
        if value is None:
            continue
        if arguments.get(name, value) != value:
            raise ConfigError(
                f"{name}={arguments[name]!r} contradicts {argument}, whose {field} is {value!r}", "give one of the two"
            )
        arguments[name] = value

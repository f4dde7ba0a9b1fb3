"""What was asked for: a frozen, typed Config in which every value knows its source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyaccel.config.schema import Config as Config

__all__ = ["Config"]


def __getattr__(name: str) -> Any:
    # On first use: most subcommands' help needs nothing of this package, and `launch` only the names of the settings.
    if name != "Config":
        raise AttributeError(f"module 'polyaccel.config' has no attribute {name!r}")
    from polyaccel.config.schema import Config

    return Config

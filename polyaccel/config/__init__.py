"""What was asked for: a frozen, typed Config in which every value knows its source."""

from polyaccel.config.resolve import resolve
from polyaccel.config.schema import Config

__all__ = ["Config", "resolve"]

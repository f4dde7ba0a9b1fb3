"""The base of settings objects that the Accelerator takes: dataclasses that know which of their fields were given."""

from __future__ import annotations

import copy
from dataclasses import MISSING, fields
from typing import Any, Self


class KwargsHandler:
    """A dataclass whose fields all have defaults. A field that was not given comes from environment, file or default, like any setting."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        # Beside the fields: a default that was written down in the script counts as given, one that was left alone does not.
        object.__setattr__(self, "_named", frozenset(_names(cls)[: len(args)]) | kwargs.keys())
        return self

    def to_dict(self) -> dict[str, Any]:
        """Every field, copied."""
        return {name: copy.deepcopy(getattr(self, name)) for name in _names(type(self))}

    def to_kwargs(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        defaults = _defaults(type(self))
        return {name: value for name, value in self.to_dict().items() if defaults[name] != value}

    def given(self) -> dict[str, Any]:
        """The fields that the script named, or changed since."""
        named: frozenset[str] = vars(self).get("_named", frozenset())
        values = {name: (getattr(self, name), default) for name, default in _defaults(type(self)).items()}
        return {name: value for name, (value, default) in values.items() if name in named or value != default}

    def settings(self) -> dict[str, Any]:
        """The settings that the given fields mean, by name."""
        return self.given()


def _names(cls: Any) -> list[str]:
    return [field.name for field in fields(cls)]


def _defaults(cls: Any) -> dict[str, Any]:
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls)}

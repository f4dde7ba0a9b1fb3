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
        changed = self._changed()
        return {name: value for name, value in self.to_dict().items() if name in changed}

    def given(self) -> dict[str, Any]:
        """The fields that the script named, or changed since."""
        named: frozenset[str] = vars(self).get("_named", frozenset())
        shown = named | self._changed()
        return {name: getattr(self, name) for name in _names(type(self)) if name in shown}

    def settings(self) -> dict[str, Any]:
        """The settings that the given fields mean, by name."""
        return self.given()

    @property
    def left_to_the_engine(self) -> list[str]:
        """The given fields that have no effect, as every engine decides for itself what they say."""
        return []

    def _changed(self) -> set[str]:
        return {name for name, default in self._defaults().items() if getattr(self, name) != default}

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        settings: Any = cls
        return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(settings)}


def _names(cls: Any) -> list[str]:
    return [field.name for field in fields(cls)]

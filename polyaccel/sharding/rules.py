"""A rule: which mesh axis cuts which dim of the parameters that a pattern names. A value, read from arguments and from texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from polyaccel.errors import ConfigError, nearest

Spec = tuple[str | None, ...]  # of one parameter: per dim the mesh axis that cuts it, or None

CUTTING_AXES = ("fsdp", "tensor")  # the others repeat parameters
_REPEATING_AXES = ("replica", "data", "sequence")
_WHOLE, _UNCUT = "whole", "-"


@dataclass(frozen=True, slots=True)
class ShardingRule:
    """Parameters whose name matches `pattern` are cut along their dims by these mesh axes; of several rules the first counts.

    pattern: a glob over parameter names, in which `*` matches dots too: `"*.q_proj.weight"` (also where nothing comes before it).
    axes: per dim `"tensor"`, `"fsdp"` or None; dims that are left out at the end are None. What no rule cuts over `fsdp` is cut there
        along its largest dim that divides. `axes=None`: whole on every device.

    As a text, in a file, the environment or a flag: `"*.q_proj.weight = tensor -"`, and `"*.router.weight = whole"`.
    """

    pattern: str
    axes: Spec | None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern.strip():
            raise ConfigError(
                f"sharding rule pattern {self.pattern!r} names no parameter", 'write for example "*.q_proj.weight"'
            )
        if self.axes is None:
            return
        if isinstance(self.axes, str):
            raise ConfigError(
                f"sharding rule {self.pattern!r}: axes={self.axes!r} is a text",
                f"give one entry per dim: ({self.axes!r}, None)",
            )
        object.__setattr__(self, "axes", tuple(self.axes))
        for axis in self.axes:
            self._check_axis(axis)
        named = [axis for axis in self.axes if axis is not None]
        if len(set(named)) < len(named):
            raise ConfigError(
                f"sharding rule {self.pattern!r} uses one mesh axis for two dims: {self.axes}", "name each axis once"
            )

    def _check_axis(self, axis: object) -> None:
        if axis is None or axis in CUTTING_AXES:
            return
        if axis in _REPEATING_AXES:
            raise ConfigError(
                f"sharding rule {self.pattern!r} names the mesh axis {axis!r}, over which parameters are repeated",
                f"parameters are cut over: {', '.join(CUTTING_AXES)}",
            )
        raise ConfigError(
            f"sharding rule {self.pattern!r} names the mesh axis {axis!r}, which is unknown",
            nearest(str(axis), CUTTING_AXES),
        )

    @classmethod
    def of(cls, value: ShardingRule | str) -> ShardingRule:
        """A rule from what a user writes: a rule, or its text. Raises ConfigError."""
        if isinstance(value, ShardingRule):
            return value
        if not isinstance(value, str):
            raise ConfigError(
                f"sharding_rules has a {type(value).__name__}", 'give ShardingRule(pattern, axes), or "pattern = axes"'
            )
        pattern, equals, axes = value.rpartition("=")
        if not equals or not axes.split():
            raise ConfigError(
                f"sharding rule {value!r} says of no dim how it is cut",
                'write for example "*.q_proj.weight = tensor -"',
            )
        if axes.split() == [_WHOLE]:
            return cls(pattern.strip(), None)
        return cls(pattern.strip(), tuple(None if axis == _UNCUT else axis for axis in axes.split()))

    def __str__(self) -> str:
        axes = _WHOLE if self.axes is None else " ".join(axis or _UNCUT for axis in self.axes or (None,))
        return f"{self.pattern} = {axes}"

    def matches(self, name: str) -> bool:
        """Whether this rule is about a parameter."""
        return matches(self.pattern, name)


def matches(pattern: str, name: str) -> bool:
    """Whether a glob matches a dotted name; a leading `*.` also stands for nothing at all."""
    return fnmatchcase(name, pattern) or (pattern.startswith("*.") and fnmatchcase(name, pattern[2:]))


def first_match(rules: Iterable[ShardingRule], name: str) -> ShardingRule | None:
    """The rule that counts for a parameter."""
    return next((rule for rule in rules if rule.matches(name)), None)

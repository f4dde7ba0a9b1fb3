"""Settings that are declared and not honoured yet. Each is refused where it would change something: none is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyaccel.config.schema import Config
from polyaccel.errors import UnsupportedError

# Setting -> (the values that change nothing, what to do instead). Whoever implements a setting takes its line out.
PENDING: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "prefetch_batches": ((2,), "leave it out"),
}


def refuse_pending(config: Config) -> None:
    """Raises UnsupportedError for a setting of `PENDING` whose value would change something."""
    for name, (neutral, instead) in PENDING.items():
        value = getattr(config, name)
        if value not in neutral:
            source = config.sources.get(name, "default")
            raise UnsupportedError(f"{name}={value!r} ({source}) is not supported yet", instead)

"""Settings that are declared and not honoured yet. Each is refused where it would change something: none is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyaccel.config.schema import Config
from polyaccel.errors import UnsupportedError

# Setting -> (the values that change nothing, what to do instead). Whoever implements a setting takes its line out.
PENDING: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "dispatch_batches": ((None, False), "leave it out: every process reads the data and keeps its own part"),
    "use_seedable_sampler": ((False,), "leave it out: a checkpoint continues the loader's order exactly without it"),
    "data_seed": ((None,), "leave it out, and seed the order with set_seed"),
    "use_stateful_dataloader": ((False,), "leave it out: every prepared loader has a state, which checkpoints keep"),
    "non_blocking": ((False,), "leave it out"),
    "prefetch_batches": ((2,), "leave it out"),
}


def refuse_pending(config: Config) -> None:
    """Raises UnsupportedError for a setting of `PENDING` whose value would change something."""
    for name, (neutral, instead) in PENDING.items():
        value = getattr(config, name)
        if value not in neutral:
            source = config.sources.get(name, "default")
            raise UnsupportedError(f"{name}={value!r} ({source}) is not supported yet", instead)

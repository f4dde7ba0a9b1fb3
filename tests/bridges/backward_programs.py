"""The compiled backward programs of an engine, for what their compiler counts."""

from __future__ import annotations

from typing import Any


def kept_by(engine: Any) -> dict[Any, Any]:
    """Filled as the engine trains: each program is compiled once, and used for the steps too."""
    run = engine.compiles.run
    compiled: dict[Any, Any] = {}

    def counted(function: Any, *args: Any) -> Any:
        if len(args) < 7:  # not the backward program
            return run(function, *args)
        if function not in compiled:
            compiled[function] = function.lower(*args).compile()
        return compiled[function](*args)

    engine.compiles.run = counted
    return compiled

"""jax's persistent compilation cache, on by default: a second start of the same script compiles nothing."""

from __future__ import annotations

from pathlib import Path

import jax

from polyaccel.config.resolve import user_cache_folder

# Everything is kept: small programs are what a training script has most of. A user's own setting of any of these wins.
_SETTINGS = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": 0}
_DEFAULTS = {"jax_persistent_cache_min_compile_time_secs": 1.0, "jax_persistent_cache_min_entry_size_bytes": 0}


def enable(setting: str) -> Path | None:
    """Turn the cache on at `setting` ("auto": the user's cache folder; "off"; or a folder); returns the folder in use.

    A folder that the user gave to jax itself stays.
    """
    if setting == "off":
        return None
    given: str | None = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 - jax declares its settings at run time
    if given:
        return Path(given)
    folder = user_cache_folder() / "jax" if setting == "auto" else Path(setting).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value in _SETTINGS.items():
        if getattr(jax.config, name) == _DEFAULTS[name]:
            jax.config.update(name, value)
    return folder

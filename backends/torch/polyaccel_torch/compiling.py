"""torch.compile around a prepared model, or inside it, as the settings compile_... ask for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from polyaccel_torch.dialect.regions import compile_regions

if TYPE_CHECKING:
    from polyaccel.config import Config


def compiled(module: nn.Module, config: Config) -> nn.Module:
    """A compiled module around this one, or with `compile_regions` this one, compiled inside."""
    options: dict[str, Any] = {
        "backend": config.compile_backend,
        "fullgraph": config.compile_fullgraph,
        "dynamic": config.compile_dynamic,
    }
    if config.compile_options:
        options["options"] = dict(config.compile_options)
    elif config.compile_mode != "default":
        options["mode"] = config.compile_mode
    if config.compile_regions:
        compile_regions(module, **options)
        return module
    whole: Any = torch.compile(module, **options)
    return cast("nn.Module", whole)

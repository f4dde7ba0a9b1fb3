"""What each ATen operation is in jnp, one file per family; importing this package fills the table in `table.py`."""

from importlib import import_module
from pkgutil import iter_modules

from . import promotion
from .table import LOWERINGS, Lowering, lowering_of

__all__ = ["LOWERINGS", "Lowering", "lowering_of", "promotion"]

for _family in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_family}")

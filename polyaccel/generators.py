"""The random generators of the host: python's, numpy's and torch's, as plain values that a file can hold and a later process continues.

Scripts and loaders draw from them on every engine; what an engine draws from on its devices is the engine's own.
"""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Mapping
from typing import Any

State = dict[str, Any]  # generator name -> plain values and bytes


def read() -> State:
    """The states of now; a framework that is not loaded is left out."""
    version, words, gauss = random.getstate()
    state: State = {"python": {"version": version, "words": struct.pack(f"<{len(words)}I", *words), "gauss": gauss}}
    if "numpy" in sys.modules:
        kind, key, position, has_gauss, gauss = sys.modules["numpy"].random.get_state()
        state["numpy"] = {
            "kind": str(kind),
            "key": key.astype("<u4").tobytes(),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        }
    if "torch" in sys.modules:
        state["torch"] = sys.modules["torch"].get_rng_state().numpy().tobytes()
    return state


def write(state: Mapping[str, Any]) -> None:
    """Continue from states that `read` gave, here or in another process; generators that are not named stay as they are."""
    if "python" in state:
        python = state["python"]
        words = struct.unpack(f"<{len(python['words']) // 4}I", python["words"])
        random.setstate((python["version"], words, python["gauss"]))
    if "numpy" in state:
        import numpy as np

        one = state["numpy"]
        key = np.frombuffer(one["key"], "<u4").astype(np.uint32)
        np.random.set_state((one["kind"], key, one["position"], one["has_gauss"], one["gauss"]))
    if "torch" in state and "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_rng_state(torch.frombuffer(bytearray(state["torch"]), dtype=torch.uint8))


def restart(seed: int, names: frozenset[str]) -> None:
    """Start these generators anew from a seed."""
    if "python" in names:
        random.seed(seed)
    if "numpy" in names and "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    if "torch" in names and "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.default_generator.manual_seed(seed)

"""TPUs as torch devices, through torch_tpu (TorchTPU): one process per device, as on GPUs.

Written against torch_tpu 0.2.0 as its package and its examples say, and NOT RUN ON A TPU: `polyaccel test --backend torch` does that.
torch loads it by itself (entry point `torch.backends`) where it finds chips, and it is there as `torch.tpu` then.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from polyaccel.errors import LaunchError
from polyaccel.tpus import num_local_chips

if TYPE_CHECKING:
    import torch

PROCESS_GROUP = "tpu_dist"  # its backend of torch.distributed
_DEADLINE_S = 330  # it waits up to 300 s for the coordinates of the chips


def is_installed() -> bool:
    """Whether torch_tpu is there, on a machine with chips. Imports nothing."""
    return num_local_chips() > 0 and importlib.util.find_spec("torch_tpu") is not None


def num_devices() -> int:
    """Devices that torch can compute on, those of this machine. Imports torch where there is something to ask."""
    if not is_installed():
        return 0
    module = _module()
    return 0 if module is None else int(module.device_count())


def is_in_use() -> bool:
    """Whether this process has begun to use its device, which a fork does not survive."""
    module = _module() if "torch" in sys.modules and is_installed() else None
    return module is not None and bool(module.is_initialized())


def launch_environment() -> dict[str, str]:
    """What all processes of this machine have to agree on before they start, as torch_tpu's own command tells it.

    Raises LaunchError where that command fails.
    """
    command = [sys.executable, "-m", "torch.tpu.distributed"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        words = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise LaunchError(
            f"torch_tpu could not prepare this machine's TPUs: {words[-1] if words else error}",
            f"run it by hand: {shlex.join(command)}",
        ) from error
    told = dict(part.split("=", 1) for part in shlex.split(done.stdout) if "=" in part)
    chosen = {name: value for name, value in told.items() if name.startswith("TORCH_TPU_")}
    return {**chosen, "GROUP_RANK": told.get("NODE_RANK") or "0"}


def current_device() -> torch.device:
    """This process's device. In a job of several processes torch_tpu knows it once they have met."""
    import torch

    return torch.device("tpu", torch.accelerator.current_device_index())


def device_name(device: torch.device) -> str:
    """What the driver calls it."""
    return str(_module().get_device_name(device))


def read_random() -> bytes:
    """The state of this device's generator."""
    state: Any = _module().get_rng_state()
    return bytes(state.cpu().numpy().tobytes())


def write_random(state: bytes) -> None:
    """Continue with this state."""
    import torch

    _module().set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _module() -> Any:
    """`torch.tpu`; None where torch has not loaded it, as with TORCH_DEVICE_BACKEND_AUTOLOAD=0."""
    import torch

    return getattr(torch, "tpu", None)

"""A PrecisionPolicy in torch: autocast for the forward pass, and GradScaler for the loss with one scale per update window."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from polyaccel.errors import UnsupportedError
from polyaccel.precision import LossScaling, PrecisionPolicy
from polyaccel_torch.dialect.modules import Autocast

_LARGEST = torch.finfo(torch.float32).max  # a scale that would overflow stays


def autocast_of(policy: PrecisionPolicy, device: torch.device, *, cache: bool = True) -> Autocast | None:
    """A factory of autocast contexts in the policy's narrow dtype, None for float32. Raises UnsupportedError for float16 on a TPU."""
    if policy.name == "no":
        return None
    if device.type == "tpu" and policy.name == "fp16":
        raise UnsupportedError("mixed_precision='fp16' on a TPU, which has no products in float16", "use 'bf16'")
    return functools.partial(
        torch.autocast, device.type, dtype=getattr(torch, policy.narrow_dtype), cache_enabled=cache
    )


class LossScaler:
    """torch.amp.GradScaler for any number of optimizers.

    The scale changes at the first backward after an update and never in between: gradients that several backward passes or
    several optimizers add up were all scaled alike. Gradients of an optimizer are unscaled once per update. `make` makes the GradScaler.
    """

    def __init__(
        self,
        scaling: LossScaling,
        device: torch.device,
        make: Callable[..., torch.amp.GradScaler] = torch.amp.GradScaler,
    ) -> None:
        self.scaler = make(
            device.type,
            init_scale=scaling.init_scale,
            growth_factor=scaling.growth_factor,
            backoff_factor=scaling.backoff_factor,
            growth_interval=scaling.growth_interval,
        )
        self._stepped: set[int] = set()
        self._unscaled: set[int] = set()
        self._overflow: dict[int, list[torch.Tensor]] = {}

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the scale, to be differentiated."""
        self.finish_update()
        return self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, unless that happened since its last step."""
        key = id(optimizer)
        if key not in self._unscaled and key not in self._stepped:
            self.scaler.unscale_(optimizer)
            self._unscaled.add(key)

    def step(self, optimizer: Optimizer, closure: Any) -> None:
        """Update the parameters, or leave them where a gradient is not finite."""
        if closure is not None:
            raise UnsupportedError(
                f"{type(optimizer).__name__}.step(closure) cannot be combined with mixed_precision='fp16'",
                "use mixed_precision='bf16' or 'no', or step without a closure",
            )
        key = id(optimizer)
        if key in self._stepped:
            self.finish_update()
        self.scaler.step(optimizer)
        self._stepped.add(key)
        # GradScaler tells nobody which optimizer it skipped. The flags stay on the device: only who asks waits for them.
        self._overflow[key] = list(self.scaler._found_inf_per_device(optimizer).values())

    def was_skipped(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer's last step left the parameters alone. Waits for the device."""
        return any(flag.item() for flag in self._overflow.get(id(optimizer), ()))

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def factor(self) -> float:
        """What gradients that wait for their optimizer were multiplied by. Waits for the device."""
        return float(self.scaler.get_scale())

    def read(self) -> dict[str, float | int]:
        """Scale and number of good updates in a row, as they will be at the next backward pass. Changes nothing."""
        scaler = self.scaler
        scale, good = float(scaler.get_scale()), int(scaler._get_growth_tracker())
        if self._stepped:
            if any(flag.item() for key in self._stepped for flag in self._overflow[key]):
                return {"scale": scale * scaler.get_backoff_factor(), "growth_tracker": 0}
            good += 1
            if good == scaler.get_growth_interval():
                grown = scale * scaler.get_growth_factor()
                return {"scale": grown if grown <= _LARGEST else scale, "growth_tracker": 0}
        return {"scale": scale, "growth_tracker": good}

    def write(self, state: Mapping[str, float | int]) -> None:
        """Continue from what `read` gave, with no update begun."""
        own = {"scale": float(state["scale"]), "_growth_tracker": int(state["growth_tracker"])}
        self.scaler.load_state_dict({**self.scaler.state_dict(), **own})
        self.scaler._per_optimizer_states.clear()
        self._stepped.clear()
        self._unscaled.clear()
        self._overflow.clear()

    def finish_update(self) -> None:
        """Adapt the scale to what the last steps found; nothing without a step since."""
        if self._stepped:
            self.scaler.update()
            self._stepped.clear()
            self._unscaled.clear()

"""torch.optim optimizers without an engine: what user code holds after prepare, whose parameters they are, and fused kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from polyaccel.errors import PrepareError
from polyaccel.prepared import OptimizerHandle

Update = Callable[[Optimizer, Any], Any]


class GradientWindow(Protocol):
    """What an optimizer asks of gradient accumulation: is this micro batch's step a real one?"""

    sync_gradients: bool
    window_weights: Any


class PreparedOptimizer(Optimizer, OptimizerHandle):
    """The optimizer that user code holds: `step` and `zero_grad` do nothing while gradients accumulate.

    It shares `param_groups`, `state` and `defaults` with `optimizer`, the user's own, and shows its other attributes too.
    `update(optimizer, closure)` replaces `optimizer.step(closure)` where an engine has to do more; `skipped()` tells whether the
    last real step was left out; `dropped(optimizer)` drops gradients that the parameters do not show.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        window: GradientWindow | None,
        *,
        update: Update | None = None,
        skipped: Callable[[], bool] | None = None,
        dropped: Callable[[Optimizer], None] | None = None,
    ) -> None:
        # Optimizer.__init__ is not called: it would make groups and state of its own.
        self.optimizer = optimizer
        self._window = window
        self._update = update
        self._skipped = skipped
        self._dropped = dropped
        self._takes_set_to_none = "set_to_none" in inspect.signature(optimizer.zero_grad).parameters

    def step(self, closure: Any = None) -> Any:
        """Update the parameters, if this micro batch closes the accumulation window."""
        window = self._window
        if window is not None and not window.sync_gradients:
            return None
        self._told_overflow = None
        if window is not None:
            window.window_weights = None  # the window ends here
        if self._update is not None:
            return self._update(self.optimizer, closure)
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, if this micro batch closes the accumulation window."""
        window = self._window
        if window is not None:
            if not window.sync_gradients:
                return
            window.window_weights = None
        if self._takes_set_to_none:
            self.optimizer.zero_grad(set_to_none)
        else:
            self.optimizer.zero_grad()
        if self._dropped is not None:
            self._dropped(self.optimizer)

    @property
    def step_was_skipped(self) -> bool:
        """True if gradients were not finite at the last real step (fp16) and the parameters were left as they were."""
        told = self._told_overflow
        return told if told is not None else self._skipped is not None and self._skipped()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the user's optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The state of the user's optimizer."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the user's optimizer."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the user's optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The state of the user's optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the user's optimizer."""
        self.optimizer.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer" or name.startswith("__"):  # not there yet while being copied
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"Prepared{self.optimizer!r}"

    # A copy or pickle carries the optimizer; the accumulation window and the loss scale belong to the engine it came from.
    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["optimizer"], None)  # type: ignore[misc]


def check_parameters(optimizer: Optimizer, modules: Sequence[nn.Module]) -> None:
    """Raises PrepareError, naming group and position, for an optimizer parameter that belongs to none of `modules`."""
    known = {id(parameter) for module in modules for parameter in module.parameters()}
    names = " or ".join(sorted({type(module).__name__ for module in modules}))
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in known:
                raise PrepareError(
                    f"{type(optimizer).__name__}.param_groups[{index}]['params'][{position}], of shape {tuple(parameter.shape)},"
                    f" is no parameter of the prepared {names}",
                    "build the optimizer from the model that is prepared: its gradients would never arrive otherwise",
                )


def named_parameters(optimizer: Optimizer, modules: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by their names in `modules`, in the optimizer's order.

    With several modules all names begin with `model_<index>.`. Raises PrepareError as `check_parameters`.
    """
    check_parameters(optimizer, modules)
    names: dict[int, str] = {}
    for index, module in enumerate(modules):
        prefix = f"model_{index}." if len(modules) > 1 else ""
        for name, parameter in module.named_parameters():
            names.setdefault(id(parameter), prefix + name)
    return {names[id(parameter)]: parameter for group in optimizer.param_groups for parameter in group["params"]}


def use_fused_kernels(optimizer: Optimizer, modules: Iterable[nn.Module]) -> bool:
    """Switch an optimizer to torch's fused kernels where the user left the choice to torch; True if it was switched.

    Same formula, equal within rounding, one kernel for all parameters. Only torch's own SGD, Adam, AdamW and (on CPU) Adagrad,
    with float tensors on a device that has the kernels and no sparse gradients.
    """
    kind = type(optimizer)
    if kind not in (SGD, Adam, AdamW, Adagrad) or not _counts_steps_as_kernels_do(optimizer):
        return False
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    devices = {parameter.device.type for parameter in parameters}
    has_kernels = devices == {"cpu"} or (devices == {"cuda"} and kind is not Adagrad)
    has_plain_tensors = all(type(p) in (nn.Parameter, torch.Tensor) and p.is_floating_point() for p in parameters)
    if not has_kernels or not has_plain_tensors or any(_has_sparse_gradients(module) for module in modules):
        return False
    for group in optimizer.param_groups:
        is_open = group.get("foreach") is None and group.get("fused", False) is None
        if (
            not is_open
            or group.get("differentiable")
            or group.get("capturable")
            or isinstance(group["lr"], torch.Tensor)
        ):
            return False
    for group in optimizer.param_groups:
        group["fused"] = True
    # What the constructors do for fused=True: GradScaler then hands scale and overflow flag to the kernel.
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    return True


def _counts_steps_as_kernels_do(optimizer: Optimizer) -> bool:
    """The kernels want step counters in float32 beside the parameter; state from an earlier run may have them elsewhere."""
    steps = [(p, state["step"]) for p, state in optimizer.state.items() if "step" in state]
    return all(
        isinstance(step, torch.Tensor) and step.dtype == torch.float32 and step.device == p.device for p, step in steps
    )


def _has_sparse_gradients(module: nn.Module) -> bool:
    return any(getattr(part, "sparse", False) for part in module.modules())

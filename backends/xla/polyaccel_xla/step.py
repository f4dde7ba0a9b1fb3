"""One graph per step: what a prepared model and optimizer do so that the lazily traced work ends where a step ends.

A step is traced, not run, until `flush`; whatever is still referenced then becomes an output of the graph. So a step flushes once,
after its update, and the user's reads (`loss.item()`) find finished values instead of compiling parts of the step again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from polyaccel import trees
from polyaccel.errors import PrepareError
from polyaccel.protocols import LossCall, StepSpec
from polyaccel_xla.hyperparameters import DeviceHyperparameters
from polyaccel_xla.spmd import Placement

Flush = Callable[[], None]


class PreparedForward:
    """A module's `forward` in the plan's precision: inside autocast, with outputs of lower precision cast to float32.

    Without gradients the outputs are computed right away: metrics made of them one by one would each run the model again.
    """

    def __init__(
        self, module: torch.nn.Module, autocast: Callable[[], AbstractContextManager[Any]], *, casts: bool, flush: Flush
    ) -> None:
        self._module = module
        self._autocast = autocast
        self._casts = casts
        self._flush = flush

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self._module).forward
        if self._casts:
            with self._autocast():
                outputs = forward(self._module, *args, **kwargs)
            outputs = trees.map_leaves(_to_float32, outputs)
        else:
            outputs = forward(self._module, *args, **kwargs)
        if not torch.is_grad_enabled():
            self._flush()
        return outputs


def install_forward(module: torch.nn.Module, forward: PreparedForward) -> None:
    """Make calls of this one module go through `forward`; its class, its names and its state stay as they are."""
    vars(module)["forward"] = forward


def remove_forward(module: torch.nn.Module) -> None:
    """Undo `install_forward`."""
    if isinstance(vars(module).get("forward"), PreparedForward):
        del vars(module)["forward"]


class SpmdOptimizer(torch.optim.Optimizer):
    """The optimizer that user code steps. Groups and state are those of the optimizer inside, `.optimizer`.

    `step` and `zero_grad` do nothing while gradients are being accumulated. Numbers that a schedule changes are data of
    the graph (see `hyperparameters`), and every step is one graph.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, placement: Placement, *, is_syncing: Callable[[], bool], flush: Flush
    ) -> None:
        # The base constructor is left out on purpose: it would make groups and hooks of its own.
        self.optimizer = optimizer
        self.step_was_skipped = False
        self._hyperparameters = DeviceHyperparameters(placement.upload_scalar, placement.upload)
        self._placement = placement
        self._is_syncing = is_syncing
        self._flush = flush

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the optimizer inside."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the optimizer inside, by parameter."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the optimizer inside."""
        return self.optimizer.defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters and start the step's graph; nothing while accumulating."""
        if not self._is_syncing():
            return None
        result = self.update(closure)
        self._flush()
        return result

    def update(self, closure: Callable[[], Any] | None = None) -> Any:
        """Trace the update without starting it."""
        hyperparameters = self._hyperparameters
        with hyperparameters:
            if closure is None:
                return self.optimizer.step()
            return self.optimizer.step(hyperparameters.outside(closure))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; nothing while accumulating."""
        if self._is_syncing():
            self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of prepared parameters."""
        self.optimizer.add_param_group(param_group)
        check_parameters(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer inside, on the devices."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict` gave, on any engine."""
        self.optimizer.load_state_dict(state_dict)
        place_optimizer_state(self.optimizer, self._placement)

    def train(self) -> None:
        """Training mode of optimizers that have modes (schedule-free ones)."""
        _call_if_there(self.optimizer, "train")

    def eval(self) -> None:
        """Evaluation mode of optimizers that have modes."""
        _call_if_there(self.optimizer, "eval")

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet while being copied
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"SpmdOptimizer({self.optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        raise PrepareError("a prepared optimizer belongs to its process", "save optimizer.state_dict()")


def check_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Raises PrepareError when an optimizer updates parameters that are not on the devices."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stray = [parameter for parameter in parameters if parameter.device.type != "xla"]
    if stray:
        shapes = ", ".join(str(tuple(parameter.shape)) for parameter in stray[:3])
        raise PrepareError(
            f"the {type(optimizer).__name__} updates {len(stray)} of its {len(parameters)} parameters (shapes {shapes}"
            f"{', ...' if len(stray) > 3 else ''}) on no prepared model",
            "prepare the model that the optimizer was made for, together with it or before it",
        )


def adapt_groups(optimizer: torch.optim.Optimizer) -> None:
    """Choose the implementation of torch.optim that can be traced: `foreach` traces an update in a few calls.

    Fused kernels exist for other devices only. The update is the same in all three.
    """
    for group in (optimizer.defaults, *optimizer.param_groups):
        if group.get("fused"):
            group["fused"] = None
        if "foreach" in group and group["foreach"] is None and not isinstance(group.get("lr"), torch.Tensor):
            group["foreach"] = not group.get("differentiable", False)


def place_optimizer_state(optimizer: torch.optim.Optimizer, placement: Placement) -> None:
    """Move what the optimizer remembers to its parameters. Step counters stay on the host, where torch.optim reads them."""
    capturable = {id(p) for group in optimizer.param_groups if group.get("capturable") for p in group["params"]}
    for parameter, state in optimizer.state.items():
        if not isinstance(state, dict):
            continue
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or (name == "step" and id(parameter) not in capturable):
                continue
            state[name] = placement.replicate(value) if value.device.type == "xla" else placement.upload(value)


def differentiate(call: LossCall, scale: float) -> Any:
    """Run a loss function and add `scale` times its gradients; returns what it returned, detached."""
    with torch.enable_grad():
        result = call.function(*call.args, **call.kwargs)
    loss = result[0] if isinstance(result, tuple) else result
    if not isinstance(loss, torch.Tensor):
        raise PrepareError(
            f"the loss function returned a {type(loss).__name__} where a loss was expected",
            "return a scalar tensor, or (loss, auxiliary values)",
        )
    scaled(loss, scale).backward()
    return trees.map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, result)


def scaled(loss: torch.Tensor, scale: float) -> torch.Tensor:
    """The loss times `scale`, untouched at 1."""
    return loss if scale == 1.0 else loss * scale


def fused_step(spec: StepSpec, *, flush: Flush) -> Callable[[Any, bool], Any]:
    """The whole step as one graph: gradients are dropped before it starts, so that they are no outputs of it."""
    optimizer: SpmdOptimizer = spec.optimizer
    parameters = [parameter for parameter in spec.model.parameters() if parameter.requires_grad]

    def step(batch: Any, sync: bool) -> Any:
        result = differentiate(LossCall(spec.loss_fn, (spec.public_model, batch), {}), spec.scale)
        if sync:
            if spec.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)
            optimizer.update()
            optimizer.optimizer.zero_grad()
        flush()
        return _named(result)

    return step


def _named(result: Any) -> Any:
    if not isinstance(result, tuple):
        return result
    loss, aux = result
    return {"loss": loss, **aux} if isinstance(aux, dict) else {"loss": loss, "aux": aux}


def _to_float32(leaf: Any) -> Any:
    is_low = isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bfloat16, torch.float16)
    return leaf.float() if is_low else leaf


def _call_if_there(optimizer: Any, name: str) -> None:
    method = getattr(optimizer, name, None)
    if callable(method):
        method()

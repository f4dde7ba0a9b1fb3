"""One graph per step: where the lazily traced work of forward, backward and update ends, and what it leaves behind.

A step is traced, not run, until `torch_xla.sync`; whatever is still referenced then becomes an output of its graph. So a step
syncs once, after its update, and the user's reads (`loss.item()`) find finished values instead of compiling parts of it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch_xla

from polyaccel import trees
from polyaccel.errors import PrepareError
from polyaccel.protocols import LossCall, StepSpec
from polyaccel_xla.hyperparameters import DeviceHyperparameters
from polyaccel_xla.mesh import sharding_of
from polyaccel_xla.spmd import Placement

Flush = Callable[[], None]


def bfloat16_autocast(*, enabled: bool = True) -> torch.autocast:
    """bfloat16 where it is safe, by torch's own list for XLA devices."""
    return torch.autocast("xla", dtype=torch.bfloat16, enabled=enabled)


def compute_outputs_without_gradients(module: torch.nn.Module, arguments: Any, outputs: Any) -> None:
    """Forward hook: in evaluation the outputs are computed right away, once.

    Metrics read from them one after the other (`.item()`) would each run the model again. A module-level function, so that a
    prepared module can still be copied and pickled.
    """
    if not torch.is_grad_enabled():
        torch_xla.sync()


def watch_evaluation(module: torch.nn.Module) -> None:
    """Install `compute_outputs_without_gradients` as the last hook: after the cast to float32, if there is one."""
    for key, hook in list(module._forward_hooks.items()):
        if hook is compute_outputs_without_gradients:
            del module._forward_hooks[key]
    module.register_forward_hook(compute_outputs_without_gradients)


class Update:
    """`optimizer.step` with its numbers as data of the graph (see `hyperparameters`); called, it also starts the graph."""

    def __init__(self, optimizer: torch.optim.Optimizer, placement: Placement, flush: Flush) -> None:
        self._placement = placement
        self._flush = flush
        self._hyperparameters = DeviceHyperparameters(placement.upload_scalar, placement.upload)
        self._is_in_pieces = placement.mesh.cuts_parameters
        _choose_traceable(optimizer)
        self.place_state(optimizer)
        optimizer.register_load_state_dict_post_hook(self.place_state)

    def __call__(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None) -> Any:
        result = self.trace(optimizer, closure)
        self._flush()
        return result

    def trace(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """The update as part of the pending graph."""
        hyperparameters = self._hyperparameters
        with hyperparameters:
            result = optimizer.step() if closure is None else optimizer.step(hyperparameters.outside(closure))
        if self._is_in_pieces:
            self._lay_new_state(optimizer)
        return result

    def lay_gradients(self) -> None:
        """Say how the gradients of a backward pass have to lie."""
        self._placement.lay_gradients()

    def place_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Move what the optimizer remembers to its parameters, and lay it out as they are.

        Step counters stay on the host, where torch.optim reads them.
        """
        capturable = {id(p) for group in optimizer.param_groups if group.get("capturable") for p in group["params"]}
        for parameter, state in optimizer.state.items():
            if not isinstance(state, dict):
                continue
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and (key != "step" or id(parameter) in capturable):
                    if value.device.type == "xla":
                        self._placement.lay(value, parameter)
                    else:
                        state[key] = self._placement.upload(value, parameter)

    def _lay_new_state(self, optimizer: torch.optim.Optimizer) -> None:
        """What this step has computed first, such as momentum from a gradient."""
        for parameter, state in optimizer.state.items():
            for value in state.values() if isinstance(state, dict) else ():
                if isinstance(value, torch.Tensor) and value.device.type == "xla" and not sharding_of(value):
                    self._placement.lay(value, parameter)


def _choose_traceable(optimizer: torch.optim.Optimizer) -> None:
    """Of torch.optim's implementations, use the one that is traced in the fewest calls: `foreach`.

    Fused kernels exist for other devices only. The formula is the same in all three; a user's own choice between the other
    two is kept.
    """
    for group in (optimizer.defaults, *optimizer.param_groups):
        if group.get("fused"):
            group["fused"] = None
        if "foreach" in group and group["foreach"] is None and not isinstance(group.get("lr"), torch.Tensor):
            group["foreach"] = not group.get("differentiable", False)


def differentiate(call: LossCall, scale: float) -> Any:
    """Trace a loss function and the gradients of `scale` times its loss; returns what it returned, detached.

    Raises PrepareError when it returned no loss.
    """
    with torch.enable_grad():
        result = call.function(*call.args, **call.kwargs)
    scaled(loss_tensor(result[0] if isinstance(result, tuple) else result), scale).backward()
    return detached(result)


def detached(result: Any) -> Any:
    """What a loss function returned, without its graph."""
    return trees.map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, result)


def loss_tensor(loss: Any) -> torch.Tensor:
    """The loss. Raises PrepareError for what is none."""
    if not isinstance(loss, torch.Tensor):
        raise PrepareError(
            f"the loss function returned a {type(loss).__name__} where a loss was expected",
            "return a scalar tensor, or (loss, auxiliary values)",
        )
    return loss


def scaled(loss: torch.Tensor, scale: float) -> torch.Tensor:
    """The loss times `scale`, untouched at 1."""
    return loss if scale == 1.0 else loss * scale


def fused_step(spec: StepSpec, update: Update, engine: Any) -> Callable[[Any, bool], Any]:
    """The whole step of an XlaEngine as one graph; gradients are dropped before it starts, so that they are no outputs of it."""
    optimizer: torch.optim.Optimizer = spec.optimizer.optimizer
    parameters = [parameter for parameter in spec.model.parameters() if parameter.requires_grad]

    def step(batch: Any, sync: bool) -> Any:
        call = LossCall(spec.loss_fn, (spec.public_model, batch), {})
        if spec.weight is None:
            result = differentiate(call, spec.scale)
        else:
            result = engine.add_weighted(call, spec.weight)
        update.lay_gradients()
        if sync:
            if spec.weight is not None:
                engine.normalise_gradients()
            elif engine.gradient_state is not None and engine.gradient_state.tail_factor != 1.0:
                engine.scale_gradients(engine.gradient_state.tail_factor)
            if spec.norm_limit is not None:
                norm = torch.nn.utils.clip_grad_norm_(parameters, spec.norm_limit)
                if spec.on_grad_norm is not None:
                    spec.on_grad_norm(norm)
            update.trace(optimizer)
            optimizer.zero_grad()
            if engine.gradient_state is not None:
                engine.gradient_state.window_weights = None  # else its sums would be outputs of the graph
        engine.flush()
        return _named(result)

    return step


def _named(result: Any) -> Any:
    if not isinstance(result, tuple):
        return result
    loss, aux = result
    return {"loss": loss, **aux} if isinstance(aux, dict) else {"loss": loss, "aux": aux}

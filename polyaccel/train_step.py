"""The fused step of user code: accumulation and schedule around an engine's own fused step, or around the three separate calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from polyaccel.accumulation import GradientState
from polyaccel.errors import UnsupportedError
from polyaccel.protocols import Bridge, Engine, LossCall, RetainedLoss, StepSpec
from polyaccel.weighting import UNWEIGHTED, checked_weight, refuse_name_for_value


class TrainStep:
    """`step(batch)`: one micro batch; every `gradient_accumulation_steps` of them (and at a loader's end) the update.

    Returns the loss, or for a `loss_fn` that returns (loss, dict) a dict with "loss" and its entries. Values are left on the
    device: reading one waits for it.
    """

    def __init__(
        self,
        engine: Engine,
        spec: StepSpec,
        state: GradientState,
        *,
        scheduler: Any | None,
        lift: Callable[[Any], Any],
        before: Callable[[], None] | None = None,
    ) -> None:
        self._step = engine.train_step(spec) or _composed(engine, spec, state)
        self._is_weighted = spec.weight is not None
        self._state = state
        self._scheduler = scheduler
        self._lift = lift
        self._before = before

    def __call__(self, batch: Any) -> Any:
        if self._before is not None:
            self._before()
        state = self._state
        sync = state.advance()
        if self._is_weighted:
            state.note_weighted()
        elif state.window_weights is not UNWEIGHTED:
            state.note_unweighted()
        result = self._lift(self._step(batch, sync))
        if sync:
            state.window_weights = None  # updated
        if self._scheduler is not None:
            self._scheduler.step()
        return result


def named_result(result: Any) -> Any:
    """What a step returns for what a loss function returned: the loss, or a dict of the loss and its auxiliary values."""
    if not isinstance(result, tuple):
        return result
    loss, aux = result
    return {"loss": loss, **aux} if isinstance(aux, dict) else {"loss": loss, "aux": aux}


def _parameters(spec: StepSpec) -> Any:
    return spec.public_model if spec.bridge is None else spec.bridge.lower(spec.public_model, "parameters")


def _composed(engine: Engine, spec: StepSpec, state: GradientState) -> Callable[[Any, bool], Any]:
    def step(batch: Any, sync: bool) -> Any:
        call: Any = LossCall(spec.loss_fn, (spec.public_model, batch), {})
        if spec.bridge is not None:
            call = spec.bridge.lower(call, "loss")
        with engine.gradient_sync(spec.model, enabled=sync):
            result = engine.backward(call, scale=spec.scale, weight=spec.weight)
        if sync:
            if spec.weight is not None:
                engine.normalise_gradients()
            elif state.tail_factor != 1.0:
                engine.scale_gradients(state.tail_factor)
            if spec.norm_limit is not None:
                norm = engine.clip_grad_norm(_parameters(spec), spec.norm_limit, 2.0)
                if spec.on_grad_norm is not None:
                    spec.on_grad_norm(norm)
            spec.optimizer.step()
            spec.optimizer.zero_grad()
        return named_result(result)

    return step


def add_weighted(
    engine: Engine, bridge: Bridge | None, state: GradientState, work: Any, weight: Any, *, is_call: bool
) -> Any:
    """`engine.backward` with a weight as user code gave it, and the division by all weights where the window closes."""
    weight = checked_weight(weight)
    if isinstance(weight, str) and not is_call:
        raise refuse_name_for_value(weight)
    state.note_weighted()
    if bridge is not None:
        if not isinstance(weight, str | float):
            weight = bridge.lower(weight, "value")  # before the loss: that ends what is recorded of it
        work = bridge.lower(work, "loss")
    result = engine.backward(work, scale=1.0, weight=weight)
    if state.sync_gradients:
        engine.normalise_gradients()
    return bridge.lift(result) if bridge is not None and is_call else result


def scale_tail(engine: Engine, state: GradientState) -> None:
    """Divide the gradients of a short window by its true size; what a further backward adds to it is divided by that at once."""
    engine.scale_gradients(state.tail_factor)
    state.grown, state.tail_factor = state.tail_factor, 1.0


def weight_name(weight: Any) -> str:
    """The weight of a fused step. Raises UnsupportedError for another than the name of an auxiliary value."""
    if not isinstance(weight, str):
        raise UnsupportedError(
            f"train_step(weight=...) got a {type(weight).__name__}, and every batch has a weight of its own",
            'name the auxiliary value that is the weight: loss_fn returns (loss, {"num_tokens": count}), weight="num_tokens"',
        )
    return weight


def loss_value(loss: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A loss value with the keywords of torch's `backward`, as an engine takes it. Raises UnsupportedError for all but retain_graph."""
    others = [name for name in kwargs if name != "retain_graph"]
    if args or others:
        given = ", ".join([*(repr(type(arg).__name__) for arg in args), *(f"{name}=" for name in others)])
        raise UnsupportedError(
            f"backward(loss, ...) with a loss value takes retain_graph only, and got {given}",
            "pass a function, accelerator.backward(loss_fn, model, batch), or differentiate with torch.autograd.grad inside it",
        )
    return RetainedLoss(loss) if kwargs.get("retain_graph") else loss

"""The step: backward, accumulation, clipping, and the fused form of all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from polyaccel.config.numerics import AutocastKwargs
from polyaccel.errors import UnsupportedError
from polyaccel.facade.parts import Parts
from polyaccel.logs import get_logger
from polyaccel.protocols import LossCall, StepSpec
from polyaccel.train_step import TrainStep, add_weighted, loss_value, scale_tail, weight_name
from polyaccel.weighting import UNWEIGHTED

_log = get_logger("polyaccel.steps")


class Steps(Parts):
    """From a loss to updated parameters."""

    def backward(self, loss: Any, *args: Any, weight: Any = None, **kwargs: Any) -> Any:
        """Add the gradients of a loss, divided by the accumulation steps, or weighted.

        `loss` is a value (torch scripts), or a function called as `loss(*args, **kwargs)`, usually `loss_fn, model, batch`, which
        works in every dialect on every engine; it returns the loss or (loss, auxiliary values), and so does this call, with
        the loss as its mean over the global batch. With a value, returns None, and takes `retain_graph=True` for a second
        backward through the same graph (torch's keyword; its others are refused).

        With `weight`, how many tokens or samples the loss is a mean over, an update uses sum(weight * gradient) / sum(weight) over its
        window and all data shards: the gradient of the mean over all tokens of the global batch, also in a short last window. It is a
        number or a scalar array, different in every call and on every process, or for a function the name of the auxiliary value that
        it is. A window whose weights are all 0 has gradients of 0. Weighted and unweighted calls do not mix in one window. No weight
        waits for the device or compiles anew; one scalar is exchanged per window.
        """
        if self._preemption is not None:
            self._preemption.before_call()
        if self._observer is not None:
            self._observer.before_step()
        is_call = callable(loss) and not hasattr(loss, "dtype")
        result = self._differentiate(loss, is_call, args, kwargs, weight)
        if self._preemption is not None:
            self._preemption.after_backward()
        if self._observer is not None:
            self._observer.after_backward(result if is_call else loss)
        return result if is_call else None

    def _differentiate(
        self, loss: Any, is_call: bool, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Any
    ) -> Any:
        bridge = self._prepared.bridge
        if not is_call and bridge is None and not self._differentiates_values:
            raise UnsupportedError(
                f"backward(loss) got a value of type {type(loss).__name__}, and backend {self.backend!r} cannot differentiate"
                " a value after it was computed",
                "pass the function instead: loss = accelerator.backward(loss_fn, model, batch), or use accelerator.train_step",
            )
        work: Any = (
            LossCall(loss, args, kwargs) if is_call else loss_value(loss, args, kwargs) if kwargs or args else loss
        )
        if weight is not None:
            return add_weighted(self._engine, bridge, self.gradient_state, work, weight, is_call=is_call)
        state = self.gradient_state
        if state.window_weights is not UNWEIGHTED:
            state.note_unweighted()
        if bridge is not None:
            work = bridge.lower(work, "loss")
        result = self._engine.backward(work, scale=state.grown / state.num_steps)
        if state.tail_factor != 1.0:
            scale_tail(self._engine, state)
        return bridge.lift(result) if bridge is not None and is_call else result

    def train_step(
        self,
        loss_fn: Callable[..., Any],
        model: Any,
        optimizer: Any,
        scheduler: Any | None = None,
        max_grad_norm: float | None = None,
        *,
        weight: str | None = None,
    ) -> TrainStep:
        """A fused step: `step(batch)` does forward, backward, accumulation, clipping, update and schedule.

        Args:
            loss_fn: `loss_fn(model, batch)` gives the loss (its mean over the batch), or (loss, dict of auxiliary values).
            model, optimizer, scheduler: what `prepare` returned.
            max_grad_norm: clip the gradients of each update to this global L2 norm.
            weight: name of the auxiliary value that is the loss's weight, as in `backward`: `loss_fn` returns
                (mean over the tokens, {"num_tokens": count}), and weight="num_tokens".

        The same numbers as `backward`, `clip_grad_norm_`, `optimizer.step()` in a loop; on compiling engines one program per
        step. `step(batch)` returns the loss as its mean over the global batch, or a dict {"loss": ..., **auxiliary}:
        floating scalars averaged and integer scalars summed over data shards, arrays as this process's samples.
        """
        prepared, bridge = self._prepared, self._prepared.bridge
        spec = StepSpec(
            loss_fn=loss_fn,
            model=prepared.handle_of(model, "model", argument="model"),
            public_model=model,
            optimizer=prepared.handle_of(optimizer, "optimizer", argument="optimizer"),
            max_grad_norm=max_grad_norm,
            scale=1 / self.gradient_state.num_steps,
            weight=weight if weight is None else weight_name(weight),
            bridge=bridge,
            on_grad_norm=None if self._observer is None else self._observer.updated,
        )
        if scheduler is not None:
            prepared.handle_of(scheduler, "scheduler", argument="scheduler")
        lift: Callable[[Any], Any] = bridge.lift if bridge is not None else _same
        if self._observer is not None:
            lift = self._observer.around(lift)
        before = None
        if self._preemption is not None:
            lift, before = self._preemption.around(lift), self._preemption.before_call
        return TrainStep(self._engine, spec, self.gradient_state, scheduler=scheduler, lift=lift, before=before)

    def accumulate(self, *models: Any) -> AbstractContextManager[None]:
        """One micro batch: inside, optimizers and schedulers act, and gradients are exchanged, only when the window closes."""
        if self._preemption is None and self.plan.num_data_shards == 1:
            return self.gradient_state  # nothing else is to be done around it
        return self._accumulate(models)

    @contextmanager
    def _accumulate(self, models: tuple[Any, ...]) -> Iterator[None]:
        if self._preemption is not None:
            self._preemption.before_call()
        if self.gradient_state.advance() or self.plan.num_data_shards == 1 or self.config.sync_each_batch:
            yield
            return
        with ExitStack() as stack:
            for model in models:
                handle = self._prepared.handle_of(model, "model", argument="model")
                stack.enter_context(self._engine.gradient_sync(handle, enabled=False))
            yield

    @contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        """Inside, backward does not exchange gradients between processes; the next backward outside does."""
        handle = self._prepared.handle_of(model, "model", argument="model")
        with self._engine.gradient_sync(handle, enabled=False):
            yield

    def trigger_sync_in_backward(self, model: Any) -> AbstractContextManager[Any]:
        """Inside, the next backward exchanges gradients between processes though the forward passes before it ran under `no_sync`.

        On engines without `no_sync` every backward does. Every process must enter it.
        """
        handle = self._prepared.handle_of(model, "model", argument="model")
        if "gradient_sync" not in self._features:
            return nullcontext()
        engine: Any = self._engine  # what it declares beside the seam
        context: AbstractContextManager[Any] = engine.sync_in_backward(handle)
        return context

    @property
    def sync_gradients(self) -> bool:
        """True when the current micro batch closes its accumulation window (always outside `accumulate`)."""
        return self.gradient_state.sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        self.gradient_state.sync_gradients = value

    @property
    def gradient_accumulation_steps(self) -> int:
        """Batches per optimizer update."""
        return self.gradient_state.num_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, value: int) -> None:
        self.gradient_state.num_steps = value

    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """A context in which torch operations outside a prepared model compute in the mixed precision.

        `autocast_handler`: AutocastKwargs of this block alone: `enabled=False` computes in the dtype of the values, also inside another
        block. Without one, those of `Accelerator(kwargs_handlers=...)` count.
        """
        bridge, handler = self._prepared.bridge, autocast_handler
        enabled = self.config.autocast if handler is None else handler.enabled
        if bridge is not None:
            return bridge.autocast(self._engine, enabled=enabled)
        cache = None if handler is None else handler.cache_enabled
        return self._engine.autocast(
            enabled=enabled, cache_enabled=self.config.autocast_cache if cache is None else cache
        )

    @contextmanager
    def maybe_context_parallel(
        self,
        buffers: list[Any] | None = None,
        buffer_seq_dims: list[int] | None = None,
        no_restore_buffers: set[Any] | None = None,
    ) -> Iterator[None]:
        """A block in which Accelerate cuts the buffers of a script over devices. Here they stay whole, which the log says once.

        An engine with the mesh axis `sequence` cuts sequences inside its programs, and a loss is that of whole ones.
        """
        if buffers:
            is_cut = self.plan.mesh.sequence > 1
            why = "the engine cuts sequences inside its programs" if is_cut else "mesh.sequence is 1"
            _log.warning_once("maybe_context_parallel cuts nothing: %s", why)
        yield

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """Scale gradients so that their total norm is at most `max_norm`; returns the norm before, or None while accumulating.

        `parameters`: `model.parameters()` of prepared models; in a flax script the model itself.
        """
        if not self.gradient_state.sync_gradients:
            return None
        bridge = self._prepared.bridge
        target = parameters if bridge is None else bridge.lower(parameters, "parameters")
        norm = self._engine.clip_grad_norm(target, float(max_norm), float(norm_type))
        if bridge is not None:
            norm = bridge.lift(norm)
        if self._observer is not None:
            self._observer.clipped(norm)
        return norm

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clamp every gradient element to [-clip_value, clip_value]; nothing while accumulating."""
        if self.gradient_state.sync_gradients:
            bridge = self._prepared.bridge
            self._engine.clip_grad_value(
                parameters if bridge is None else bridge.lower(parameters, "parameters"), float(clip_value)
            )

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Divide the gradients of a prepared optimizer (None: of all; or a list of them) by fp16's loss scale, once per update.

        For scripts that read gradients before `optimizer.step()`; clipping does it by itself. Nothing without a loss scale, and while
        accumulating.
        """
        if self.plan.precision.loss_scaling is None:
            return
        chosen = self._prepared.public("optimizer") if optimizer is None else optimizer
        for each in chosen if isinstance(chosen, (list, tuple)) else [chosen]:
            self._prepared.handle_of(each, "optimizer", argument="optimizer")
            groups = getattr(each, "param_groups", None)
            owned = [parameter for group in groups for parameter in group["params"]] if groups is not None else None
            for target in [owned] if owned is not None else self._prepared.public("model"):
                self.clip_grad_value_(target, math.inf)  # unscales, and leaves every element as it is

    def lomo_backward(self, loss: Any, learning_rate: float) -> None:
        """Refused: LOMO updates parameters inside backward, which no engine here does."""
        raise UnsupportedError(
            "lomo_backward: the LOMO optimizers are not supported", "use torch.optim.SGD or Adafactor, and backward"
        )

    @property
    def scaler(self) -> Any:
        """The torch.amp.GradScaler of fp16 on the engine torch, to be read; None elsewhere, also where an engine scales in its programs."""
        engine: Any = self._engine  # what it declares beside the seam
        return engine.grad_scaler if "grad_scaler" in self._features else None

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """True if the last update of any prepared optimizer was skipped because of gradients that were not finite (fp16)."""
        return any(optimizer.step_was_skipped for optimizer in self._prepared.public("optimizer"))


def _same(value: Any) -> Any:
    return value

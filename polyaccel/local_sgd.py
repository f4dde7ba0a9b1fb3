"""Local SGD: every process trains on its own for some steps, and the parameters are averaged instead of every gradient."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from polyaccel.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from polyaccel.accelerator import Accelerator


class LocalSGD:
    """Inside, no gradients are exchanged; every `local_sgd_steps` calls of `step()`, and at the end, parameters are averaged.

        with LocalSGD(accelerator, model, local_sgd_steps=8) as local_sgd:
            for batch in loader:
                ...
                optimizer.step()
                optimizer.zero_grad()
                local_sgd.step()

    What is averaged are the floating-point parameters, over all processes, in place (S. Stich, "Local SGD Converges Fast and
    Communicates Little", 2019). Buffers and the optimizer's state stay each process's own, so a checkpoint that is saved inside holds
    those of process 0. Every process must take equally many steps; after an exception nothing is averaged. Weights that `backward` takes
    are those of each process's own window.

    Args:
        accelerator: the Accelerator that prepared the model.
        model: the prepared model.
        local_sgd_steps: calls of `step()` between two averages, 1 or more.
        enabled: False: nothing happens, and gradients are exchanged as ever. Nor does anything happen with one data shard.

    Raises ConfigError for `local_sgd_steps` below 1, PrepareError for a model that is not prepared, and UnsupportedError on engines
    whose data shards share one set of parameters, and under fp16.
    """

    def __init__(self, accelerator: Accelerator, model: Any, local_sgd_steps: int, enabled: bool = True) -> None:
        if local_sgd_steps < 1:
            raise ConfigError(f"local_sgd_steps={local_sgd_steps} is less than 1", "average after every step with 1")
        self.enabled = enabled and accelerator.num_data_shards > 1
        self.local_sgd_steps = local_sgd_steps
        self.num_steps = 0
        self._handle = accelerator._prepared.handle_of(model, "model", argument="model")
        self._engine: Any = accelerator._engine  # average_parameters comes with the feature that is asked for below
        self._state = accelerator.gradient_state
        self._without_exchange = ExitStack()
        if not self.enabled:
            return
        if "gradient_sync" not in accelerator._features:
            raise UnsupportedError(
                f"LocalSGD lets every data shard train parameters of its own, and on backend {accelerator.backend!r} all"
                f" {accelerator.num_data_shards} share one set: each step is one program that averages their gradients",
                "use backend='torch', or LocalSGD(..., enabled=False); gradient_accumulation_steps also makes exchanges fewer",
            )
        if accelerator.plan.precision.loss_scaling is not None:
            raise UnsupportedError(
                f"under mixed_precision={accelerator.mixed_precision!r} each process of LocalSGD would come to a loss scale of its own,"
                " and the gradients that are exchanged afterwards would be of different scales",
                "use mixed_precision='bf16' or 'no'",
            )

    def __enter__(self) -> LocalSGD:
        if self.enabled:
            self._without_exchange.enter_context(self._engine.gradient_sync(self._handle, enabled=False))
            self._without_exchange.callback(setattr, self._state, "exchanges_weights", self._state.exchanges_weights)
            self._state.exchanges_weights = False
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._without_exchange:
            if self.enabled and kind is None:  # the others may not come to an average after an exception here
                self._engine.average_parameters(self._handle)

    def step(self) -> None:
        """Count one step of training; average the parameters if it is the last of `local_sgd_steps`. Every process must call it."""
        self.num_steps += 1
        if self.enabled and self.num_steps % self.local_sgd_steps == 0:
            self._engine.average_parameters(self._handle)

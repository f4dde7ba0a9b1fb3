"""The exponential moving average of a prepared model's parameters, the same on every engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from polyaccel.errors import CheckpointError, ConfigError, UnsupportedError
from polyaccel.prepare import engine_of_model


class EMA:
    """Averages of a prepared model's parameters, for evaluation: they follow it slowly and swing less.

        ema = EMA(model, decay=0.999)                   # after accelerator.prepare
        accelerator.register_for_checkpointing(ema)
        for batch in loader:
            ...
            optimizer.step()
            ema.update()
        with ema.applied():
            evaluate(model)

    After update n = 1, 2, ...: average = d * average + (1 - d) * parameter, from the parameters as they are when this is created.
    d is `decay`, with `warmup` min(decay, (1 + n) / (10 + n)), as tf.train.ExponentialMovingAverage has it. The idea is that of
    B. Polyak and A. Juditsky, "Acceleration of stochastic approximation by averaging", 1992.

    Floating-point and complex parameters are averaged, in float32 at least; buffers (running statistics) are the model's own in both
    cases. Create it, and make all of its calls, on every process; inside a `LocalSGD` block right after an average, for between two of
    them the processes have different parameters.

    Args:
        model: a prepared model.
        decay: how much of the average an update keeps, from 0 to below 1.
        warmup: keep less of it in the first updates, so that the values of the start are soon forgotten.

    Raises ConfigError for another decay, PrepareError for a model that is not prepared.
    """

    def __init__(self, model: Any, decay: float = 0.999, *, warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"decay={decay} is not from 0 to below 1", "use a value such as 0.999")
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self._engine, handle = engine_of_model(model)
        self._average = self._engine.parameter_average(handle)
        self._is_applied = False

    def update(self) -> None:
        """Take the present parameters into the average; call it after `optimizer.step()`. Nothing while gradients accumulate.

        Waits for no device; on jax it is one compiled program. An update that fp16 skipped counts, with parameters that did not change.
        Raises UnsupportedError inside `applied()`.
        """
        if self._is_applied:
            raise UnsupportedError(
                "ema.update() was called inside ema.applied(), where the parameters are the averages themselves",
                "train outside of the block",
            )
        state = self._engine.gradient_state
        if state is not None and not state.sync_gradients:
            return
        self.num_updates += 1
        n = self.num_updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        self._average.update(1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's parameters are the averages: evaluate it, or save it. Afterwards they are exactly what they were.

        What is trained inside is lost with it. Raises UnsupportedError inside another one.
        """
        if self._is_applied:
            raise UnsupportedError("ema.applied() was entered inside itself", "one block is enough")
        with self._average.applied():
            self._is_applied = True
            try:
                yield
            finally:
                self._is_applied = False

    def state_dict(self) -> dict[str, Any]:
        """{"num_updates", "averages": numpy arrays by the parameter's name}: the same on every engine. Waits for the device."""
        return {"num_updates": self.num_updates, "averages": self._average.read()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave, on this engine or another; `decay` and `warmup` stay.

        Raises CheckpointError, before anything is changed, where names or shapes are not this model's.
        """
        averages = state["averages"]
        wanted = dict(self._average.shapes)
        given = {name: tuple(array.shape) for name, array in averages.items()}
        different = sorted(name for name in {*wanted, *given} if wanted.get(name) != given.get(name))
        if different:
            first = different[0]
            raise CheckpointError(
                f"the averages do not fit the model: {first!r} has shape {given.get(first, 'none')} in the state and"
                f" {wanted.get(first, 'none')} in the model ({len(different)} of {len({*wanted, *given})} names differ)",
                "load the state of an EMA of the same model",
            )
        self._average.write(averages)
        self.num_updates = int(state["num_updates"])

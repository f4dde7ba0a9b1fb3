"""What the conformance suite asks of accumulation windows: token weights with one normaliser, and tail windows of their true size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyaccel import Accelerator
from polyaccel.case import Case
from polyaccel.errors import UnsupportedError
from polyaccel.testing.reference import BIAS, GLOBAL_BATCH, LR, TOLERANCE, WEIGHT, X, Y, on_host

STEPS = 3  # micro batches of a window: of four batches the last one is a window of its own
NORM = 0.3


def counted_loss(model: Any, batch: Any) -> Any:
    """(mean over the rows whose first target is positive, {"rows": how many}), as torch and jax write it."""
    errors = ((model(batch["x"]) - batch["y"]) ** 2).mean(1)
    counts = (batch["y"][:, 0] > 0) * 1.0
    rows = counts.sum()
    return (errors * counts).sum() / (rows + (rows == 0)), {"rows": rows}


def careless_loss(model: Any, batch: Any) -> Any:
    """The same with 0 / 0 where no row counts."""
    errors = ((model(batch["x"]) - batch["y"]) ** 2).mean(1)
    counts = (batch["y"][:, 0] > 0) * 1.0
    return (errors * counts).sum() / counts.sum(), {"rows": counts.sum()}


def windows_of(steps: int) -> list[slice]:
    """The rows of each window of one pass."""
    size = steps * GLOBAL_BATCH
    return [slice(start, start + size) for start in range(0, len(X), size)]


def expected(counts: Any, windows: list[slice], *, max_norm: float | None = None) -> tuple[Any, Any]:
    """(weight, bias) after SGD on the mean over the counted rows of each window, in float64."""
    weight, bias = WEIGHT.astype(np.float64), BIAS.astype(np.float64)
    for rows in windows:
        x, y, counted = X[rows].astype(np.float64), Y[rows].astype(np.float64), counts[rows].astype(np.float64)
        error = (x @ weight + bias - y) * counted[:, None]
        slope = 2 * error / Y.shape[1] / max(counted.sum(), 1)
        grads = x.T @ slope, slope.sum(0)
        norm = np.sqrt(sum((grad**2).sum() for grad in grads))
        factor = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        weight, bias = weight - LR * factor * grads[0], bias - LR * factor * grads[1]
    return weight, bias


class Weighting:
    """Part of `Conformance`, which has the material."""

    case: Case
    accelerator: Callable[..., Accelerator]
    prepared: Callable[..., tuple[Any, ...]]
    forms: Callable[[], list[str]]
    train: Callable[..., list[float]]

    @property
    def counted_loss(self) -> Callable[..., Any]:
        """The case's own where its dialect is neither torch nor flax."""
        own: Callable[..., Any] = getattr(self.case, "counted_loss", counted_loss)
        return own

    def assert_weights(self, accelerator: Accelerator, model: Any, wanted: tuple[Any, Any]) -> None:
        """The present parameters are these."""
        weights = self.case.weights(accelerator.unwrap_model(model))
        np.testing.assert_allclose(weights["weight"], wanted[0], rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(weights["bias"], wanted[1], rtol=TOLERANCE, atol=TOLERANCE)

    def weigh(self, form: str, accelerator: Accelerator, prepared: tuple[Any, ...], stop: int | None = None) -> None:
        """One pass with weights in one of the forms; `stop`: leave after so many batches, and save there."""
        model, optimizer, loader = prepared
        loss_fn = self.counted_loss
        fused = accelerator.train_step(loss_fn, model, optimizer, None, NORM, weight="rows")
        for number, batch in enumerate(loader, 1):
            if form == "train_step":
                fused(batch)
                continue
            count = (on_host(batch["y"])[:, 0] > 0).sum()
            with accelerator.accumulate(model):
                if form == "value":
                    accelerator.backward(loss_fn(model, batch)[0], weight=int(count))
                elif form == "number":
                    accelerator.backward(loss_fn, model, batch, weight=self.case.array(np.float32(count)))
                else:
                    accelerator.backward(loss_fn, model, batch, weight="rows")
                accelerator.clip_grad_norm_(self.case.parameters(model), NORM)
                optimizer.step()
                optimizer.zero_grad()
            if number == stop:
                accelerator.save_state()
                return

    def weighted_forms(self, accelerator: Accelerator) -> list[str]:
        """Where a loss function is computed on each data shard of a process, one number cannot be the weight of all."""
        forms = [form for form in self.forms() if form != "function"]
        return [*forms, "name"] if self._has_replicas(accelerator) else [*forms, "name", "number"]

    def _has_replicas(self, accelerator: Accelerator) -> bool:
        return (
            accelerator.backend == "jax" and accelerator.plan.num_local_data_shards > 1 and self.case.dialect == "torch"
        )

    def test_weighted_micro_batches_equal_the_mean_over_all_counted_rows(self) -> None:
        counts = Y[:, 0] > 0
        wanted = expected(counts, windows_of(STEPS), max_norm=NORM)
        for form in self.weighted_forms(self.accelerator()):
            accelerator = self.accelerator(gradient_accumulation_steps=STEPS)
            prepared = self.prepared(accelerator)
            self.weigh(form, accelerator, prepared)
            self.assert_weights(accelerator, prepared[0], wanted)

    def test_a_weight_without_accumulation_is_the_mean_over_data_shards(self) -> None:
        wanted = expected(Y[:, 0] > 0, windows_of(1), max_norm=NORM)
        for form in ("name", "train_step"):
            accelerator = self.accelerator()
            prepared = self.prepared(accelerator)
            self.weigh(form, accelerator, prepared)
            self.assert_weights(accelerator, prepared[0], wanted)

    def test_weighted_backwards_between_two_updates_are_one_window(self) -> None:
        accelerator = self.accelerator()
        model, optimizer, loader = self.prepared(accelerator)
        for batch in loader:  # no accumulate: every backward could be the last one
            accelerator.backward(self.counted_loss, model, batch, weight="rows")
        optimizer.step()
        self.assert_weights(accelerator, model, expected(Y[:, 0] > 0, [slice(0, len(X))]))

    def test_one_number_for_several_replicas_of_a_loss_function_is_refused(self) -> None:
        accelerator = self.accelerator()
        model, _, loader = self.prepared(accelerator)
        batch = next(iter(loader))
        if not self._has_replicas(accelerator):
            accelerator.backward(self.counted_loss, model, batch, weight=8)
            return
        with pytest.raises(UnsupportedError, match=r"weight is one number.*\nhint: .*name it"):
            accelerator.backward(self.counted_loss, model, batch, weight=8)

    def test_weights_of_nothing_leave_gradients_of_zero(self) -> None:
        own = getattr(self.case, "counted_loss", None)
        for form in ("name", "train_step"):
            accelerator = self.accelerator(gradient_accumulation_steps=2)
            model = self.case.model(WEIGHT, BIAS)
            optimizer = self.case.optimizer(model, LR)
            loader = self.case.loader(X, -np.abs(Y), GLOBAL_BATCH // accelerator.num_data_shards)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            step = accelerator.train_step(own or careless_loss, model, optimizer, weight="rows")
            for batch in loader:
                if form == "train_step":
                    step(batch)
                    continue
                with accelerator.accumulate(model):
                    accelerator.backward(own or careless_loss, model, batch, weight="rows")
                    optimizer.step()
                    optimizer.zero_grad()
            self.assert_weights(accelerator, model, (WEIGHT, BIAS))

    def test_weighted_and_unweighted_backwards_do_not_mix_in_a_window(self) -> None:
        accelerator = self.accelerator(gradient_accumulation_steps=2)
        model, optimizer, loader = self.prepared(accelerator)
        batch = next(iter(loader))
        for first, second in (("rows", None), (None, "rows")):
            with accelerator.accumulate(model):
                accelerator.backward(self.counted_loss, model, batch, weight=first)
            with pytest.raises(UnsupportedError, match="weighted and unweighted"), accelerator.accumulate(model):
                accelerator.backward(self.counted_loss, model, batch, weight=second)
            optimizer.zero_grad()  # the window ends

    def test_a_weight_that_is_none_is_refused_by_name(self) -> None:
        accelerator = self.accelerator()
        model, optimizer, loader = self.prepared(accelerator)
        batch = next(iter(loader))
        for weight, what in (
            ("tokens", "names no auxiliary value"),
            (-1, "weight=-1 is no count"),
            (self.case.array(np.ones(3, np.float32)), r"array of shape \(3,\)"),
        ):
            with pytest.raises(UnsupportedError, match=what):
                accelerator.backward(self.counted_loss, model, batch, weight=weight)
            optimizer.zero_grad()
        with pytest.raises(UnsupportedError, match="name the auxiliary value"):
            accelerator.train_step(self.counted_loss, model, optimizer, weight=3)  # type: ignore[arg-type]

    def test_no_weight_compiles_anew(self) -> None:
        if not hasattr(self.accelerator()._engine, "compile_events"):
            return
        for form in ("name", "train_step", *(["value"] if "value" in self.forms() else [])):
            accelerator = self.accelerator(gradient_accumulation_steps=2)
            prepared = self.prepared(accelerator)
            self.weigh(form, accelerator, prepared)
            count = len(accelerator.compile_events)
            self.weigh(form, accelerator, prepared)
            assert len(accelerator.compile_events) == count

    def test_a_weighted_window_is_saved_open_and_goes_on(self, tmp_path: Path) -> None:
        first = self.accelerator(gradient_accumulation_steps=STEPS, project_dir=tmp_path)
        self.weigh("name", first, self.prepared(first), stop=2)
        first.wait_for_checkpoint()
        second = self.accelerator(gradient_accumulation_steps=STEPS)
        again = self.prepared(second)
        second.load_state(tmp_path / "checkpoints" / "checkpoint_0")
        self.weigh("name", second, again)
        self.assert_weights(second, again[0], expected(Y[:, 0] > 0, windows_of(STEPS), max_norm=NORM))

    def test_a_tail_window_may_be_divided_by_its_true_size(self) -> None:
        wanted = expected(np.ones(len(X)), windows_of(STEPS), max_norm=NORM)
        for form in self.forms():
            accelerator = self.accelerator(gradient_accumulation_steps=STEPS, tail_window="actual")
            prepared = self.prepared(accelerator)
            self.train(form, accelerator, prepared, max_norm=NORM)
            self.assert_weights(accelerator, prepared[0], wanted)

    def test_a_schedule_may_count_updates_on_any_number_of_data_shards(self) -> None:
        if not self.case.has_schedulers:
            pytest.skip("the dialect's schedules live inside its optimizers")
        accelerator = self.accelerator(scheduler_unit="step")
        prepared = self.prepared(accelerator, gamma=0.5)
        self.train("train_step", accelerator, prepared)
        assert prepared[3].get_last_lr()[0] == pytest.approx(LR * 0.5**4)

"""What the conformance suite asks of a backend's checkpoints: everything is read, fits where it should, and is put back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyaccel import Accelerator
from polyaccel.case import Case
from polyaccel.errors import CheckpointError
from polyaccel.protocols import ArraySpec
from polyaccel.registry import load_backend
from polyaccel.testing.reference import BIAS, LR, TOLERANCE, WEIGHT, number, reference


class Remembering:
    """Part of `Conformance`, which has the material."""

    case: Case
    accelerator: Callable[..., Accelerator]
    prepared: Callable[..., tuple[Any, ...]]

    def some_steps(self, accelerator: Accelerator, prepared: tuple[Any, ...], stop: int | None = None) -> list[float]:
        """Losses of one pass in the form that every backend has, or of what is left of it; `stop` batches at most."""
        model, optimizer, loader = prepared
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                losses.append(number(accelerator.backward(self.case.loss, model, batch)))
                optimizer.step()
                optimizer.zero_grad()
            if len(losses) == stop:
                accelerator.save_state()
        return losses

    def test_a_run_cut_in_the_middle_of_a_window_goes_on_as_the_mathematics_says(self, tmp_path: Path) -> None:
        expected = reference(accumulate=2)
        first = self.accelerator(gradient_accumulation_steps=2, project_dir=tmp_path)
        prepared = self.prepared(first)
        whole = self.some_steps(first, prepared, stop=1)
        np.testing.assert_allclose(whole, expected[0], rtol=TOLERANCE, atol=TOLERANCE)
        first.wait_for_checkpoint()
        second = self.accelerator(gradient_accumulation_steps=2)
        again = self.prepared(second)
        second.load_state(tmp_path / "checkpoints" / "checkpoint_0")
        assert self.some_steps(second, again) == whole[1:]
        for accelerator, (model, *_) in ((first, prepared), (second, again)):
            weights = self.case.weights(accelerator.unwrap_model(model))
            np.testing.assert_allclose(weights["weight"], expected[1], rtol=TOLERANCE, atol=TOLERANCE)

    def test_what_was_read_does_not_change_with_the_training(self) -> None:
        accelerator = self.accelerator()
        model, optimizer, loader = self.prepared(accelerator)
        engine, handle = accelerator._engine, accelerator._prepared.handle_of(model, "model", argument="model")
        shards = list(engine.read_state(handle))
        before = [np.array(shard.data) for shard in shards]
        step = accelerator.train_step(self.case.loss, model, optimizer)  # may reuse the memory of what it updates
        for batch in loader:
            step(batch)
        for shard, data in zip(shards, before, strict=True):
            np.testing.assert_array_equal(shard.data, data)

    def test_state_of_other_names_shapes_or_dtypes_is_refused_and_changes_nothing(self) -> None:
        accelerator = self.accelerator()
        model, *_ = self.prepared(accelerator)
        engine, handle = accelerator._engine, accelerator._prepared.handle_of(model, "model", argument="model")
        shards = list(engine.read_state(handle))
        specs = {shard.name: ArraySpec(shard.global_shape, shard.dtype) for shard in shards}
        engine.check_state(handle, specs)
        first = next(iter(specs))
        shape, dtype = specs[first].shape, specs[first].dtype
        for wrong in (
            {name: spec for name, spec in specs.items() if name != first},
            {**specs, "no_such_array": ArraySpec((2,), "float32")},
            {**specs, first: ArraySpec((*shape, 1), dtype)},
            {**specs, first: ArraySpec(shape, "float16")},
        ):
            with pytest.raises(CheckpointError):
                engine.check_state(handle, wrong)
        with pytest.raises(CheckpointError):
            engine.write_state(handle, shards[1:])
        np.testing.assert_array_equal(self.case.weights(accelerator.unwrap_model(model))["weight"], WEIGHT)

    def test_loading_drops_gradients_that_were_left(self, tmp_path: Path) -> None:
        accelerator = self.accelerator()
        model, optimizer, loader = self.prepared(accelerator)
        accelerator.save_state(tmp_path / "fresh", blocking=True)
        accelerator.backward(self.case.loss, model, next(iter(loader)))
        accelerator.load_state(tmp_path / "fresh")
        optimizer.step()
        np.testing.assert_array_equal(self.case.weights(accelerator.unwrap_model(model))["weight"], WEIGHT)

    def test_the_generators_of_the_devices_go_on_where_they_were(self) -> None:
        engine = self.accelerator()._engine
        before = engine.read_random()
        engine.seed(1234)
        engine.write_random(before)
        assert engine.read_random() == before

    def test_the_loss_scale_is_read_and_written(self) -> None:
        if "fp16" not in load_backend(self.case.backend).capabilities.mixed_precision:
            assert self.accelerator()._engine.read_scaler() is None
            return
        engine = self.accelerator(mixed_precision="fp16")._engine
        engine.write_scaler({"scale": 512.0, "growth_tracker": 3})
        assert engine.read_scaler() == {"scale": 512.0, "growth_tracker": 3}

    def test_a_checkpoint_of_another_model_changes_nothing(self, tmp_path: Path) -> None:
        accelerator = self.accelerator()
        self.prepared(accelerator)
        accelerator.save_state(tmp_path / "c", blocking=True)
        other = self.accelerator()
        model = self.case.model(np.ones((WEIGHT.shape[0] + 1, WEIGHT.shape[1]), np.float32), BIAS)
        model, _ = other.prepare(model, self.case.optimizer(model, LR))
        other.prepare(self.case.loader(np.zeros((4, 2), np.float32), np.zeros((4, 1), np.float32), 4))
        before = self.case.weights(other.unwrap_model(model))["weight"]
        with pytest.raises(CheckpointError):
            other.load_state(tmp_path / "c")
        np.testing.assert_array_equal(self.case.weights(other.unwrap_model(model))["weight"], before)

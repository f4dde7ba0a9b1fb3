"""What the conformance suite asks of the averages that a backend keeps of a model's parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from polyaccel import EMA, Accelerator
from polyaccel.case import Case
from polyaccel.testing.reference import TOLERANCE


class Averaging:
    """Part of `Conformance`, which has the material."""

    case: Case
    accelerator: Callable[..., Accelerator]
    prepared: Callable[..., tuple[Any, ...]]

    def weights_of(self, accelerator: Accelerator, model: Any) -> dict[str, Any]:
        """Present values, in memory of their own."""
        return {name: np.array(a) for name, a in self.case.weights(accelerator.unwrap_model(model)).items()}

    def test_an_average_follows_the_parameters_as_its_formula_says(self) -> None:
        accelerator = self.accelerator()
        model, optimizer, loader = self.prepared(accelerator)
        step = accelerator.train_step(self.case.loss, model, optimizer)
        ema = EMA(model, decay=0.8, warmup=True)
        expected = {name: a.astype(np.float64) for name, a in self.weights_of(accelerator, model).items()}
        for n, batch in enumerate(loader, 1):
            step(batch)
            ema.update()
            decay = min(0.8, (1 + n) / (10 + n))
            present = self.weights_of(accelerator, model)
            expected = {name: decay * old + (1 - decay) * present[name] for name, old in expected.items()}
            with ema.applied():
                applied = self.weights_of(accelerator, model)
            after = self.weights_of(accelerator, model)  # training goes on from here
            for name, average in expected.items():
                np.testing.assert_allclose(applied[name], average, rtol=TOLERANCE, atol=TOLERANCE)
                assert not np.allclose(applied[name], present[name], rtol=TOLERANCE, atol=TOLERANCE)
                np.testing.assert_array_equal(after[name], present[name])

    def test_an_average_changes_with_real_updates_only(self) -> None:
        for form in ("function", "train_step"):
            accelerator = self.accelerator(gradient_accumulation_steps=2)
            model, optimizer, loader = self.prepared(accelerator)
            step = accelerator.train_step(self.case.loss, model, optimizer)
            ema = EMA(model, decay=0.5)
            counts = []
            for batch in loader:
                if form == "train_step":
                    step(batch)
                    ema.update()
                else:
                    with accelerator.accumulate(model):
                        accelerator.backward(self.case.loss, model, batch)
                        optimizer.step()
                        optimizer.zero_grad()
                        ema.update()
                counts.append(ema.num_updates)
            assert counts[:4] == [0, 1, 1, 2]

    def test_an_average_is_saved_and_loaded_with_the_run(self, tmp_path: Path) -> None:
        averages, folder = [], tmp_path / "saved"
        for is_first in (True, False):
            accelerator = self.accelerator()
            model, optimizer, loader = self.prepared(accelerator)
            ema = EMA(model, decay=0.9)
            accelerator.register_for_checkpointing(ema)
            if is_first:
                step = accelerator.train_step(self.case.loss, model, optimizer)
                for batch in loader:
                    step(batch)
                    ema.update()
                accelerator.save_state(folder, blocking=True)
            else:
                accelerator.load_state(folder)
            with ema.applied():
                averages.append((ema.num_updates, self.weights_of(accelerator, model)))
        (count, saved), (same_count, loaded) = averages
        assert count == same_count > 0
        for name, array in saved.items():
            np.testing.assert_array_equal(loaded[name], array)

"""The suite that every backend runs, by what it declares. A linear model under SGD, whose every number is known in advance.

    class TestMine(Conformance):
        case = MyCase()     # how the backend's own dialect writes a model, an optimizer, a loader and a loss

All references are computed in numpy float64 (`reference.py`), so agreement is with the mathematics and not with another engine.
Needs pytest; `polyaccel test --conformance` runs it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyaccel import Accelerator
from polyaccel.case import Case
from polyaccel.config.numerics import AutocastKwargs, GradScalerKwargs
from polyaccel.config.profile import ProfileKwargs
from polyaccel.errors import ConfigError, PolyaccelError, PrepareError, UnsupportedError
from polyaccel.mesh import MeshSpec
from polyaccel.precision import MIXED_PRECISIONS
from polyaccel.registry import load_backend
from polyaccel.testing.averaging import Averaging
from polyaccel.testing.reference import BIAS, GLOBAL_BATCH, LR, TOLERANCE, WEIGHT, X, Y, number, on_host, reference
from polyaccel.testing.remembering import Remembering
from polyaccel.testing.weighting import Weighting
from polyaccel.tracking import list_runs
from polyaccel.tracking.comparison import Recording


class Conformance(Remembering, Averaging, Weighting):
    """Inherit, set `case`, and run with pytest. A test that the backend's capabilities exclude is not collected as a skip: it
    asserts the refusal instead."""

    case: Case
    cpu = True  # False: on the device that the backend finds; its `multiply_exactly` was called before

    # -- material ------------------------------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _ended(self) -> Iterator[None]:
        self._open: list[Accelerator] = []
        yield
        for accelerator in self._open:
            accelerator.free_memory()

    def accelerator(self, **arguments: Any) -> Accelerator:
        """An Accelerator on the case's backend."""
        accelerator = Accelerator(backend=self.case.backend, cpu=self.cpu, **arguments)
        self._open.append(accelerator)
        return accelerator

    def loader(self, accelerator: Accelerator, x: Any = X, y: Any = Y) -> Any:
        """A loader whose global batch is GLOBAL_BATCH on any number of data shards."""
        return self.case.loader(x, y, GLOBAL_BATCH // accelerator.num_data_shards)

    def prepared(self, accelerator: Accelerator, *, gamma: float | None = None) -> tuple[Any, ...]:
        """(model, optimizer, loader[, scheduler]), prepared in one call."""
        model = self.case.model(WEIGHT, BIAS)
        optimizer = self.case.optimizer(model, LR)
        loader = self.loader(accelerator)
        if gamma is None:
            return tuple(accelerator.prepare(model, optimizer, loader))
        return tuple(accelerator.prepare(model, optimizer, loader, self.case.scheduler(optimizer, gamma)))

    def forms(self) -> list[str]:
        """The forms of a step that the backend offers."""
        capabilities = load_backend(self.case.backend).capabilities
        speaks_natively = getattr(self.case, "dialect", capabilities.dialect) == capabilities.dialect
        value = ("backward_value" in capabilities.features and speaks_natively) or self.speaks_torch()
        return ["value", "function", "train_step"] if value else ["function", "train_step"]

    def speaks_torch(self) -> bool:
        """Whether the case is written in the torch dialect (whose loss values can be differentiated on every engine)."""
        return bool(getattr(self.case, "dialect", None) == "torch")

    def train(
        self,
        form: str,
        accelerator: Accelerator,
        prepared: tuple[Any, ...],
        *,
        epochs: int = 1,
        max_norm: float | None = None,
    ) -> list[float]:
        """The losses of a training run in one of the three forms; global means."""
        model, optimizer, loader, *rest = prepared
        scheduler = rest[0] if rest else None
        losses = []
        step = (
            accelerator.train_step(self.case.loss, model, optimizer, scheduler, max_norm)
            if form == "train_step"
            else None
        )
        for _ in range(epochs):
            for batch in loader:
                if step is not None:
                    losses.append(number(step(batch)))
                    continue
                with accelerator.accumulate(model):
                    if form == "function":
                        losses.append(number(accelerator.backward(self.case.loss, model, batch)))
                    else:
                        loss = self.case.loss(model, batch)
                        accelerator.backward(loss)
                        losses.append(
                            number(accelerator.reduce(loss, "mean") if accelerator.num_processes > 1 else loss)
                        )
                    if max_norm is not None:
                        accelerator.clip_grad_norm_(self.case.parameters(model), max_norm)
                    optimizer.step()
                    if scheduler is not None:
                        scheduler.step()
                    optimizer.zero_grad()
        return losses

    def assert_equals(
        self, accelerator: Accelerator, model: Any, losses: list[float], expected: tuple[Any, ...]
    ) -> None:
        """Losses and final weights are those of the reference."""
        np.testing.assert_allclose(losses, expected[0], rtol=TOLERANCE, atol=TOLERANCE)
        weights = self.case.weights(accelerator.unwrap_model(model))
        np.testing.assert_allclose(weights["weight"], expected[1], rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(weights["bias"], expected[2], rtol=TOLERANCE, atol=TOLERANCE)

    # -- the step ------------------------------------------------------------------------------------------------------

    def test_every_form_of_a_step_gives_the_numbers_of_the_mathematics(self) -> None:
        for form in self.forms():
            accelerator = self.accelerator()
            prepared = self.prepared(accelerator)
            losses = self.train(form, accelerator, prepared, epochs=2)
            self.assert_equals(accelerator, prepared[0], losses, reference(epochs=2))

    def test_accumulated_micro_batches_equal_one_large_batch_of_the_reference(self) -> None:
        for form in self.forms():
            accelerator = self.accelerator(gradient_accumulation_steps=2)
            prepared = self.prepared(accelerator)
            losses = self.train(form, accelerator, prepared, epochs=2)
            self.assert_equals(accelerator, prepared[0], losses, reference(epochs=2, accumulate=2))

    def test_a_short_window_closes_at_the_end_of_the_loader(self) -> None:
        for form in self.forms():
            accelerator = self.accelerator(gradient_accumulation_steps=3)  # four batches: windows of three and one
            prepared = self.prepared(accelerator)
            losses = self.train(form, accelerator, prepared, epochs=2)
            self.assert_equals(accelerator, prepared[0], losses, reference(epochs=2, accumulate=3))

    def test_clipping_by_norm_is_that_of_the_reference(self) -> None:
        for form in self.forms():
            accelerator = self.accelerator()
            prepared = self.prepared(accelerator)
            losses = self.train(form, accelerator, prepared, epochs=2, max_norm=0.3)
            self.assert_equals(accelerator, prepared[0], losses, reference(epochs=2, max_norm=0.3))

    def test_clipping_returns_the_norm_before_and_none_while_accumulating(self) -> None:
        accelerator = self.accelerator(gradient_accumulation_steps=2)
        model, _, loader = self.prepared(accelerator)
        norms = []
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(self.case.loss, model, batch)
                norms.append(accelerator.clip_grad_norm_(self.case.parameters(model), 1e-3))
                if accelerator.sync_gradients:
                    break
        error = X[: 2 * GLOBAL_BATCH].astype(np.float64) @ WEIGHT + BIAS - Y[: 2 * GLOBAL_BATCH]
        slope = 2 * error / error.size
        expected = np.sqrt(((X[: 2 * GLOBAL_BATCH].T @ slope) ** 2).sum() + (slope.sum(0) ** 2).sum())
        assert norms[0] is None
        assert number(norms[1]) == pytest.approx(expected, rel=TOLERANCE)

    def test_clipping_by_value_bounds_every_element(self) -> None:
        accelerator = self.accelerator()
        model, optimizer, loader = self.prepared(accelerator)
        accelerator.backward(self.case.loss, model, next(iter(loader)))
        accelerator.clip_grad_value_(self.case.parameters(model), 1e-4)
        optimizer.step()
        moved = np.abs(self.case.weights(accelerator.unwrap_model(model))["weight"] - WEIGHT)
        assert moved.max() <= LR * 1e-4 * 1.01
        assert moved.max() > 0

    def test_a_scheduler_moves_with_real_updates_only(self) -> None:
        if not self.case.has_schedulers:
            pytest.skip("the dialect's schedules live inside its optimizers")
        for form in self.forms():
            accelerator = self.accelerator(gradient_accumulation_steps=2, split_batches=True)
            model = self.case.model(WEIGHT, BIAS)
            optimizer = self.case.optimizer(model, LR)
            loader = self.case.loader(X, Y, GLOBAL_BATCH)
            scheduler = self.case.scheduler(optimizer, 0.5)
            prepared = tuple(accelerator.prepare(model, optimizer, loader, scheduler))
            losses = self.train(form, accelerator, prepared, epochs=2)
            self.assert_equals(accelerator, prepared[0], losses, reference(epochs=2, accumulate=2, gamma=0.5))

    def test_without_split_batches_a_scheduler_takes_one_step_per_data_shard(self) -> None:
        if not self.case.has_schedulers:
            pytest.skip("the dialect's schedules live inside its optimizers")
        accelerator = self.accelerator()
        prepared = self.prepared(accelerator, gamma=0.5)
        self.train("function", accelerator, prepared)
        assert prepared[3].get_last_lr()[0] == pytest.approx(LR * 0.5 ** (4 * accelerator.num_data_shards))

    def test_two_backwards_before_a_step_add_their_gradients(self) -> None:
        accelerator = self.accelerator()
        model, optimizer, loader = self.prepared(accelerator)
        batch = next(iter(loader))
        accelerator.backward(self.case.loss, model, batch)
        accelerator.backward(self.case.loss, model, batch)
        optimizer.step()
        once = WEIGHT - reference(x=X[:GLOBAL_BATCH], y=Y[:GLOBAL_BATCH])[1]
        moved = WEIGHT - self.case.weights(accelerator.unwrap_model(model))["weight"]
        np.testing.assert_allclose(moved, 2 * once, rtol=1e-4, atol=TOLERANCE)

    def test_zero_grad_forgets_gradients(self) -> None:
        accelerator = self.accelerator()
        model, optimizer, loader = self.prepared(accelerator)
        accelerator.backward(self.case.loss, model, next(iter(loader)))
        optimizer.zero_grad()
        optimizer.step()
        np.testing.assert_array_equal(self.case.weights(accelerator.unwrap_model(model))["weight"], WEIGHT)

    def test_the_loss_function_may_return_auxiliary_values(self) -> None:
        def with_aux(model: Any, batch: Any) -> Any:
            loss = self.case.loss(model, batch)
            return loss, {"twice": getattr(loss, "value", loss) * 2}

        accelerator = self.accelerator()
        model, optimizer, loader = self.prepared(accelerator)
        batch = next(iter(loader))
        expected = reference()[0][0]
        loss, aux = accelerator.backward(with_aux, model, batch)
        assert number(loss) == pytest.approx(expected, rel=TOLERANCE)
        assert number(aux["twice"]) == pytest.approx(2 * expected, rel=TOLERANCE)
        optimizer.zero_grad()
        metrics = accelerator.train_step(with_aux, model, optimizer)(batch)
        assert number(metrics["loss"]) == pytest.approx(expected, rel=TOLERANCE)
        assert number(metrics["twice"]) == pytest.approx(2 * expected, rel=TOLERANCE)

    # -- data ----------------------------------------------------------------------------------------------------------

    def test_gather_for_metrics_counts_every_sample_once(self) -> None:
        accelerator = self.accelerator()
        rows = 21  # three batches of eight, the last of five: completed where there are several data shards
        loader = accelerator.prepare(self.loader(accelerator, X[:rows], Y[:rows]))
        seen = [on_host(accelerator.gather_for_metrics(batch["x"])) for batch in loader]
        np.testing.assert_array_equal(np.concatenate(seen), X[:rows])

    def test_a_loader_knows_its_length_and_its_end(self) -> None:
        accelerator = self.accelerator()
        loader = accelerator.prepare(self.loader(accelerator))
        ends = [loader.end_of_dataloader for _ in loader]
        assert len(loader) == len(ends) == 4
        assert ends == [False, False, False, True]

    def test_a_loader_left_early_is_no_longer_active(self) -> None:
        accelerator = self.accelerator()
        loader = accelerator.prepare(self.loader(accelerator))
        iterator = iter(loader)
        next(iterator)
        assert accelerator.gradient_state.active_dataloader is loader
        del iterator
        assert accelerator.gradient_state.active_dataloader is None

    # -- prepare -------------------------------------------------------------------------------------------------------

    def test_prepare_keeps_the_order_and_passes_unknown_objects_through(self) -> None:
        accelerator = self.accelerator()
        model = self.case.model(WEIGHT, BIAS)
        optimizer, loader, other = self.case.optimizer(model, LR), self.loader(accelerator), object()
        a, b, c, d = accelerator.prepare(loader, other, optimizer, model)
        assert b is other
        losses = self.train("function", accelerator, (d, c, a))
        self.assert_equals(accelerator, d, losses, reference())

    def test_preparing_a_model_again_gives_the_same_object(self) -> None:
        accelerator = self.accelerator()
        model = self.case.model(WEIGHT, BIAS)
        first = accelerator.prepare(model)
        assert accelerator.prepare(model) is first
        assert accelerator.prepare(first) is first

    def test_preparing_a_loader_again_gives_the_same_object(self) -> None:
        accelerator = self.accelerator()
        loader = accelerator.prepare(self.loader(accelerator))
        assert accelerator.prepare(loader) is loader

    def test_an_optimizer_of_another_model_is_refused(self) -> None:
        accelerator = self.accelerator()
        # Of another shape: an nnx.Optimizer keeps no reference to its model, and only its state tells.
        model, other = self.case.model(WEIGHT, BIAS), self.case.model(np.zeros((5, 2), np.float32), BIAS)
        optimizer = self.case.optimizer(other, LR)
        with pytest.raises(PolyaccelError):
            accelerator.prepare(model, optimizer)

    def test_train_step_refuses_a_model_that_is_not_prepared(self) -> None:
        accelerator = self.accelerator()
        _, optimizer, _ = self.prepared(accelerator)
        with pytest.raises(PrepareError, match="not a prepared model"):
            accelerator.train_step(self.case.loss, self.case.model(WEIGHT, BIAS), optimizer)

    def test_unwrap_gives_the_users_own_object(self) -> None:
        accelerator = self.accelerator()
        model = self.case.model(WEIGHT, BIAS)
        assert type(accelerator.unwrap_model(accelerator.prepare(model))) is type(model)

    def test_free_memory_drops_everything(self) -> None:
        accelerator = self.accelerator()
        model, optimizer, _ = self.prepared(accelerator)
        assert accelerator.free_memory(model, optimizer) == [None, None]
        assert not [*accelerator._models, *accelerator._optimizers, *accelerator._dataloaders]

    # -- between processes ---------------------------------------------------------------------------------------------

    def test_collectives_of_one_process_give_their_input(self) -> None:
        accelerator = self.accelerator()
        if accelerator.num_processes > 1:
            pytest.skip("this job has several processes; tests/launch compares them")
        array = self.case.array(np.arange(6, dtype=np.float32).reshape(3, 2))
        tree = {"a": array, "b": [array]}
        for result in (accelerator.gather(tree), accelerator.reduce(tree, "mean"), accelerator.broadcast(tree)):
            np.testing.assert_array_equal(np.asarray(result["b"][0]), np.asarray(array))
        assert accelerator.gather_object([1, "a"]) == [1, "a"]
        assert accelerator.broadcast_object_list([{"a": 1}]) == [{"a": 1}]
        accelerator.wait_for_everyone()

    def test_the_store_gives_what_was_last_written_and_does_not_wait(self) -> None:
        engine = self.accelerator()._engine
        store = engine.collectives.store()
        assert store.get("polyaccel.conformance/nobody-writes-this") is None
        for text in ("first", "second"):
            store.set(f"polyaccel.conformance/{engine.topology.process_index}", text)
        assert store.get(f"polyaccel.conformance/{engine.topology.process_index}") == "second"

    def test_every_operation_between_processes_is_known_to_its_calls(self) -> None:
        collectives = self.accelerator()._engine.collectives
        with collectives.calls("conformance", "detail") as call:
            assert (call.operation, call.detail) == ("conformance", "detail")
        collectives.barrier("conformance")
        assert not collectives.calls.is_broken

    def test_objects_between_processes_survive_the_wire(self) -> None:
        engine = self.accelerator()._engine
        value = {"n": 1, "x": [1.5, float("inf"), None, True], "s": ("a", b"b"), "array": np.arange(3)}
        (back,) = engine.collectives.all_gather_object(value)[:1]
        assert back["n"] == 1
        assert back["x"] == value["x"]
        assert back["s"] == value["s"]
        np.testing.assert_array_equal(back["array"], value["array"])

    # -- what is not declared is refused -------------------------------------------------------------------------------

    def test_mixed_precision_is_what_the_backend_declares(self) -> None:
        declared = load_backend(self.case.backend).capabilities.mixed_precision
        for name in MIXED_PRECISIONS:
            if name not in declared:
                with pytest.raises(UnsupportedError, match=name):
                    self.accelerator(mixed_precision=name)
                continue
            accelerator = self.accelerator(mixed_precision=name)
            model, optimizer, loader = self.prepared(accelerator)
            step = accelerator.train_step(self.case.loss, model, optimizer)
            losses, skipped = [], []
            for batch in [batch for _ in range(3) for batch in loader]:
                losses.append(number(step(batch)))
                if accelerator.optimizer_step_was_skipped:
                    skipped.append(len(losses) - 1)
            # The loss scale starts too high for some losses and is halved until it fits: those updates are skipped and reported.
            assert name == "fp16" or not skipped
            assert len(skipped) < len(losses) // 2
            # bfloat16 keeps 8 bits of mantissa, float16 11: one part in 256 or 2048 per product, averaged over the batch.
            tolerance = {"no": TOLERANCE, "fp16": 5e-3, "bf16": 3e-2}[name]
            np.testing.assert_allclose(losses, reference(epochs=3, skipped=skipped)[0], rtol=tolerance)

    def test_handlers_switch_narrow_numbers_and_loss_scaling_off(self) -> None:
        for name in load_backend(self.case.backend).capabilities.mixed_precision - {"no"}:
            off = [AutocastKwargs(enabled=False), GradScalerKwargs(enabled=False)]
            accelerator = self.accelerator(mixed_precision=name, kwargs_handlers=off)
            model, optimizer, loader = self.prepared(accelerator)
            step = accelerator.train_step(self.case.loss, model, optimizer)
            with accelerator.autocast(AutocastKwargs(enabled=False)):
                losses = [number(step(batch)) for batch in loader]
            np.testing.assert_allclose(losses, reference(epochs=1)[0], rtol=TOLERANCE)

    def test_mesh_axes_are_what_the_backend_declares(self) -> None:
        declared = load_backend(self.case.backend).capabilities.mesh_axes
        for axis in MeshSpec().sizes:
            if axis not in declared:
                with pytest.raises(PolyaccelError):
                    self.accelerator(mesh={axis: 2})

    def test_a_mesh_that_does_not_fit_names_both_numbers(self) -> None:
        with pytest.raises(PolyaccelError, match=r"64.*devices"):
            self.accelerator(mesh={"data": 64})

    def test_mistakes_in_the_configuration_are_shown_all_at_once(self) -> None:
        with pytest.raises(ConfigError) as caught:
            self.accelerator(mixed_precision="bf61", gradient_accumulation_steps=0)
        assert "bf61" in str(caught.value)
        assert "did you mean 'bf16'" in str(caught.value)
        assert "gradient_accumulation_steps" in str(caught.value)

    # -- trackers ------------------------------------------------------------------------------------------------------

    def test_logged_losses_are_those_of_the_mathematics(self, tmp_path: Path) -> None:
        accelerator = self.accelerator(project_dir=tmp_path)
        model, optimizer, loader = self.prepared(accelerator)
        step = accelerator.train_step(self.case.loss, model, optimizer)
        accelerator.init_trackers("conformance", config={"lr": LR})
        for index, batch in enumerate(loader):
            accelerator.log({"loss": step(batch)}, step=index)
        accelerator.tracking.finish()
        (run,) = list_runs(tmp_path / "runs")
        assert run.facts["engine"]["backend"] == self.case.backend
        steps, losses = zip(*run.series("loss"), strict=True)
        assert steps == tuple(range(len(steps)))
        np.testing.assert_allclose(losses, reference()[0], rtol=TOLERANCE, atol=TOLERANCE)

    # -- looking -------------------------------------------------------------------------------------------------------

    def test_a_bar_counts_the_steps_and_samples_of_a_loader_and_leaves_the_loop_as_it_was(self, tmp_path: Path) -> None:
        accelerator = self.accelerator(project_dir=tmp_path)
        prepared = self.prepared(accelerator)
        step = accelerator.train_step(self.case.loss, *prepared[:2])
        accelerator.init_trackers("conformance")
        ends, losses = [], []
        for batch in accelerator.progress(prepared[2], description="train"):
            losses.append(number(step(batch)))
            ends.append(accelerator.gradient_state.end_of_dataloader)
        accelerator.tracking.finish()
        assert ends == [False, False, False, True]
        self.assert_equals(accelerator, prepared[0], losses, reference())
        (run,) = list_runs(tmp_path / "runs")
        (noted,) = run.events("progress")
        assert (noted["description"], noted["num_steps"], noted["is_over"]) == ("train", 4, True)
        if (
            noted["steps_per_s"] is None
        ):  # a busy machine: who waits for the device saw the first step end with the last
            assert noted["measured_s"] == 0
            assert noted["samples_per_s"] is None
        else:
            assert noted["samples_per_s"] == pytest.approx(GLOBAL_BATCH * noted["steps_per_s"])
            assert 0 <= noted["data_share"] <= 1

    def test_a_profile_has_the_steps_that_its_schedule_records(self, tmp_path: Path) -> None:
        accelerator = self.accelerator()
        settings = ProfileKwargs(
            schedule_option={"skip_first": 1, "wait": 1, "warmup": 1, "active": 1, "repeat": 1},
            output_trace_dir=tmp_path,
        )
        if "profile" not in load_backend(self.case.backend).capabilities.features:
            with pytest.raises(UnsupportedError, match="profile"):
                accelerator.profile(settings)
            return
        model, optimizer, loader = self.prepared(accelerator)
        step = accelerator.train_step(self.case.loss, model, optimizer)
        with accelerator.profile(settings) as profile:
            for batch in [batch for _ in range(2) for batch in loader]:
                with profile.span("my span"):
                    step(batch)
                profile.step()
        assert profile.files
        assert all(file.stat().st_size for file in profile.files)
        for file in profile.files:  # XLA's own format holds texts as they are
            content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            if ".json" in file.name:
                names = {event.get("name") for event in json.loads(content)["traceEvents"]}
                assert "my span" in names
                assert len({"ProfilerStep#3", "ProfilerStep 3"} & names) == 1
                assert not {"ProfilerStep#2", "ProfilerStep 2"} & names
            elif file.name.endswith(".xplane.pb"):
                assert b"my span" in content

    def test_a_recorded_fused_step_tells_the_norms_of_its_updates_and_changes_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for accumulate in (1, 2):
            for max_norm in (None, 0.3):
                folder = tmp_path / f"{accumulate}-{max_norm}"
                monkeypatch.setenv("POLYACCEL_RECORD", str(folder))
                accelerator = self.accelerator(gradient_accumulation_steps=accumulate)
                prepared = self.prepared(accelerator)
                losses = self.train("train_step", accelerator, prepared, max_norm=max_norm)
                expected = reference(accumulate=accumulate, max_norm=max_norm)
                self.assert_equals(accelerator, prepared[0], losses, expected)
                accelerator.end_training()
                norms = Recording("this", folder).grad_norms
                assert [step for step, _ in norms] == list(range(4 // accumulate))
                rows = slice(0, accumulate * GLOBAL_BATCH)
                error = X[rows].astype(np.float64) @ WEIGHT + BIAS - Y[rows]
                slope = 2 * error / error.size
                first = np.sqrt(((X[rows].T @ slope) ** 2).sum() + (slope.sum(0) ** 2).sum())
                assert norms[0][1] == pytest.approx(first, rel=TOLERANCE)

    # -- state ---------------------------------------------------------------------------------------------------------

    def test_state_read_from_one_model_can_be_written_to_another(self) -> None:
        accelerator = self.accelerator()
        trained, optimizer, loader = self.prepared(accelerator)
        self.train("function", accelerator, (trained, optimizer, loader))
        engine = accelerator._engine
        shards = list(engine.read_state(accelerator._prepared.handle_of(trained, "model", argument="model")))
        assert all(shard.offset == (0,) * len(shard.global_shape) or shard.data.size for shard in shards)
        fresh = accelerator.prepare(self.case.model(np.zeros_like(WEIGHT), BIAS))
        engine.write_state(accelerator._prepared.handle_of(fresh, "model", argument="model"), shards)
        before = self.case.weights(accelerator.unwrap_model(trained))
        after = self.case.weights(accelerator.unwrap_model(fresh))
        np.testing.assert_array_equal(after["weight"], before["weight"])

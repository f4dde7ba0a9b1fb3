"""What goes in and what comes out: prepare, its entries by type, and the user's own objects again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

from polyaccel.accumulation import SchedulerGate
from polyaccel.big_models import init_empty_where_torch_is_used
from polyaccel.config.loading import DataLoaderConfiguration
from polyaccel.data.spec import LoaderSpec
from polyaccel.errors import UnsupportedError
from polyaccel.facade.parts import Parts
from polyaccel.prepare import is_spread, placements_of
from polyaccel.schedules import steps_per_update
from polyaccel.unwrapping import without_wrappers

_LOADER_SETTINGS = tuple([field.name for field in fields(DataLoaderConfiguration)])


class Preparing(Parts):
    """From a script's objects to the engine's, and back."""

    def prepare(self, *objects: Any, device_placement: Sequence[bool | None] | None = None) -> Any:
        """Hand models, optimizers, loaders and schedulers to the engine; use what it returns instead of them.

        Any number, in any order; returned in the order given (one object alone, not in a tuple). What is prepared already, and objects
        that no engine needs, are returned as they are; an iterable among them that has `state_dict` and `load_state_dict` is registered
        for checkpointing. Must be called on every process.

        Args:
            device_placement: one value per object, in place of the constructor's `device_placement`: False leaves a model where it is
                and a loader's batches where the loader made them. Optimizers are where their parameters are.

        Raises PrepareError before anything is prepared, and UnsupportedError for False on engines that place everything themselves.
        """
        placements = placements_of(device_placement, len(objects), default=self.config.device_placement)
        prepared = self._prepared.prepare(objects, spec=self._loader_spec(), placements=placements)
        results = [self._gated(value) for value in prepared]
        if foreign := [value for value in results if self._prepared.is_foreign_loader(value)]:
            run: Any = self  # checkpoints are another topic of the facade
            run.register_for_checkpointing(*foreign)
        return results[0] if len(results) == 1 else tuple(results)

    def create_model(self, make: Callable[[], Any]) -> Any:
        """The model that `make()` returns, made for `prepare` without ever being whole on one device or in host memory.

        A flax module (nnx, or linen as `module.bind(module.init(key, x))`) is computed by one program, each device its own part. A torch
        module gets no memory until `prepare`, which has its layers compute their values one after another by `reset_parameters()`, and
        refuses what these would not make; on the torch engine so where the mesh has fsdp or tensor. Elsewhere it is `make()`. Must be
        called on every process.
        """
        if "create_model" not in self._features:
            return make()
        knows_itself = self._prepared.is_of_torch  # when a module is to be empty
        with nullcontext() if knows_itself else init_empty_where_torch_is_used():
            return self._engine.create_model(make)  # type: ignore[attr-defined]

    def prepare_model(self, model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        """`prepare` for one model; with `evaluation_mode` it is placed but not set up for gradient exchange."""
        placements = placements_of([device_placement], 1, default=self.config.device_placement)
        return self._prepared.prepare(
            (model,), spec=self._loader_spec(), placements=placements, evaluation_mode=evaluation_mode
        )[0]

    def prepare_optimizer(self, optimizer: Any, device_placement: bool | None = None) -> Any:
        """`prepare` for one optimizer."""
        return self.prepare(optimizer, device_placement=[device_placement])

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """`prepare` for one scheduler."""
        return self.prepare(scheduler)

    def prepare_data_loader(
        self,
        data_loader: Any,
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Callable[..., Any] | None = None,
    ) -> Any:
        """`prepare` for one loader; also for any iterable of batches, which `prepare` alone would pass through.

        Raises UnsupportedError for a `slice_fn_for_dispatch`: batches are cut by rows.
        """
        if slice_fn_for_dispatch is not None:
            raise UnsupportedError(
                "prepare_data_loader cannot cut batches by a slice_fn_for_dispatch",
                "let the loader's collate_fn give rows",
            )
        placements = placements_of([device_placement], 1, default=self.config.device_placement)
        spec = self._loader_spec()
        return self._prepared.prepare((data_loader,), spec=spec, placements=placements, unknown="loader")[0]

    @property
    def dataloader_config(self) -> DataLoaderConfiguration:
        """How loaders are prepared. May be set to another one, for loaders that are prepared from then on."""
        return DataLoaderConfiguration(**{name: getattr(self.config, name) for name in _LOADER_SETTINGS})

    @dataloader_config.setter
    def dataloader_config(self, value: DataLoaderConfiguration) -> None:
        self.config = replace(self.config, **{name: getattr(value, name) for name in _LOADER_SETTINGS})
        self.plan = replace(self.plan, split_batches=value.split_batches, even_batches=value.even_batches)

    def _loader_spec(self) -> LoaderSpec:
        config = self.config
        return LoaderSpec(
            split_batches=self.plan.split_batches,
            even_batches=self.plan.even_batches,
            rng_types=config.rng_types,
            dispatch_batches=config.dispatch_batches,
            use_seedable_sampler=config.use_seedable_sampler,
            data_seed=config.data_seed,
            use_stateful_dataloader=config.use_stateful_dataloader,
            non_blocking=config.non_blocking,
            device_placement=config.device_placement,
            prefetch=config.prefetch_batches,
            read_in_background=config.read_in_background,
        )

    def _gated(self, value: Any) -> Any:
        entry = self._prepared.entry_of(value)
        if entry is None or entry.role != "scheduler" or isinstance(value, SchedulerGate):
            return value
        is_first = not any(isinstance(other, SchedulerGate) for other in self._prepared.public("scheduler"))
        gate = SchedulerGate(
            entry.handle,
            self._prepared.optimizers_of(entry.original),
            self.gradient_state,
            steps_per_update=steps_per_update(self.config, self.plan, self._engine.topology, is_first=is_first),
            follows_optimizer=self.config.step_scheduler_with_optimizer,
            counts_waiting=self.config.adjust_scheduler,
        )
        return self._prepared.replace_public(entry, gate).public

    # -- back ----------------------------------------------------------------------------------------------------------

    def unwrap_model(self, model: Any, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        """The user's own model, with current values; also of a model that is not prepared, without data parallel wrappers.

        Args:
            keep_fp32_wrapper: False: calling it computes in the parameters' own precision from now on, without `mixed_precision`; a
                model in one process is the prepared model itself, which then does so too.
            keep_torch_compile: False: without the torch.compile that the script put around it.
        """
        entry = self._prepared.entry_of(model)
        if entry is not None and entry.role == "model":
            own = self._engine.unwrap(entry.handle)
            model = own if self._prepared.bridge is None else self._prepared.bridge.unwrap(own)
            if not keep_fp32_wrapper and hasattr(self._engine, "remove_autocast"):
                self._engine.remove_autocast(model)
        return without_wrappers(model, keep_forward=keep_fp32_wrapper, keep_torch_compile=keep_torch_compile)

    def verify_device_map(self, model: Any) -> bool:
        """Whether a device_map has spread the model, or a part of it, over several devices (`dispatch_model`)."""
        return is_spread(model)

    def free_memory(self, *objects: Any) -> list[None]:
        """Drop every prepared object and wait for the device; returns one None per argument, to overwrite the script's names."""
        self._prepared.forget()
        self._engine.synchronize()
        return [None for _ in objects]

    clear = free_memory

    # Accelerate's lists of what was prepared; scripts of its users read them.

    @property
    def _models(self) -> list[Any]:
        return self._prepared.public("model")

    @property
    def _optimizers(self) -> list[Any]:
        return self._prepared.public("optimizer")

    @property
    def _schedulers(self) -> list[Any]:
        return self._prepared.public("scheduler")

    @property
    def _dataloaders(self) -> list[Any]:
        return self._prepared.public("loader")

"""Checkpoints under Accelerate's names: everything that a run remembers, saved and continued, on any engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from polyaccel.data import PreparedLoader, skip_first_batches
from polyaccel.facade.parts import Parts
from polyaccel.tracking import describe_job, package_versions
from polyaccel.unwrapping import without_wrappers

if TYPE_CHECKING:  # loaded by the first script that saves or loads
    from polyaccel.checkpoint.manager import Manager, RemovableHandle
    from polyaccel.checkpoint.run import Run


class Checkpoints(Parts):
    """Saving and continuing a run."""

    def save_state(
        self,
        output_dir: str | PathLike[str] | None = None,
        safe_serialization: bool = True,
        *,
        blocking: bool | None = None,
    ) -> str:
        """Save models, optimizers, schedulers, loaders' positions, loss scale, random states, gradients of an open accumulation window,
        and registered objects.

        Args:
            output_dir: the checkpoint's folder, or a URL that fsspec understands; a checkpoint that is there is replaced once this one is
                complete. None: `project_dir/checkpoints/checkpoint_<iteration>`.
            safe_serialization: only True: nothing in a checkpoint is pickled.
            blocking: True returns when the checkpoint is complete on the disk. Otherwise training goes on as soon as everything is copied
                to host memory, and a failure to write is raised by the next call about checkpoints, or by `end_training`. None: the
                setting blocking_saves, which is False.

        Returns the folder. Every process must call it, outside of `is_main_process`. Raises CheckpointError, before anything is written,
        where the folder cannot be used, and naming what cannot be saved.
        """
        from polyaccel.checkpoint.export import require_safe

        require_safe(safe_serialization)
        return self._checkpoints.save(output_dir, blocking=self.config.blocking_saves if blocking is None else blocking)

    def load_state(
        self, input_dir: str | PathLike[str] | None = None, *, map_location: Literal["cpu", "on_device"] | None = None
    ) -> str:
        """Continue exactly where a checkpoint was saved; prepare and register everything first, as the script that saved it did.

        Without `input_dir` the newest whole checkpoint of the project, and the log says which ones were passed over and why. The
        next pass over a loader goes on after the last batch that was used; `skip_first_batches` does not skip twice. The engine, the
        number of processes and the devices may be others than before.

        Args:
            input_dir: the checkpoint's folder or URL.
            map_location: Accelerate's place on the way; each array is read into the place of what it belongs to, whichever is named.

        Returns the folder. Every process must call it. Raises CheckpointError, before anything is changed, where the checkpoint is
        damaged or does not fit, and TypeError for another `map_location`.
        """
        if map_location not in (None, "cpu", "on_device"):
            raise TypeError(
                f"Unsupported optimizer map location passed: {map_location!r} is neither 'cpu' nor 'on_device'"
            )
        return self._checkpoints.load(input_dir)

    @property
    def has_checkpoint(self) -> bool:
        """Whether `load_state()` has something to continue from: False in the first life of a project. Every process must ask."""
        return self._checkpoints.has_any()

    def wait_for_checkpoint(self) -> None:
        """Return when the last `save_state` is complete on the disk. Raises CheckpointError where it failed."""
        self._checkpoints.wait()

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Save these objects with the rest: what `state_dict()` gives (plain values, arrays, nested), which `load_state_dict` gets back.

        Raises CheckpointError naming those without the two methods.
        """
        self._checkpoints.register(objects)

    def register_save_state_pre_hook(self, hook: Callable[[list[Any], list[Any], str], Any]) -> RemovableHandle:
        """Call `hook(models, weights, folder)` before every save. What it writes into `folder` becomes part of the checkpoint; a model
        whose weights it takes out of the list is left to it. Returns a handle with `remove()`."""
        return self._checkpoints.add_save_hook(hook)

    def register_load_state_pre_hook(self, hook: Callable[[list[Any], str], Any]) -> RemovableHandle:
        """Call `hook(models, folder)` before every load; a model that it takes out of the list is left to it. Returns a handle with
        `remove()`."""
        return self._checkpoints.add_load_hook(hook)

    @property
    def save_iteration(self) -> int:
        """The number of the next automatically named checkpoint; `load_state` sets it behind those that are there."""
        return self.project_configuration.iteration

    def save_model(
        self,
        model: Any,
        save_directory: str | PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write a model's weights for other libraries: model.safetensors, or several files and model.safetensors.index.json.

        Args:
            save_directory: a local folder; weights that it held before are replaced once the new ones are complete.
            max_shard_size: of one file: "10GB" (powers of 1000), "1GiB" (powers of 1024), or bytes. A larger array has a file of its own.
            safe_serialization: only True: pickled weights run code when they are loaded.

        A torch module need not be prepared, and its weights may be offloaded. Tied parameters are written once, under their first name.
        Every process must call it; process 0 writes. Raises CheckpointError.
        """
        from polyaccel.big_models import get_state_dict_offloaded_model
        from polyaccel.checkpoint.export import export_weights, metadata_of, require_safe
        from polyaccel.checkpoint.weights import plain_state_dict, shards_of

        require_safe(safe_serialization)
        entry = self._prepared.entry_of(model)
        if entry is not None and entry.role == "model":
            pieces = self._engine.read_state(entry.handle)
        else:  # every process has all of it
            state = plain_state_dict(without_wrappers(model), get_state_dict_offloaded_model)
            pieces = shards_of(state) if self._engine.topology.is_main_process else iter(())
        export_weights(
            pieces,
            save_directory,
            max_shard_size=max_shard_size,
            metadata=metadata_of(model if entry is None else entry.original),
            gather=self._engine.collectives.all_gather_object,
            process_index=self._engine.topology.process_index,
        )

    def save(self, obj: Any, f: str | PathLike[str], safe_serialization: bool = True) -> None:
        """Write a dict of arrays (a state_dict) as one safetensors file, from process 0; other processes do nothing.

        Raises CheckpointError for anything but a dict of arrays by name, and for a file name that promises a pickle (.pt, .bin).
        """
        from polyaccel.checkpoint.export import require_safe, save_arrays

        require_safe(safe_serialization)
        if self._engine.topology.is_main_process:
            save_arrays(obj, f)

    @property
    def step(self) -> int:
        """Micro batches that `accumulate` and `train_step` counted since a loader's last pass ended; `load_state` restores it."""
        return int(self.gradient_state.step)

    def get_state_dict(self, model: Any, unwrap: bool = True) -> Any:
        """A model's parameters and buffers by its own names, with present values, as the script's framework has them.

        torch scripts get what `model.state_dict()` gives, flax scripts numpy arrays. `unwrap` is Accelerate's, and names have no wrapper's
        prefix in any case. A torch module need not be prepared, and its weights may be offloaded.
        """
        from polyaccel.big_models import get_state_dict_offloaded_model
        from polyaccel.checkpoint.weights import plain_state_dict, state_dict_of

        if (entry := self._prepared.entry_of(model)) is None or entry.role != "model":
            values = plain_state_dict(without_wrappers(model), get_state_dict_offloaded_model)
            return {name: value.detach() if hasattr(value, "detach") else value for name, value in values.items()}
        handle = self._prepared.handle_of(model, "model", argument="model")
        bridge = self._prepared.bridge
        own = self._engine.unwrap(handle)
        own = own if bridge is None else bridge.unwrap(own)
        return state_dict_of(self._engine, bridge, handle, own)

    def skip_first_batches(self, dataloader: PreparedLoader, num_batches: int = 0) -> PreparedLoader:
        """The same loader without the first `num_batches` batches of its passes; after `load_state` they count from the start of the pass
        that is continued, so that what was skipped is not skipped twice."""
        return skip_first_batches(dataloader, num_batches)

    @cached_property
    def _checkpoints(self) -> Manager:
        from polyaccel.checkpoint.manager import Job, Manager
        from polyaccel.checkpoint.run import settings_of

        topology, collectives = self._engine.topology, self._engine.collectives
        job = Job(
            run=self._live_run,
            share=lambda value: collectives.all_gather_object(value)[0],
            gather=collectives.all_gather_object,
            facts=lambda: {
                **describe_job(self.backend, topology, self.plan),
                "config": settings_of(self.config),
                "packages": package_versions(),
            },
            weights=lambda part: self.get_state_dict(part.public),
            completed=lambda path: self.tracking.event("checkpoint", path=path),
        )
        return Manager(
            self.project_configuration,
            job,
            process_index=topology.process_index,
            num_processes=topology.num_processes,
        )

    def _live_run(self, registered: tuple[Any, ...]) -> Run:
        from polyaccel.checkpoint.run import Run, parts_of

        entries = self._prepared.entries
        return Run(
            engine=self._engine,
            models=parts_of(entries, "model"),
            optimizers=parts_of(entries, "optimizer"),
            schedulers=parts_of(entries, "scheduler"),
            loaders=parts_of(entries, "loader"),
            registered=registered,
            window=self.gradient_state,
            backend=self.backend,
            seed=self.config.seed,
            data_shard=self._data_shard(),
        )

    def _data_shard(self) -> tuple[int, int] | None:
        """Which of how many data shards has the gradients of this process between updates; None where all of them have the same."""
        if "gradient_sync" not in self._features or self.config.sync_each_batch:
            return None
        topology, num_sharing = self._engine.topology, self.plan.num_processes_per_shard
        return topology.process_index // num_sharing, topology.num_processes // num_sharing

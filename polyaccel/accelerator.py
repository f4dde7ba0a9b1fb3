"""The facade: Hugging Face Accelerate's names and meaning, forwarded to the engine. It decides nothing and knows no backend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, Literal

from polyaccel import jobs, seeding
from polyaccel.accumulation import GradientState
from polyaccel.config import Config
from polyaccel.config.accumulating import GradientAccumulationPlugin
from polyaccel.config.arguments import config_of_arguments, profile_settings
from polyaccel.config.compiling import DynamoBackend, TorchDynamoPlugin
from polyaccel.config.handler import KwargsHandler
from polyaccel.config.loading import DataLoaderConfiguration
from polyaccel.config.parallel import FullyShardedDataParallelPlugin, ParallelismConfig, TorchTensorParallelPlugin
from polyaccel.config.project import ProjectConfiguration
from polyaccel.dialects import of_script
from polyaccel.errors import NotStartedError
from polyaccel.facade import Checkpoints, Collectives, Looking, Preparing, Settings, Steps, Tracking
from polyaccel.gathering import Gathering
from polyaccel.launch.rendezvous import from_environment
from polyaccel.mesh import MeshSpec
from polyaccel.plan import Plan, make_plan, say_remarks
from polyaccel.preemption import TRACKERS_S, Preemption
from polyaccel.prepare import Preparation
from polyaccel.processes import Trigger
from polyaccel.protocols import CompileEvent
from polyaccel.registry import choose_backend
from polyaccel.sharding.rules import ShardingRule
from polyaccel.tracking import Observer, Session, describe_job


class Accelerator(Settings, Preparing, Steps, Collectives, Tracking, Looking, Checkpoints):
    """One training script, on the engine that the configuration names.

    Args:
        backend: "torch", "xla", "jax", the name of an installed third-party backend, or "auto": the usable one whose
            framework the script has imported.
        mixed_precision: "no", "bf16" or "fp16". Parameters stay float32; fp16 scales the loss dynamically.
        gradient_accumulation_steps: batches per optimizer update, counted by `accumulate` and by `train_step`.
        gradient_accumulation_plugin: a GradientAccumulationPlugin, for everything about accumulation.
        mesh: axis sizes such as {"data": 4}; -1 infers one axis from the devices of the job.
        sharding_rules: ShardingRules, which say by name how parameters are cut over `mesh.fsdp` and `mesh.tensor`; the first that matches
            counts, and what none matches follows from the model's own plan, from its layers' names and from its shapes.
        remat: "full": a backward pass computes the inside of every block again instead of keeping it; "dots": all but products with
            weights; "none" by default. Numbers stay the same, memory goes, time comes.
        offload: "cpu": the parts of parameters, gradients and optimizer state that `mesh.fsdp` makes rest in host memory between uses.
        dataloader_config: a DataLoaderConfiguration, for everything about prepared loaders.
        split_batches: a loader's batch_size is the global batch and is cut over the data shards; by default it is the batch of
            one data shard.
        even_batches: complete the last global batch from the first samples, so that every shard has the same number of batches.
        device_placement: move models and batches to the process's device; False: the script does it.
        cpu: use the CPU even where an accelerator is present.
        rng_types: generators that all processes take from process 0 when a loader starts: "generator" (the sampler's own),
            "torch", "numpy", "python", "cuda".
        step_scheduler_with_optimizer: scheduler.step() moves only with real optimizer updates. False: every call is one step.
        scheduler_unit: "sample": an update moves a scheduler one step per data shard (one with split_batches), as Accelerate does;
            "step": one step.
        tail_window: "full": a short accumulation window at a loader's end is divided by gradient_accumulation_steps, as Accelerate
            does; "actual": by the batches that it has.
        partitioning: on jax, "pmap" (each device runs the program on its own batch; DDP's meaning), "sharding" (one program
            over the global batch), or "auto": pmap for torch scripts, sharding for flax scripts.
        compile, compile_backend: torch.compile the prepared model, with this torch.compile backend.
        dynamo_backend, dynamo_plugin: Accelerate's names of these: the backend alone, or a TorchDynamoPlugin with all of it.
        parallelism_config: a ParallelismConfig: Accelerate's names of the mesh's axes.
        fsdp_plugin: a FullyShardedDataParallelPlugin: mesh={"fsdp": -1}.
        torch_tp_plugin: a TorchTensorParallelPlugin: mesh={"data": -1, "tensor": tp_size}, with an fsdp_plugin {"fsdp": -1, ...}.
        compilation_cache: folder of the persistent compilation cache of compiling engines; "auto" or "off".
        preemption: "save": on SIGTERM or SIGUSR1 all processes save the same step and leave with exit code 75; "off" by default.
        log_with: trackers: a name ("wandb", "tensorboard", ...), a `GeneralTracker`, a list of these, or "all" that are installed. A run
            folder is written in any case, from `init_trackers` or the first `log` on.
        project_dir: folder of the project: checkpoints, and runs below `runs/`.
        project_config: a ProjectConfiguration, for everything else about them.
        kwargs_handlers: at most one each of AutocastKwargs, GradScalerKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs, and
            ProfileKwargs (what `profile` records).
        deepspeed_plugin, deepspeed_plugins, megatron_lm_plugin: refused; the error names what to use instead.

    A value left at None comes from its POLYACCEL_* environment variable, else from the configuration file, else it is the default.
    Must be created on every process of the job; it joins the processes. Raises ConfigError, PlanError, UnsupportedError,
    BackendNotFoundError, BackendUnavailableError or LaunchError before anything is changed.
    """

    def __init__(
        self,
        *,
        backend: str | None = None,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        mesh: MeshSpec | Mapping[str, int] | None = None,
        sharding_rules: Iterable[ShardingRule | str] | None = None,
        remat: Literal["none", "full", "dots"] | None = None,
        offload: Literal["none", "cpu"] | None = None,
        dataloader_config: DataLoaderConfiguration | None = None,
        split_batches: bool | None = None,
        even_batches: bool | None = None,
        device_placement: bool | None = None,
        cpu: bool | None = None,
        rng_types: list[str] | tuple[str, ...] | None = None,
        step_scheduler_with_optimizer: bool | None = None,
        scheduler_unit: Literal["sample", "step"] | None = None,
        tail_window: Literal["full", "actual"] | None = None,
        partitioning: Literal["auto", "pmap", "sharding"] | None = None,
        compile: bool | None = None,
        compile_backend: str | None = None,
        dynamo_backend: DynamoBackend | str | None = None,
        dynamo_plugin: TorchDynamoPlugin | None = None,
        parallelism_config: ParallelismConfig | None = None,
        fsdp_plugin: FullyShardedDataParallelPlugin | None = None,
        deepspeed_plugin: Any = None,
        deepspeed_plugins: Any = None,
        megatron_lm_plugin: Any = None,
        torch_tp_plugin: TorchTensorParallelPlugin | None = None,
        compilation_cache: str | None = None,
        preemption: Literal["off", "save"] | None = None,
        log_with: Any = None,
        project_dir: str | PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
        kwargs_handlers: Iterable[KwargsHandler] | None = None,
    ) -> None:
        self.config: Config = config_of_arguments(locals())
        chosen = choose_backend(self.config.backend)
        self._profile_handler = profile_settings(kwargs_handlers)
        expected = of_script()  # before the engine imports frameworks of its own
        self._engine = chosen.open(self.config, from_environment())
        capabilities = chosen.capabilities
        self.backend: str = chosen.name
        self.plan: Plan = make_plan(
            self.config,
            self._engine.topology,
            backend=chosen.name,
            mesh_axes=capabilities.mesh_axes,
            mixed_precision=capabilities.mixed_precision,
            features=capabilities.features,
        )
        self._engine.bind(self.plan)
        self.gradient_state = GradientState(
            self.plan.gradient_accumulation_steps,
            sync_with_dataloader=self.config.sync_with_dataloader,
            scales_tail=self.config.tail_window != "full",
        )
        self._engine.gradient_state = self.gradient_state
        index_of_shard = self._engine.topology.process_index // self.plan.num_processes_per_shard
        seeding.adopt(self._engine, self.config.seed, draws_as=index_of_shard)
        self._prepared = Preparation(self._engine, capabilities, chosen.name, expected=expected)
        # What is handed out below must not hold this object: it would be freed by the garbage collector alone.
        engine, prepared, plan, features = self._engine, self._prepared, self.plan, capabilities.features
        gathering = Gathering(
            engine,
            lambda: prepared.script_bridge,
            debug=self.config.debug,
            num_processes_per_shard=plan.num_processes_per_shard,
        )
        self._gathering = gathering
        self._trigger = Trigger(lambda flag: gathering.any_process(flag, "check_trigger"))
        self.project_configuration = ProjectConfiguration.of(project_config, project_dir)
        self.tracking = Session(
            log_with,
            self.project_configuration,
            process_index=self._engine.topology.process_index,
            describe=lambda: describe_job(chosen.name, engine.topology, plan),
            compile_events=lambda: _compile_events(engine, features),
            share=lambda value: gathering.broadcast_object_list([value])[0],
        )
        self._differentiates_values = "backward_value" in features
        self._features = features
        self._observer = self._recording() if self.config.record else None
        self._preemption = None if self.config.preemption == "off" else self._watching()
        say_remarks(self.plan, self._engine.topology)
        self._number = jobs.own(self)  # now that it is whole

    def _recording(self) -> Observer:
        seeding.seed_if_unset(self.config.seed)
        engine: Any = self._engine  # what it declares beside the seam
        observer = Observer(
            self.config.record,
            self.config.record_steps,
            self._engine,
            facts=describe_job(self.backend, self._engine.topology, self.plan),
            handles=self._prepared.handles,
            closes_window=lambda: self.gradient_state.sync_gradients,
            compile_events=lambda: self.compile_events if "compile_events" in self._features else None,
            device_memory=engine.device_memory if "device_stats" in self._features else None,
        )
        self._prepared.on_prepared.append(observer.prepared)
        return observer

    def _watching(self) -> Preemption:
        state, topology = self.gradient_state, self._engine.topology
        preemption = Preemption(
            self._engine.collectives.store,
            process_index=topology.process_index,
            num_processes=topology.num_processes,
            outermost_loader=state.outermost_dataloader,
            closes_window=lambda: state.sync_gradients,
            project_dir=self.project_configuration.project_dir,
            save=lambda: self.save_state(blocking=True),
            leave=self._leave_preempted,
        )
        self._prepared.on_prepared.append(lambda: preemption.prepared(self._prepared.handles("loader")))
        preemption.start()
        return preemption

    # -- what was decided ----------------------------------------------------------------------------------------------

    @property
    def mixed_precision(self) -> str:
        """ "no", "bf16" or "fp16"."""
        return self.plan.precision.name

    @property
    def compile_events(self) -> tuple[CompileEvent, ...]:
        """Every program compiled so far, with its cause; empty on engines without the feature "compile_events"."""
        return _compile_events(self._engine, self._features)

    # -- the end -------------------------------------------------------------------------------------------------------

    def end_training(self) -> None:
        """Wait for the device and the last checkpoint, finish the trackers within their deadline, and leave the job.

        Every process should call it; idempotent. Raises CheckpointError where a checkpoint could not be written, after all the rest.
        """
        self._engine.synchronize()
        if self._preemption is not None:
            self._preemption.close()
        if self._observer is not None:
            self._observer.finish()
        try:
            if "_checkpoints" in vars(self):  # something was saved or loaded
                self._checkpoints.close()
        finally:
            self.tracking.finish()
            self._engine.close()

    def _leave_preempted(self) -> None:
        self._engine.collectives.barrier("polyaccel.preemption")  # a launcher ends the others when the first leaves
        project = self.project_configuration
        project.tracker_finish_timeout_s = min(project.tracker_finish_timeout_s, TRACKERS_S)
        self.tracking.finish("preempted")
        self.end_training()

    def __deepcopy__(self, memo: dict[int, Any]) -> Accelerator:
        return self  # it stands for the process, of which there is one

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        # No model is written with it. The number is the same in every run of a script, so that caches that hash it stay valid.
        return _in_this_process, (self._number,)

    def __repr__(self) -> str:
        topology = self._engine.topology
        return (
            f"Accelerator(backend={self.backend!r}, mixed_precision={self.mixed_precision!r},"
            f" process {topology.process_index} of {topology.num_processes},"
            f" {topology.num_devices} x {topology.device_kind}, data shards {self.num_data_shards})"
        )


def _in_this_process(number: int) -> Accelerator:
    """What an Accelerator is unpickled as: the one of this number, in its own process the very same."""
    found: Accelerator | None = jobs.numbered(number)
    if found is None:
        raise NotStartedError(
            f"Accelerator number {number} was unpickled in a process that has made no such Accelerator",
            "pass the values that are needed there (accelerator.device, accelerator.process_index) instead of the Accelerator",
        )
    return found


def _compile_events(engine: Any, features: frozenset[str]) -> tuple[CompileEvent, ...]:
    return tuple(engine.compile_events) if "compile_events" in features else ()

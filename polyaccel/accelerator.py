"""The facade: Hugging Face Accelerate's names and meaning, forwarded to the engine. It decides nothing and knows no backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields
from os import PathLike
from typing import Any, Literal, ParamSpec, TypeVar

from polyaccel import processes, seeding
from polyaccel.accumulation import GradientState, SchedulerGate
from polyaccel.config import Config, resolve
from polyaccel.config.project import ProjectConfiguration
from polyaccel.dialects import of_script
from polyaccel.errors import PrepareError, UnsupportedError
from polyaccel.gathering import Gathering
from polyaccel.launch.rendezvous import from_environment
from polyaccel.mesh import MeshSpec
from polyaccel.plan import Plan, make_plan
from polyaccel.prepare import Preparation
from polyaccel.protocols import CompileEvent, LoaderSpec, LossCall, StepSpec
from polyaccel.registry import choose_backend
from polyaccel.topology import Topology
from polyaccel.tracking import Observer, Session, describe_job
from polyaccel.train_step import TrainStep, loss_value

P = ParamSpec("P")
R = TypeVar("R")
SETTINGS = frozenset(field.name for field in fields(Config))


class Accelerator:
    """One training script, on the engine that the configuration names.

    Args:
        backend: "torch", "xla", "jax", the name of an installed third-party backend, or "auto": the usable one whose
            framework the script has imported.
        mixed_precision: "no", "bf16" or "fp16". Parameters stay float32; fp16 scales the loss dynamically.
        gradient_accumulation_steps: batches per optimizer update, counted by `accumulate` and by `train_step`.
        mesh: axis sizes such as {"data": 4}; -1 infers one axis from the devices of the job.
        split_batches: a loader's batch_size is the global batch and is cut over the data shards; by default it is the batch of
            one data shard.
        even_batches: complete the last global batch from the first samples, so that every shard has the same number of batches.
        cpu: use the CPU even where an accelerator is present.
        rng_types: generators that all processes take from process 0 when a loader starts: "generator" (the sampler's own),
            "torch", "numpy", "python", "cuda".
        step_scheduler_with_optimizer: scheduler.step() moves only with real optimizer updates, once per data shard (once with
            split_batches). False: every call is one step.
        partitioning: on jax, "pmap" (each device runs the program on its own batch; DDP's meaning), "sharding" (one program
            over the global batch), or "auto": pmap for torch scripts, sharding for flax scripts.
        compile, compile_backend: torch.compile the prepared model, with this torch.compile backend.
        compilation_cache: folder of the persistent compilation cache of compiling engines; "auto" or "off".
        log_with: trackers: a name ("wandb", "tensorboard", ...), a `GeneralTracker`, a list of these, or "all" that are installed. A run
            folder is written in any case, from `init_trackers` or the first `log` on.
        project_dir: folder of the project: checkpoints, and runs below `runs/`.
        project_config: a ProjectConfiguration, for everything else about them.

    A value left at None comes from its POLYACCEL_* environment variable, else from its default. Must be created on every process
    of the job; it joins the processes. Raises ConfigError, PlanError, UnsupportedError, BackendNotFoundError,
    BackendUnavailableError or LaunchError before anything is changed.
    """

    def __init__(
        self,
        *,
        backend: str | None = None,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int | None = None,
        mesh: MeshSpec | Mapping[str, int] | None = None,
        split_batches: bool | None = None,
        even_batches: bool | None = None,
        cpu: bool | None = None,
        rng_types: list[str] | tuple[str, ...] | None = None,
        step_scheduler_with_optimizer: bool | None = None,
        partitioning: Literal["auto", "pmap", "sharding"] | None = None,
        compile: bool | None = None,
        compile_backend: str | None = None,
        compilation_cache: str | None = None,
        log_with: Any = None,
        project_dir: str | PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
    ) -> None:
        given = locals()
        arguments = {name: given[name] for name in SETTINGS if name in given}
        self.config: Config = resolve({**arguments, "backend": None if backend == "auto" else backend})
        chosen = choose_backend(self.config.backend)
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
            can_compile="compile" in capabilities.features,
        )
        self._engine.bind(self.plan)
        self.gradient_state = GradientState(self.plan.gradient_accumulation_steps)
        self._engine.gradient_state = self.gradient_state
        seeding.adopt(self._engine, self.config.seed)
        self._prepared = Preparation(self._engine, capabilities, chosen.name, expected=expected)
        self._gathering = Gathering(self._engine, lambda: self._prepared.script_bridge)
        self.project_configuration = ProjectConfiguration.of(project_config, project_dir)
        self.tracking = Session(
            log_with,
            self.project_configuration,
            process_index=self._engine.topology.process_index,
            describe=lambda: describe_job(self.backend, self._engine.topology, self.plan),
            compile_events=lambda: self.compile_events,
            share=lambda value: self._gathering.broadcast_object_list([value])[0],
        )
        self._differentiates_values = "backward_value" in capabilities.features
        self._lists_compiles = "compile_events" in capabilities.features
        self._observer = self._recording() if self.config.record else None

    def _recording(self) -> Observer:
        seeding.seed_if_unset(self.config.seed)
        observer = Observer(
            self.config.record,
            self.config.record_steps,
            self._engine,
            facts=describe_job(self.backend, self._engine.topology, self.plan),
            handles=self._prepared.handles,
            closes_window=lambda: self.gradient_state.sync_gradients,
            compile_events=lambda: self.compile_events if self._lists_compiles else None,
        )
        self._prepared.on_prepared = observer.prepared
        return observer

    # -- where am I ----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> Topology:
        """The processes and devices of the job, seen from here."""
        return self._engine.topology

    @property
    def device(self) -> Any:
        """Where the script puts its own tensors: a torch.device in a torch script on every engine, a jax.Device in a flax one."""
        bridge = self._prepared.script_bridge
        return self._engine.device if bridge is None else bridge.device(self._engine)

    @property
    def num_processes(self) -> int:
        """Operating-system processes of the job (torch: one per device; xla and jax: one per host)."""
        return self._engine.topology.num_processes

    @property
    def process_index(self) -> int:
        """This process, from 0."""
        return self._engine.topology.process_index

    @property
    def local_process_index(self) -> int:
        """This process on its host, from 0."""
        return self._engine.topology.local_process_index

    @property
    def num_data_shards(self) -> int:
        """Data-parallel replicas of the job: global batch = batch_size of a loader x num_data_shards."""
        return self.plan.num_data_shards

    @property
    def is_main_process(self) -> bool:
        """True on process 0."""
        return self._engine.topology.is_main_process

    @property
    def is_local_main_process(self) -> bool:
        """True on the first process of every host."""
        return self._engine.topology.is_local_main_process

    @property
    def is_last_process(self) -> bool:
        """True on the process with the highest index."""
        return self._engine.topology.is_last_process

    @property
    def use_distributed(self) -> bool:
        """True when more than one data shard trains together."""
        return self.plan.num_data_shards > 1

    @property
    def mixed_precision(self) -> str:
        """ "no", "bf16" or "fp16"."""
        return self.plan.precision.name

    @property
    def split_batches(self) -> bool:
        """Whether a loader's batch_size is the global batch."""
        return self.plan.split_batches

    @property
    def compile_events(self) -> tuple[CompileEvent, ...]:
        """Every program compiled so far, with its cause; empty on engines without the feature "compile_events"."""
        engine: Any = self._engine
        return tuple(engine.compile_events) if self._lists_compiles else ()

    # -- prepare -------------------------------------------------------------------------------------------------------

    def prepare(self, *objects: Any) -> Any:
        """Hand models, optimizers, loaders and schedulers to the engine; use what it returns instead of them.

        Any number, in any order; returned in the order given (one object alone, not in a tuple). Objects that no engine needs
        pass through. Must be called on every process.
        """
        results = [self._gated(value) for value in self._prepared.prepare(objects, spec=self._loader_spec())]
        return results[0] if len(results) == 1 else tuple(results)

    def prepare_model(self, model: Any, *, evaluation_mode: bool = False) -> Any:
        """`prepare` for one model; with `evaluation_mode` it is placed but not set up for gradient exchange."""
        return self._prepared.prepare((model,), spec=self._loader_spec(), evaluation_mode=evaluation_mode)[0]

    def prepare_optimizer(self, optimizer: Any) -> Any:
        """`prepare` for one optimizer."""
        return self.prepare(optimizer)

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """`prepare` for one scheduler."""
        return self.prepare(scheduler)

    def prepare_data_loader(self, data_loader: Any) -> Any:
        """`prepare` for one loader; also for any iterable of batches, which `prepare` alone would pass through."""
        return self._prepared.prepare((data_loader,), spec=self._loader_spec(), unknown="loader")[0]

    def _loader_spec(self) -> LoaderSpec:
        return LoaderSpec(
            split_batches=self.plan.split_batches, even_batches=self.plan.even_batches, rng_types=self.config.rng_types
        )

    def _gated(self, value: Any) -> Any:
        entry = self._prepared.entry_of(value)
        if entry is None or entry.role != "scheduler" or isinstance(value, SchedulerGate):
            return value
        gate = SchedulerGate(
            entry.handle,
            self._prepared.optimizers_of(entry.original),
            self.gradient_state,
            steps_per_update=1 if self.plan.split_batches else self.plan.num_data_shards,
            follows_optimizer=self.config.step_scheduler_with_optimizer,
        )
        return self._prepared.replace_public(entry, gate).public

    def unwrap_model(self, model: Any) -> Any:
        """The user's own model, with current values."""
        own = self._engine.unwrap(self._prepared.handle_of(model, "model", argument="model"))
        return own if self._prepared.bridge is None else self._prepared.bridge.unwrap(own)

    def free_memory(self, *objects: Any) -> list[None]:
        """Drop every prepared object and wait for the device; returns one None per argument, to overwrite the script's names."""
        self._prepared.forget()
        self._engine.synchronize()
        return [None for _ in objects]

    clear = free_memory

    # -- the step ------------------------------------------------------------------------------------------------------

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
        """Add the gradients of a loss, divided by the accumulation steps.

        `loss` is a value (torch scripts), or a function called as `loss(*args, **kwargs)`, usually `loss_fn, model, batch`, which
        works in every dialect on every engine; it returns the loss or (loss, auxiliary values), and so does this call, with
        the loss as its mean over the global batch. With a value, returns None, and takes `retain_graph=True` for a second
        backward through the same graph (torch's keyword; its others are refused).
        """
        if self._observer is not None:
            self._observer.before_step()
        is_call = callable(loss) and not hasattr(loss, "dtype")
        bridge = self._prepared.bridge
        if not is_call and bridge is None and not self._differentiates_values:
            raise UnsupportedError(
                f"backward(loss) got a value of type {type(loss).__name__}, and backend {self.backend!r} cannot differentiate"
                " a value after it was computed",
                "pass the function instead: loss = accelerator.backward(loss_fn, model, batch), or use accelerator.train_step",
            )
        work: Any = LossCall(loss, args, kwargs) if is_call else loss_value(loss, args, kwargs)
        if bridge is not None:
            work = bridge.lower(work, "loss")
        result = self._engine.backward(work, scale=1 / self.gradient_state.num_steps)
        if bridge is not None and is_call:
            result = bridge.lift(result)
        if self._observer is not None:
            self._observer.after_backward(result if is_call else loss)
        return result if is_call else None

    def train_step(
        self,
        loss_fn: Callable[..., Any],
        model: Any,
        optimizer: Any,
        scheduler: Any | None = None,
        max_grad_norm: float | None = None,
    ) -> TrainStep:
        """A fused step: `step(batch)` does forward, backward, accumulation, clipping, update and schedule.

        Args:
            loss_fn: `loss_fn(model, batch)` gives the loss (its mean over the batch), or (loss, dict of auxiliary values).
            model, optimizer, scheduler: what `prepare` returned.
            max_grad_norm: clip the gradients of each update to this global L2 norm.

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
            bridge=bridge,
        )
        if scheduler is not None:
            prepared.handle_of(scheduler, "scheduler", argument="scheduler")
        lift: Callable[[Any], Any] = bridge.lift if bridge is not None else _same
        if self._observer is not None:
            lift = self._observer.around(lift)
        return TrainStep(self._engine, spec, self.gradient_state, scheduler=scheduler, lift=lift)

    @contextmanager
    def accumulate(self, *models: Any) -> Iterator[None]:
        """One micro batch: inside, optimizers and schedulers act, and gradients are exchanged, only when the window closes."""
        if self.gradient_state.advance() or self.plan.num_data_shards == 1:
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

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which torch operations outside a prepared model compute in the mixed precision."""
        bridge = self._prepared.bridge
        return self._engine.autocast() if bridge is None else bridge.autocast(self._engine)

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

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """True if the last update of any prepared optimizer was skipped because of gradients that were not finite (fp16)."""
        return any(optimizer.step_was_skipped for optimizer in self._prepared.public("optimizer"))

    # -- between processes ---------------------------------------------------------------------------------------------

    def gather(self, tensor: Any) -> Any:
        """Every array of a tree concatenated along dim 0 over processes; a scalar becomes shape (num_processes,).

        One process returns its input. Every process must call it, with arrays of equal shapes.
        """
        return self._gathering.gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """`gather` without the samples that fill up a loader's last batch, so that every sample counts once."""
        if use_gather_object:
            return self._gathering.gather_object(input_data)
        state = self.gradient_state
        return self._gathering.gather_for_metrics(input_data, state.remainder if state.end_of_dataloader else -1)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Every array of a tree reduced over processes ("sum", "mean", "max", "min"), times `scale`."""
        return self._gathering.reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
        """Every array padded along `dim` to the longest of all processes, so that it can be gathered."""
        return self._gathering.pad_across_processes(tensor, dim, pad_index, pad_first)

    def broadcast(self, tensor: Any, from_process: int = 0) -> Any:
        """Every array of a tree as process `from_process` has it."""
        return self._gathering.broadcast(tensor, from_process)

    def gather_object(self, objects: list[Any]) -> list[Any]:
        """Lists of plain values and arrays of all processes, joined in process order."""
        return self._gathering.gather_object(objects)

    def broadcast_object_list(self, objects: list[Any], from_process: int = 0) -> list[Any]:
        """The list of process `from_process`, written into `objects` on all processes."""
        return self._gathering.broadcast_object_list(objects, from_process)

    def wait_for_everyone(self) -> None:
        """Return when every process has called it."""
        self._engine.collectives.barrier("polyaccel.wait_for_everyone")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """print, once per host."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    # -- who does what -------------------------------------------------------------------------------------------------

    @property
    def on_main_process(self) -> processes.MainProcessOnly:
        """Decorator: runs on process 0 only; None elsewhere. Also a context, for calls on an unwrapped tracker."""
        return processes.MainProcessOnly(lambda: self.is_main_process)

    def on_local_main_process(self, function: Callable[P, R]) -> Callable[P, R | None]:
        """Decorator: runs on the first process of every host only."""
        return processes.only_if(lambda: self.is_local_main_process, function)

    def on_last_process(self, function: Callable[P, R]) -> Callable[P, R | None]:
        """Decorator: runs on the last process only."""
        return processes.only_if(lambda: self.is_last_process, function)

    def on_process(self, function: Callable[P, R] | None = None, process_index: int | None = None) -> Any:
        """Decorator: runs on process `process_index` only; usable as `@accelerator.on_process(process_index=2)`."""
        if process_index is None:
            raise PrepareError("on_process needs a process_index", "write @accelerator.on_process(process_index=0)")
        if function is None:
            return lambda wrapped: self.on_process(wrapped, process_index)
        return processes.only_if(lambda: self.process_index == process_index, function)

    def on_local_process(self, function: Callable[P, R] | None = None, local_process_index: int | None = None) -> Any:
        """Decorator: runs on process `local_process_index` of every host only."""
        if local_process_index is None:
            raise PrepareError(
                "on_local_process needs a local_process_index",
                "write @accelerator.on_local_process(local_process_index=0)",
            )
        if function is None:
            return lambda wrapped: self.on_local_process(wrapped, local_process_index)
        return processes.only_if(lambda: self.local_process_index == local_process_index, function)

    def main_process_first(self) -> AbstractContextManager[None]:
        """The block runs on process 0, then on all others. Every process must enter it."""
        return processes.one_first(self.is_main_process, self._engine.collectives.barrier)

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """The block runs on the first process of every host, then on all others. Every process must enter it."""
        return processes.one_first(self.is_local_main_process, self._engine.collectives.barrier)

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """This process's part of a list, tuple, array, dataset or dict of them; see `processes.split`."""
        yield processes.split(
            inputs, index=self.process_index, num_processes=self.num_processes, apply_padding=apply_padding
        )

    # -- trackers ------------------------------------------------------------------------------------------------------

    def init_trackers(
        self, project_name: str, config: Any = None, init_kwargs: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        """Start a run: its folder `<runs>/<project>/<run id>`, and every tracker of `log_with` on a thread of its own.

        Args:
            project_name: W&B's project, MLflow's experiment, the folder of the run.
            config: a dict (nested if you like), argparse.Namespace or dataclass; values that are secret by name are hidden.
            init_kwargs: options of the vendors' own init functions: {"wandb": {"entity": "my-team"}}.

        Returns at once. A tracker that fails or does not answer is named in the log and never stops training. May be called on
        the main process alone, unless a tracker wants every process. Raises TrackerError for options of an unknown tracker.
        """
        self.tracking.start(project_name, config, init_kwargs or {})

    def log(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Log numbers and texts to the run folder and to every tracker; on the main process, nothing elsewhere.

        Values on a device are fetched in the background: the call takes microseconds and waits for nothing. `log_kwargs` are
        options of the vendors' own log functions, by tracker.
        """
        self.tracking.log(values, step, log_kwargs or {})

    def log_images(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Log images by name: arrays (height, width[, channels]) or (channels, height, width), PIL images, PNG files, or lists."""
        self.tracking.log_images(values, step, log_kwargs or {})

    def log_table(
        self,
        table_name: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Log a table of `columns` and rows, or a dataframe."""
        self.tracking.log_table(table_name, columns, data, dataframe, step, log_kwargs or {})

    def log_artifact(
        self, artifact: Any, name: str | None = None, log_kwargs: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        """Log a file or folder by its path. Small files are copied into the run folder before the call returns."""
        self.tracking.log_artifact(artifact, name, log_kwargs or {})

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """The tracker of that name, or with `unwrap` the vendor's own run object. Off the main process, what absorbs every call.

        Raises TrackerError on the main process where no such tracker was started.
        """
        return self.tracking.get(name, unwrap)

    @property
    def trackers(self) -> list[Any]:
        """The started trackers, in the order of `log_with`."""
        return list(self.tracking.trackers)

    @property
    def project_dir(self) -> Any:
        """Folder of the project."""
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> Any:
        """Folder of the runs, where it is not that of the project."""
        return self.project_configuration.logging_dir

    # -- the end -------------------------------------------------------------------------------------------------------

    def end_training(self) -> None:
        """Wait for the device, finish the trackers within their deadline, and leave the job. Every process should call it; idempotent."""
        self._engine.synchronize()
        if self._observer is not None:
            self._observer.finish()
        self.tracking.finish()
        self._engine.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Accelerator:
        return self  # it stands for the process, of which there is one

    def __repr__(self) -> str:
        topology = self._engine.topology
        return (
            f"Accelerator(backend={self.backend!r}, mixed_precision={self.mixed_precision!r},"
            f" process {topology.process_index} of {topology.num_processes},"
            f" {topology.num_devices} x {topology.device_kind}, data shards {self.num_data_shards})"
        )


def _same(value: Any) -> Any:
    return value

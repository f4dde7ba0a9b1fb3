"""The live connection of one process to torch_xla: SPMD over all devices of the job, one process per host.

The meaning differs from one process per device in one point: the program is written over the global batch. Losses, auxiliary
values and BatchNorm statistics are those of the global batch, and a device tensor is the same global value on every host.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch_xla
from torch.utils.data import DataLoader
from torch_xla import runtime as xr
from torch_xla.core import xla_model as xm

from polyaccel.config.resolve import user_cache_folder
from polyaccel.data import PreparedLoader, prepared_loader, refuse_prepared
from polyaccel.errors import BackendUnavailableError, LaunchError, PrepareError, UnsupportedError
from polyaccel.protocols import ArraySpec, LoaderSpec, LossCall, RetainedLoss, Shard, StepSpec
from polyaccel.topology import Topology
from polyaccel_torch.dialect import weights
from polyaccel_torch.dialect.averages import ModuleAverage
from polyaccel_torch.dialect.loaders import TorchHostLoader
from polyaccel_torch.dialect.modules import add_autocast, check_placeable, mark_prepared, remove_autocast
from polyaccel_torch.dialect.optimizers import PreparedOptimizer, check_parameters
from polyaccel_xla import state
from polyaccel_xla.batch_norm import correct_running_variance
from polyaccel_xla.collectives import SpmdCollectives, join, leave
from polyaccel_xla.looking import XlaTracer
from polyaccel_xla.norms import use_formulas
from polyaccel_xla.spmd import Placement
from polyaccel_xla.step import (
    Update,
    bfloat16_autocast,
    detached,
    differentiate,
    fused_step,
    loss_tensor,
    scaled,
    watch_evaluation,
)

if TYPE_CHECKING:
    from polyaccel.accumulation import GradientState
    from polyaccel.config import Config
    from polyaccel.config.profile import ProfileKwargs
    from polyaccel.launch.rendezvous import Rendezvous
    from polyaccel.plan import Plan

_log = logging.getLogger(__name__)


def open_engine(config: Config, rendezvous: Rendezvous) -> XlaEngine:
    """Turn SPMD on, find the devices and the other hosts. Raises LaunchError naming what does not fit."""
    if rendezvous.num_local_processes > 1:
        raise LaunchError(
            f"{rendezvous.num_local_processes} processes were started on this host, and backend 'xla' runs 1 per host: SPMD"
            " partitions one program over all devices of the process",
            "start one process per host; for several virtual devices on the CPU set CPU_NUM_DEVICES",
        )
    if config.cpu:
        try:
            xr.set_device_type("CPU")
        except RuntimeError as error:
            raise LaunchError(
                f"cpu=True, but torch_xla runs on {xr.device_type()} in this process already",
                "set PJRT_DEVICE=CPU before anything uses torch_xla",
            ) from error
    use_compilation_cache(config.compilation_cache)
    if not xr.is_spmd():
        xr.use_spmd()  # for the whole process; tensors that already live on one device are then repeated on all
    num_processes = xr.process_count()  # starts the runtime
    _check_autograd_knows_the_devices()
    use_formulas()
    if rendezvous.num_processes not in (1, num_processes):
        raise LaunchError(
            f"the launcher started {rendezvous.num_processes} processes, but the {xr.device_type()} runtime of torch_xla connects"
            f" {num_processes}",
            "start as many processes as the runtime has hosts; the CPU runtime has one",
        )
    if num_processes > 1:
        _log.warning(
            "backend 'xla' on %d hosts: this path follows torch_xla's documentation and is untested", num_processes
        )
    owns_group = join(
        xr.process_index(), num_processes, rendezvous.address, rendezvous.coordinator_port, config.timeout_s
    )
    return XlaEngine(owns_group=owns_group, timeout_s=config.timeout_s)


def _check_autograd_knows_the_devices() -> None:
    """torch's autograd counts devices once, at the first backward pass of a process, and fails for those that come later."""
    probe = torch.zeros((), device=torch_xla.device(), requires_grad=True)
    try:
        probe.clone().backward()
    except RuntimeError as error:
        raise BackendUnavailableError(
            "backend 'xla' was started after a backward pass on another device had already run in this process, and torch's"
            " autograd accepts no new devices then",
            "create the Accelerator before the first backward pass, or run that pass in another process",
        ) from error


def use_compilation_cache(setting: str) -> None:
    """Keep compiled graphs in a folder between runs: "auto" (the user's cache folder), "off", or a path.

    The CPU runtime of torch_xla 2.9 writes such files and cannot read them, so it gets none; a path is answered with a warning.
    """
    is_initialized = torch_xla._XLAC._xla_computation_cache_is_initialized()
    if setting == "off":
        return
    if xr.device_type() == "CPU" or is_initialized:
        if setting != "auto":
            is_cpu = xr.device_type() == "CPU"
            reason = "the CPU runtime cannot load them" if is_cpu else "graphs of this process are compiled already"
            _log.warning("compilation_cache=%r is not used: %s", setting, reason)
        return
    folder = user_cache_folder() / "xla" if setting == "auto" else Path(setting)
    folder.mkdir(parents=True, exist_ok=True)
    xr.initialize_cache(str(folder), readonly=False)


class XlaEngine:
    """See `polyaccel.protocols.Engine`. Handles are the user's own modules and schedulers, and `PreparedOptimizer`s."""

    gradient_state: GradientState | None = None
    _plan: Plan
    _placement: Placement

    def __init__(self, *, owns_group: bool, timeout_s: float = 1800.0) -> None:
        self.topology = Topology(
            process_index=xr.process_index(),
            num_processes=xr.process_count(),
            local_process_index=0,
            num_local_devices=xr.addressable_runtime_device_count(),
            num_devices=xr.global_runtime_device_count(),
            device_kind=str(xr.device_type()).lower(),
        )
        self.collectives = SpmdCollectives(
            self.topology.process_index, self.topology.num_processes, self.flush, timeout_s
        )
        self._owns_group = owns_group
        self._updates: weakref.WeakKeyDictionary[PreparedOptimizer, Update] = weakref.WeakKeyDictionary()
        self._models: list[weakref.ref[torch.nn.Module]] = []  # in the order in which they were prepared

    @property
    def device(self) -> torch.device:
        """The one virtual device that stands for all of them."""
        return torch_xla.device()

    def bind(self, plan: Plan) -> None:
        """Build the mesh. Raises UnsupportedError for a tensor axis over several hosts."""
        if plan.num_processes_per_shard > 1:
            raise UnsupportedError(
                f"mesh.tensor={plan.mesh.tensor} lies over {plan.num_processes_per_shard} hosts, which would have to feed the same"
                " batches, and backend 'xla' takes each host's own",
                f"use a tensor axis of at most {self.topology.num_local_devices}, the devices of one host",
            )
        self._plan = plan
        self._placement = Placement(plan.mesh, self.topology.num_processes, plan.sharding_rules)

    def seed(self, value: int) -> None:
        """Restart the stream of dropout and other random operations on the devices."""
        torch_xla.manual_seed(value)

    def flush(self) -> None:
        """Start all traced work as one graph; does not wait."""
        torch_xla.sync()

    def synchronize(self) -> None:
        """Start all traced work and return when the devices are done."""
        torch_xla.sync(wait=True)
        xm.wait_device_ops()

    def tracer(self, settings: ProfileKwargs) -> XlaTracer:
        """torch_xla's recorder."""
        return XlaTracer(settings)

    def close(self) -> None:
        """Leave the group of hosts; the runtime itself lives as long as the process."""
        if self._owns_group:
            self.collectives.calls.close()
            leave()
            self._owns_group = False

    # -- prepare -------------------------------------------------------------------------------------------------------

    def prepare_model(self, model: torch.nn.Module, *, evaluation_mode: bool = False) -> torch.nn.Module:
        """The same module, moved to the devices in place and computing in the plan's precision.

        One program over the global batch needs no wrapper for gradients, so `evaluation_mode` changes nothing here.
        """
        kind = type(model).__name__
        if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            raise PrepareError(
                f"{kind} exchanges gradients between processes, and backend 'xla' partitions one program instead",
                "prepare the module inside it",
            )
        if kind == "OptimizedModule":
            raise UnsupportedError(
                "the model was made by torch.compile, and backend 'xla' compiles every step already",
                "prepare the module that was given to torch.compile",
            )
        check_placeable(model, scales_loss=False, takes_meta=True)
        self._placement.module(model)
        if self._plan.precision.compute_dtype == "bfloat16":
            add_autocast(model, bfloat16_autocast)
        else:
            remove_autocast(model)
        correct_running_variance(model)
        watch_evaluation(model)
        mark_prepared(model)
        self._models.append(weakref.ref(model))
        return model

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, model: Any | None) -> PreparedOptimizer:
        """The optimizer around the moved parameters. Raises PrepareError when it updates others."""
        modules = self._prepared_models()
        if not modules:
            raise PrepareError(
                f"the {type(optimizer).__name__} was prepared before its model",
                "prepare the model together with its optimizer, or before it",
            )
        check_parameters(optimizer, modules)
        update = Update(optimizer, self._placement, self.flush)
        handle = PreparedOptimizer(optimizer, self.gradient_state, update=update)
        self._updates[handle] = update
        return handle

    def prepare_scheduler(self, scheduler: Any, optimizer: Any | None) -> Any:
        """The user's own scheduler: it sets host numbers, and the update makes them data."""
        return scheduler

    def prepare_loader(self, loader: DataLoader[Any], spec: LoaderSpec) -> PreparedLoader:
        """Batches cut over the data shards; transfers start `spec.prefetch` batches ahead, and each batch begins a new graph."""
        refuse_prepared(loader)
        sharding = spec.sharding(self._plan)
        several = self.topology.num_processes > 1
        host = TorchHostLoader(loader).shard(
            sharding,
            spec=spec,
            exchange=self.collectives.all_gather_object if several else None,
            process_index=self.topology.process_index,
        )

        def place(batch: Any) -> Any:
            even = getattr(
                host.batch_sampler, "even_batches", spec.even_batches
            )  # `join_uneven_inputs` changes it for a while
            return self._placement.batch(batch, is_short_allowed=not even, full_size=host.total_batch_size)

        def hand_out(host_batch: Any, placed: Any) -> Any:
            self.flush()  # what the script left behind (a running mean) must not become part of this batch's graph
            return placed if spec.lift is None else spec.lift(host_batch, placed)

        return prepared_loader(
            host,
            place=place if spec.device_placement else None,
            lift=hand_out,
            observer=_Boundary(self),
            prefetch=spec.prefetch,
            in_background=spec.read_in_background,
            is_one_program=several,
        )

    def unwrap(self, handle: Any) -> Any:
        """The user's own module; its values live on the devices."""
        return handle

    # -- the step ------------------------------------------------------------------------------------------------------

    def autocast(self, *, enabled: bool = True, cache_enabled: bool | None = None) -> AbstractContextManager[Any]:
        """bfloat16 where it is safe, by torch's own list for XLA devices; not enabled, the dtype of the values."""
        if self._plan.precision.name != "bf16":
            return nullcontext()
        return bfloat16_autocast(enabled=enabled)

    def remove_autocast(self, model: torch.nn.Module) -> None:
        """The module computes in its parameters' precision from now on."""
        remove_autocast(model)

    def gradient_sync(self, model: Any, *, enabled: bool) -> AbstractContextManager[Any]:
        """The partitioner places the exchange of gradients; there is nothing to hold back."""
        return nullcontext()

    def parameter_average(self, model: torch.nn.Module) -> ModuleAverage:
        """Where the parameters are, and moved as part of the traced work."""
        with self._same_random_stream():
            self.synchronize()
        return ModuleAverage(model, upload=self._placement.upload, move=self._move)

    def _move(self, averages: list[torch.Tensor], values: list[torch.Tensor], weight: float) -> None:
        # As data: a Python number would be part of the graph, and another graph at every change.
        sent = self._placement.upload_scalar(torch.tensor(weight, dtype=torch.float64))
        for average, value in zip(averages, values, strict=True):
            average.add_((value - average).mul_(sent.to(average.dtype)))

    def backward(self, loss: Any, *, scale: float, weight: Any = None) -> Any:
        """Trace the backward pass. A micro batch that closes no window ends its graph here."""
        if weight is not None:
            result = self.add_weighted(loss, weight)
        elif isinstance(loss, LossCall):
            result = differentiate(loss, scale)
        else:
            is_retained = isinstance(loss, RetainedLoss)
            scaled(loss.value if is_retained else loss, scale).backward(retain_graph=is_retained)
            result = None
        self._placement.lay_gradients()
        if not self._is_syncing():
            self.flush()
        return result

    def add_weighted(self, loss: Any, weight: Any) -> Any:
        """Trace the gradients of weight * loss; returns what a call returned, detached."""
        result, value, weight, is_retained = weights.unpacked(loss, weight)
        if not isinstance(weight, torch.Tensor) or weight.device.type == "cpu":
            # This host's part, as data of the graph: a number in it would be another graph for every batch.
            host = torch.as_tensor(weight, dtype=torch.float32).detach().reshape(())
            if self.topology.num_processes > 1:
                host = torch.as_tensor(self.collectives.all_reduce(host, "sum"), dtype=torch.float32)
            weight = self._placement.upload_scalar(host)
        # Of the global batch; counted as the mean over data shards, as engines do where each shard has its own.
        weight = weights.as_scalar(weight, self.device) / self._plan.num_data_shards
        window = self._state.window_weights
        if window is None:
            window = self._state.window_weights = weights.WindowWeights()
        window.add(weight)
        unit = window.unit
        factor = weight if isinstance(unit, float) else weight * unit
        (loss_tensor(value) * factor).backward(retain_graph=is_retained)
        return None if result is None else detached(result)

    def normalise_gradients(self) -> None:
        """Traced. A loss and its weight are those of the global batch, so there is nothing to exchange."""
        window = self._state.window_weights
        with torch.no_grad():
            window.close(weights.gradients_of(self._prepared_models()), window.total, 1)
        if not self._is_syncing():
            self.flush()

    def scale_gradients(self, factor: float) -> None:
        """Traced, with the factor as data."""
        sent = self._placement.upload_scalar(torch.tensor(factor, dtype=torch.float32))
        weights.multiply(weights.gradients_of(self._prepared_models()), sent)

    def read_weight(self) -> float:
        """The mean over data shards."""
        return float(self._state.window_weights.total)

    def write_weight(self, total: float) -> None:
        """Continue with this total."""
        window = self._state.window_weights = weights.WindowWeights()
        window.add(self._placement.upload_scalar(torch.tensor(total, dtype=torch.float32)))

    def clip_grad_norm(self, target: Any, max_norm: float, norm_type: float) -> torch.Tensor:
        """Traced: the host does not wait for the norm."""
        return torch.nn.utils.clip_grad_norm_(_parameters(target), max_norm, norm_type)

    def clip_grad_value(self, target: Any, clip_value: float) -> None:
        """Traced."""
        torch.nn.utils.clip_grad_value_(_parameters(target), clip_value)

    def train_step(self, spec: StepSpec) -> Callable[..., Any]:
        """One graph for forward, backward, clipping and update."""
        return fused_step(spec, self._updates[spec.optimizer], self)

    @property
    def _state(self) -> GradientState:
        assert self.gradient_state is not None, "the core sets it right after bind"
        return self.gradient_state

    def _is_syncing(self) -> bool:
        return self.gradient_state is None or self.gradient_state.sync_gradients

    # -- state ---------------------------------------------------------------------------------------------------------

    def read_state(self, handle: Any) -> Iterator[Shard]:
        """What is repeated on every device comes from process 0, of the rest each process gives the pieces of its devices."""
        with self._same_random_stream():
            self.synchronize()
        yield from state.read(handle, self._prepared_models(), is_main=self.topology.is_main_process)

    def check_state(self, handle: Any, specs: Mapping[str, ArraySpec]) -> None:
        """Raises CheckpointError where `write_state` would."""
        state.check(handle, specs, self._prepared_models())

    def write_state(self, handle: Any, shards: Iterable[Shard]) -> None:
        """Load shards of any mesh."""
        state.write(handle, shards, self._prepared_models(), self._placement)

    def parameter_names(self, handle: Any) -> list[str]:
        """In the order of the user's optimizer."""
        return state.parameter_names(handle, self._prepared_models())

    def read_gradients(self, handle: Any) -> Iterator[Shard]:
        """Those of the global batch, in the pieces in which the devices have them."""
        with self._same_random_stream():
            self._placement.lay_gradients()
            self.synchronize()
        yield from state.read_gradients(handle, is_main=self.topology.is_main_process)

    def write_gradients(self, handle: Any, shards: Iterable[Shard]) -> None:
        """Replace them on every device."""
        state.write_gradients(handle, shards, self._placement)

    def read_scaler(self) -> None:
        """None: fp16 is not offered here."""

    def write_scaler(self, state: Mapping[str, float | int]) -> None:
        """Nothing: there is no loss scale here."""

    def read_random(self) -> dict[str, Any]:
        """The number that the next random operation on the devices starts from."""
        return {"xla": int(xm.get_rng_state())}

    def write_random(self, state: Mapping[str, Any]) -> None:
        """Continue from this number."""
        xm.set_rng_state(int(state["xla"]))

    @contextmanager
    def _same_random_stream(self) -> Iterator[None]:
        # Every graph that is started moves the stream on, also one that nobody but a checkpoint asked for.
        seed = xm.get_rng_state()
        yield
        xm.set_rng_state(seed)

    def _prepared_models(self) -> list[torch.nn.Module]:
        return [model for reference in self._models if (model := reference()) is not None]


class _Boundary:
    """Ends a graph where a loader ends, so that its last batch is the same program as the others."""

    def __init__(self, engine: XlaEngine) -> None:
        self._engine = engine

    @property
    def gradient_state(self) -> Any:
        """What the loaders report to, beyond this."""
        return self._engine.gradient_state

    def loader_started(self, loader: PreparedLoader) -> None:
        if self._engine.gradient_state is not None:
            self._engine.gradient_state.loader_started(loader)

    def loader_finished(self, loader: PreparedLoader) -> None:
        if self._engine.gradient_state is not None:
            self._engine.gradient_state.loader_finished(loader)
        if not sys.is_finalizing():  # an abandoned loop may be collected after the runtime is gone
            self._engine.flush()


def _parameters(target: Any) -> Any:
    return target.parameters() if isinstance(target, torch.nn.Module) else target

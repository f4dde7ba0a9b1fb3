"""The jax engine of one process: joins the job, places arrays, and runs programs, whichever dialect they came from."""

from __future__ import annotations

import socket
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import lax

from polyaccel.config import Config
from polyaccel.errors import LaunchError, PrepareError, UnsupportedError
from polyaccel.protocols import (
    ArraySpec,
    Collectives,
    CompileEvent,
    LoaderSpec,
    LossCall,
    ParameterAverage,
    ProgramCall,
    Shard,
    StepSpec,
)
from polyaccel.topology import Topology
from polyaccel_jax import dialect, job, looking, pieces, state
from polyaccel_jax.averages import ModelAverage
from polyaccel_jax.collectives import JaxCollectives
from polyaccel_jax.compiles import CompileLog
from polyaccel_jax.dialect import compilation_cache
from polyaccel_jax.flops import FlopMeter
from polyaccel_jax.fused import FusedStep
from polyaccel_jax.handles import JaxModel, JaxOptimizer
from polyaccel_jax.lockstep import Lockstep
from polyaccel_jax.mesh import DeviceMesh
from polyaccel_jax.precision import ScalerState, initial_scaler
from polyaccel_jax.random_stream import RandomStream
from polyaccel_jax.step import Steps
from polyaccel_jax.weights import WeightedCall, WindowWeights

if TYPE_CHECKING:
    from polyaccel.config.profile import ProfileKwargs
    from polyaccel.launch.rendezvous import Rendezvous
    from polyaccel.plan import Plan
    from polyaccel_jax.planning.planner import Planner

_JOIN_TIMEOUT_S = 120
_HEARTBEAT_TIMEOUT_S = 60
_MAX_STEPS_IN_FLIGHT = 4  # of up to five programs each: forward, backward, clip, update, zeros


class JaxEngine:
    """Implements ProgramEngine. `compiles` lists the programs that were traced and compiled.

    `devices`: use these alone; by default all of the job's. `planner`: compile for them and run nothing; they need not exist.
    """

    plan: Plan
    mesh: DeviceMesh
    steps: Steps

    def __init__(
        self,
        config: Config,
        rendezvous: Rendezvous,
        devices: Sequence[jax.Device] | None = None,
        planner: Planner | None = None,
    ) -> None:
        self.planner = planner
        if config.cpu:
            _use_cpu_only()
        # Several CPU devices of one process share a pool of threads. With 32 programs waiting (jaxlib's bound per device) their
        # collectives wait for each other for ever, so a process with such devices never runs far ahead of them.
        self._in_flight: deque[jax.Array] | None = None
        self._latest: Any = None  # the last result of a program
        self._holds_job = rendezvous.num_processes > 1 and _join(rendezvous)
        self.compilation_cache_folder = compilation_cache.enable(config.compilation_cache)
        platform = "cpu" if config.cpu else None
        self._devices: list[jax.Device] = list(devices or jax.devices(platform))
        local = self._devices
        if planner is None:
            local = [device for device in self._devices if device in jax.local_devices(backend=platform)]
        self.topology = Topology(
            process_index=rendezvous.process_index,
            num_processes=rendezvous.num_processes,
            local_process_index=rendezvous.local_process_index,
            num_local_devices=len(local),
            num_devices=len(self._devices),
            device_kind=local[0].device_kind,
        )
        self.device: jax.Device = local[0]
        self._local_devices = local
        if len(local) > 1 and local[0].platform == "cpu" and planner is None:
            self._in_flight = deque()
        collectives = JaxCollectives(self._devices, self.topology, config.timeout_s)
        self.collectives: Collectives = collectives
        self._own_collectives = collectives
        self.lockstep: Lockstep | None = None
        if rendezvous.num_processes > 1 and planner is None:
            self.lockstep = Lockstep(collectives.store(), self.topology.process_index, self.topology.num_processes)
        self._reads_whole = False
        self.note_exchange = (
            collectives.note_exchange
        )  # called before a program that ends only if every process runs it
        self.gradient_state: Any = None  # the core sets it: the GradientState of its Accelerator
        self.compiles = CompileLog(planner)
        if planner is not None:
            planner.engine = self
        self.scaler: ScalerState | None = None
        self._is_distributed = rendezvous.num_processes > 1
        self._num_models = 0
        self._models: list[weakref.ref[JaxModel]] = []
        self._known_calls: dict[Any, Any] = {}
        self._seed = config.seed
        self._stream: RandomStream | None = None

    # -- Engine: the job -------------------------------------------------------------------------------------------------

    def bind(self, plan: Plan) -> None:
        """Build the mesh and fix precision."""
        self.plan = plan
        self.mesh = DeviceMesh(plan, self._devices, self.planner)
        if self.mesh.cuts_layers and plan.partitioning == "pmap":
            raise UnsupportedError(
                f"mesh.tensor={plan.mesh.tensor} cuts single layers, and partitioning='pmap' runs whole layers on every device",
                "leave partitioning out, or use partitioning='sharding'",
            )
        if self.mesh.cuts_sequences and plan.partitioning == "pmap":
            raise UnsupportedError(
                f"mesh.sequence={plan.mesh.sequence} cuts sequences, and partitioning='pmap' runs whole ones on every device",
                "leave partitioning out, or use partitioning='sharding'",
            )
        self.steps = Steps(self)
        scaling = plan.precision.loss_scaling
        if scaling is not None:
            scale, good_steps = self.mesh.replicate(initial_scaler(scaling))
            self.scaler = (scale, good_steps)

    @property
    def default_partitioning(self) -> str:
        """How programs of no model are partitioned."""
        return self.partitioning_of(is_native=False)

    def partitioning_of(self, *, is_native: bool) -> str:
        """How programs of a model of this engine's dialect, or of another, are partitioned."""
        if self.plan.partitioning != "auto":
            return self.plan.partitioning
        is_global = is_native or self.mesh.cuts_layers or self.mesh.cuts_sequences
        return "sharding" if is_global else "pmap"

    @property
    def num_compiles(self) -> int:
        """How many programs were traced."""
        return self.compiles.count

    @property
    def compile_events(self) -> list[CompileEvent]:
        """Every program that was compiled, with its cause."""
        return self.compiles.events

    @property
    def device_name(self) -> str:
        """What the driver calls the devices."""
        return self.topology.device_kind

    def device_memory(self) -> tuple[int, int | None] | None:
        """The most bytes that were in use on one of this process's devices, and its limit; None on the CPU."""
        return None if self.planner is not None else looking.device_memory(self._local_devices)

    def fence(self) -> Callable[[], object] | None:
        """Waits for the last step that was started: its loss comes with the rest of its program. None where it is done."""
        latest = self._latest
        return None if latest is None or latest.is_ready() else latest.block_until_ready

    def count_flops(self) -> Callable[[], float | None]:
        """Operations of the programs that are started from now on; None of those that are only planned."""
        if self.planner is not None:
            return lambda: None
        meter = self.compiles.meter = self.compiles.meter or FlopMeter()
        before = meter.total
        return lambda: None if meter.total is None or before is None else meter.total - before

    def tracer(self, settings: ProfileKwargs) -> looking.JaxTracer:
        """jax.profiler."""
        return looking.JaxTracer(settings, self._local_devices)

    def seed(self, value: int) -> None:
        """Restart the random stream. In a job of several processes the seed of process 0 counts for all."""
        self._seed = value
        self._stream = None

    @property
    def stream(self) -> RandomStream:
        """The random stream; the first use after `seed` must be on every process."""
        if self._stream is None:
            seed = self._seed
            if self._is_distributed:
                seed = int(self.collectives.all_gather_object(seed)[0])
            self._stream = RandomStream(seed, self.mesh.replicate)
        return self._stream

    def current_key(self) -> tuple[jax.Array, int]:
        """(base key, the number of the next draw)."""
        return self.stream.key, self.stream.count

    def synchronize(self) -> None:
        """Return when the devices have finished all work given to them."""
        if self.planner is not None:
            return
        # Work runs in order on each device: an array placed now is ready when all before it is.
        jax.effects_barrier()
        fence = [jax.device_put(np.float32(0), device) for device in self._local_devices]
        jax.block_until_ready([_fence(array) for array in fence])

    def close(self) -> None:
        """Leave the job. Idempotent."""
        if self._holds_job:
            self._holds_job = False
            _leave(self.collectives)

    # -- Engine: objects -------------------------------------------------------------------------------------------------

    def create_model(self, make: Callable[[], Any]) -> Any:
        """A flax module whose parameters are computed where they will be kept; what is no flax module as `make` made it."""
        return dialect.create(make, self.mesh)

    def prepare_model(self, model: Any, *, evaluation_mode: bool = False) -> Any:
        """A flax module (-> its prepared module) or a bridge's ModelSource (-> JaxModel)."""
        is_native = dialect.is_module(model)
        source = dialect.model_source(model) if is_native else model
        partitioning = self.partitioning_of(is_native=is_native)
        handle = JaxModel(self, f"model_{self._num_models}", source, partitioning=partitioning)
        self._num_models += 1
        self._models.append(weakref.ref(handle))
        source.attach(handle)
        return dialect.model_handle(source, handle) if is_native else handle

    def prepare_optimizer(self, optimizer: Any, model: Any | None) -> Any:
        """An optax transformation or nnx.Optimizer (-> PreparedOptax) or a bridge's OptimizerSource (-> JaxOptimizer)."""
        is_native = dialect.is_optimizer(optimizer)
        if is_native and model is None:
            raise PrepareError(
                f"{type(optimizer).__name__} does not say which model it trains",
                "prepare it in one call with its model: accelerator.prepare(model, optimizer)",
            )
        source = dialect.optimizer_source(optimizer, _model(model)) if is_native else optimizer
        handle = JaxOptimizer(self, source)
        source.attach(handle)
        return dialect.optimizer_handle(source, handle) if is_native else handle

    def prepare_scheduler(self, scheduler: Any, optimizer: Any | None) -> Any:
        """The scheduler itself: what it sets in its optimizer is read at every update."""
        return scheduler

    def prepare_loader(self, loader: Any, spec: LoaderSpec) -> Any:
        """A PreparedLoader of this process's share of every global batch, placed ahead of its use."""
        return dialect.prepare_loader(loader, spec, self)

    def unwrap(self, handle: Any) -> Any:
        """The user's own object, with current values."""
        return dialect.unwrap(handle)

    def autocast(self, *, enabled: bool = True, cache_enabled: bool | None = None) -> AbstractContextManager[Any]:
        """Nothing to enter: prepared models compute in the plan's precision wherever they are called."""
        return nullcontext()

    def gradient_sync(self, model: Any, *, enabled: bool) -> AbstractContextManager[Any]:
        """Nothing to enter: gradients are averaged inside every compiled backward."""
        return nullcontext()

    def parameter_average(self, model: Any) -> ParameterAverage:
        """Placed as the parameters are."""
        return ModelAverage(_model(model))

    # -- Engine: the step ------------------------------------------------------------------------------------------------

    def lower(self, call: LossCall) -> ProgramCall:
        """A flax loss call as a program call."""
        lowered: ProgramCall = dialect.lower_call(call, self._known_calls)
        return lowered

    def backward(self, loss: Any, *, scale: float, weight: Any = None) -> Any:
        """Add scale * gradients of a LossCall or ProgramCall; returns what its function returned."""
        if isinstance(loss, LossCall):
            loss = self.lower(loss)
        if not hasattr(loss, "build"):
            raise UnsupportedError(
                f"backward(loss) got a value of type {type(loss).__name__}: a jax value cannot be differentiated afterwards",
                "pass the function: loss = accelerator.backward(loss_fn, model, batch),"
                " or step = accelerator.train_step(loss_fn, model, optimizer)",
            )
        if weight is not None:
            return self.add_weighted(WeightedCall(self, loss, weight))
        return self.steps.backward(loss, scale)

    def add_weighted(self, call: ProgramCall) -> Any:
        """Add the gradients of a WeightedCall, and the weight to what the window has counted."""
        window = self.gradient_state.window_weights
        if window is None:
            window = self.gradient_state.window_weights = WindowWeights(self.steps.zero())
        if window.is_divided:  # the window goes on after all
            window.is_divided = False
            self.steps.scale_gradients(tuple(window.models), window.total)
        return self.steps.backward(call, 1.0, window)

    def normalise_gradients(self) -> None:
        """One small program; the weights were added up over data shards with the gradients."""
        window = self.gradient_state.window_weights
        self.steps.scale_gradients(tuple(window.models), window.total, divides=True)
        window.is_divided = True

    def scale_gradients(self, factor: float) -> None:
        """One small program, with the factor as its input."""
        models = [model for reference in self._models if (model := reference()) is not None]
        self.steps.scale_gradients(models, np.float32(factor))

    def read_weight(self) -> float:
        """The mean over data shards."""
        return float(self.mesh.to_host(self.gradient_state.window_weights.total))

    def write_weight(self, total: float) -> None:
        """Continue with this mean over data shards."""
        window = self.gradient_state.window_weights = WindowWeights(self.mesh.replicate([np.float32(total)])[0])
        window.models.update(dict.fromkeys(model for ref in self._models if (model := ref()) is not None))

    def run_forward(self, call: ProgramCall) -> Any:
        """Run a call without gradients."""
        return self.steps.forward(call)

    def clip_grad_norm(self, target: Any, max_norm: float, norm_type: float) -> Any:
        """Clip the gradients of a prepared model (or of [(model, names or None), ...]); returns the norm before, on the device."""
        return self.local(self.steps.clip_norm(_targets(target), max_norm, norm_type))

    def clip_grad_value(self, target: Any, clip_value: float) -> None:
        """Clamp every gradient element of the target to [-clip_value, clip_value]."""
        self.steps.clip_value(_targets(target), clip_value)

    def train_step(self, spec: StepSpec) -> Callable[..., Any]:
        """The fused `step(batch, sync)`."""
        optimizer = getattr(spec.optimizer, "_polyaccel_optimizer", spec.optimizer)
        model = _model(spec.model)
        if optimizer.model is not model:
            raise PrepareError(
                f"the optimizer trains {optimizer.model.name}, and train_step was given {model.name}",
                "pass the model and the optimizer that were prepared together",
            )
        return FusedStep(self, spec, model, optimizer)

    # -- Engine: state ---------------------------------------------------------------------------------------------------

    def read_state(self, handle: Any) -> Iterator[Shard]:
        """Every global element of a handle's state exactly once over all processes."""
        return state.read(_engine_handle(handle))

    def check_state(self, handle: Any, specs: Mapping[str, ArraySpec]) -> None:
        """Raises CheckpointError where `write_state` would."""
        state.check(_engine_handle(handle), specs)

    def write_state(self, handle: Any, shards: Iterable[Shard]) -> None:
        """Load shards of any mesh."""
        state.write(_engine_handle(handle), shards)

    def parameter_names(self, handle: Any) -> list[str] | None:
        """In the order of a torch optimizer; None for optax."""
        return _engine_handle(handle).source.parameter_names()

    def read_gradients(self, handle: Any) -> Iterator[Shard]:
        """Those of the global batch."""
        return state.read_gradients(_model(handle))

    def write_gradients(self, handle: Any, shards: Iterable[Shard]) -> None:
        """Replace them."""
        state.write_gradients(_model(handle), shards)

    def read_scaler(self) -> dict[str, float | int] | None:
        """The loss scale of fp16; waits for the device."""
        if self.scaler is None:
            return None
        scale, good_steps = map(self.mesh.to_host, self.scaler)
        return {"scale": float(scale), "growth_tracker": int(good_steps)}

    def write_scaler(self, state: Mapping[str, float | int]) -> None:
        """Continue with this loss scale."""
        if self.scaler is not None:
            values = [np.float32(state["scale"]), np.int32(state["growth_tracker"])]
            scale, good_steps = self.mesh.replicate(values)
            self.scaler = (scale, good_steps)

    def read_random(self) -> dict[str, Any]:
        """The base key and how many draws were made from it. Every process must call it before the first step."""
        return {"jax": self.stream.read()}

    def write_random(self, state: Mapping[str, Any]) -> None:
        """Continue with this key and count. Every process must call it before the first step."""
        self.stream.write(state["jax"])

    # -- ProgramEngine ---------------------------------------------------------------------------------------------------

    def place(self, leaves: Sequence[Any]) -> list[jax.Array]:
        """Host arrays of this process -> global arrays, batch dim cut over the data shards; asynchronous."""
        return self.mesh.place(leaves)

    def to_host(self, array: jax.Array) -> np.ndarray[Any, Any]:
        """This process's part of an array as numpy; waits for the device."""
        return self.mesh.to_host(array)

    def state_to_host(self, array: jax.Array, what: str) -> np.ndarray[Any, Any]:
        """The whole of a parameter, a gradient or of optimizer state as numpy; waits for the device.

        Raises UnsupportedError where pieces of it lie on other processes, but for reads inside `reading_whole()`.
        """
        if self.planner is not None or array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        if not self._reads_whole:
            raise pieces.in_pieces(what)
        return np.asarray(self._own_collectives.whole(array))

    @contextmanager
    def reading_whole(self) -> Iterator[None]:
        """Inside, what lies in pieces on several processes is gathered when it is read: every process must read the same, in the same
        order."""
        before, self._reads_whole = self._reads_whole, True
        try:
            yield
        finally:
            self._reads_whole = before

    def local(self, array: jax.Array) -> jax.Array:
        """This process's part of an array as an array of its own."""
        return self.mesh.local(array) if self._is_distributed else array

    def pace(self, result: jax.Array | None) -> None:
        """Note a result of a dispatched program; on several CPU devices, wait for an earlier one."""
        self._latest = result if result is not None else self._latest
        if self._in_flight is not None and result is not None:
            self._in_flight.append(result)
            if len(self._in_flight) > _MAX_STEPS_IN_FLIGHT:
                self._in_flight.popleft().block_until_ready()

    def constrain(self, tree: Any) -> Any:
        """Traced: these values are equal on all devices. Says so to the partitioner; nothing on one device."""
        if self.mesh.is_single_device:
            return tree
        return jax.tree.map(lambda value: lax.with_sharding_constraint(value, self.mesh.replicated), tree)

    def keep(self, values: Iterable[jax.Array], names: Iterable[str | None]) -> tuple[jax.Array, ...]:
        """Traced: parameters or optimizer state, which lie as the parameters that they are named after. Nothing on one device."""
        if self.mesh.is_single_device:
            return tuple(values)
        kept = self.mesh.kept
        return tuple(
            lax.with_sharding_constraint(value, kept(value, name)) for value, name in zip(values, names, strict=True)
        )

    def keep_gradients(self, models: Iterable[str], grads: Iterable[dict[str, jax.Array]]) -> Any:
        """Traced: per model, by its name, the gradients of its parameters, which lie as these do."""
        return tuple(
            dict(zip(own, self.keep(own.values(), [f"{model}.{name}" for name in own]), strict=True))
            for model, own in zip(models, grads, strict=True)
        )

    def dtypes(self, wants_64bit: bool) -> AbstractContextManager[Any]:
        """The context in which programs of such a model are traced and called."""
        return jax.enable_x64(True) if wants_64bit else nullcontext()


@jax.jit
def _fence(array: jax.Array) -> jax.Array:
    return array + 1


def _model(handle: Any) -> JaxModel:
    model: JaxModel = getattr(handle, "_polyaccel_model", handle)
    return model


def _engine_handle(handle: Any) -> JaxModel | JaxOptimizer:
    for attribute in ("_polyaccel_model", "_polyaccel_optimizer"):
        if attribute in vars(handle):
            found: JaxModel | JaxOptimizer = vars(handle)[attribute]
            return found
    plain: JaxModel | JaxOptimizer = handle
    return plain


def _targets(target: Any) -> list[tuple[JaxModel, Sequence[str] | None]]:
    if isinstance(target, list) and all(isinstance(item, tuple) for item in target):
        return target
    model = _model(target)
    if not isinstance(model, JaxModel):
        raise PrepareError(
            f"gradients of a {type(target).__name__} cannot be clipped",
            "pass the prepared model: accelerator.clip_grad_norm_(model, max_norm)",
        )
    return [(model, None)]


def _use_cpu_only() -> None:
    # Before the first use of a device this keeps jax from taking hold of an accelerator that the user does not want.
    try:
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        return  # devices are in use already; CPU devices are then picked by name


_num_holders = 0  # live engines of the job that this module joined: the last one leaves it


def _join(rendezvous: Rendezvous) -> bool:
    """Join the job; False if the script had joined it itself, and will leave it itself."""
    global _num_holders
    if jax.distributed.is_initialized():
        if (jax.process_index(), jax.process_count()) != (rendezvous.process_index, rendezvous.num_processes):
            raise LaunchError(
                f"jax.distributed is initialized as process {jax.process_index()} of {jax.process_count()}, and the launcher started"
                f" process {rendezvous.process_index} of {rendezvous.num_processes}",
                "leave jax.distributed.initialize() to polyaccel",
            )
        _num_holders += _num_holders > 0
        return _num_holders > 0
    address = f"{rendezvous.address}:{rendezvous.coordinator_port}"
    if rendezvous.process_index > 0:
        _wait_for_coordinator(rendezvous)
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=rendezvous.num_processes,
            process_id=rendezvous.process_index,
            initialization_timeout=_JOIN_TIMEOUT_S,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
        )
    except Exception as error:
        raise LaunchError(
            f"process {rendezvous.process_index} of {rendezvous.num_processes} could not join the job at {address}: {error}",
            "check that process 0 runs and that its port can be reached from here; create the Accelerator before using jax",
        ) from error
    _num_holders = 1
    if rendezvous.interface is not None:
        job.exchange_over(rendezvous.interface)
    job.leave_at_exit()
    return True


def _wait_for_coordinator(rendezvous: Rendezvous) -> None:
    """Return when process 0 listens. jax's own client ends the whole process, without an exception, where it does not."""
    end = time.monotonic() + _JOIN_TIMEOUT_S
    while True:
        try:
            socket.create_connection((rendezvous.address, rendezvous.coordinator_port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise LaunchError(
                    f"process {rendezvous.process_index} of {rendezvous.num_processes} could not reach process 0 at"
                    f" {rendezvous.address}:{rendezvous.coordinator_port} within {_JOIN_TIMEOUT_S} s: {error}",
                    "check that process 0 runs, and that its port is not blocked",
                ) from error
            time.sleep(0.1)


def _leave(collectives: Collectives) -> None:
    global _num_holders
    _num_holders -= 1
    if _num_holders == 0:
        collectives.calls.close()
        if not collectives.calls.is_broken:  # else the others may never say goodbye
            job.say_goodbye()

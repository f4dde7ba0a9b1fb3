"""THE SEAM: what the core asks of a backend, an engine and a bridge, and the values that cross it.

Nothing here imports a framework, and nothing in the core reaches behind these interfaces. `docs/writing_a_backend.md` builds a
backend against this page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from polyaccel.averages import ParameterAverage as ParameterAverage
from polyaccel.case import Case as Case
from polyaccel.collectives import Collectives as Collectives
from polyaccel.config import Config
from polyaccel.data.spec import LoaderSpec as LoaderSpec
from polyaccel.dialects import Dialect, Role
from polyaccel.sharding.plan import ModelHints
from polyaccel.shards import ArraySpec as ArraySpec
from polyaccel.shards import Shard as Shard
from polyaccel.shards import StatefulEngine as StatefulEngine
from polyaccel.topology import Topology
from polyaccel.weighting import WeightingEngine as WeightingEngine

if TYPE_CHECKING:  # both live above the seam and are only named by it
    from polyaccel.launch.rendezvous import Rendezvous
    from polyaccel.plan import Plan

Array = Any  # an array of the engine's framework
T = TypeVar("T")

Feature = Literal[
    "backward_value",
    "gradient_sync",
    "compile",
    "multi_process",
    "host_placement",
    "compile_events",
    "device_stats",
    "fence",
    "flops",
    "profile",
    "ddp",
    "grad_scaler",
    "autocast_cache",
    "process_group",
    "uneven_inputs",
    "create_model",
    "sharding_rules",
    "remat",
    "offload",
]
# backward_value: a loss value can be differentiated after it was computed (form one of a step)
# gradient_sync:  skipping the gradient exchange between processes (no_sync) saves communication, and each process then has parameters
#                 of its own: `engine.average_parameters(model)` replaces them by their mean over all processes, in place. Inside
#                 `engine.sync_in_backward(model)` gradients are exchanged even if the forward passes ran without an exchange
# sharding_rules: `plan.sharding_rules` say by name how parameters are cut over fsdp and tensor
# remat:          `plan.remat` says what a backward pass computes again instead of keeping it
# offload:        `plan.offload` says where parts of parameters, gradients and optimizer state rest between uses
# create_model:   `engine.create_model(make)` has parameters computed where they will be kept, never whole on one device
# compile:        the engine compiles a prepared model when the configuration asks for it
# multi_process:  more than one process can join a job here
# host_placement: `prepare_model(..., device_placement=False)` and `LoaderSpec.device_placement=False` leave models and batches in place
# compile_events: the engine lists every program that it compiles, as `engine.compile_events`
# device_stats:   `engine.device_name` is what the driver calls its devices, and `engine.device_memory()` the most bytes that were in use
#                 on one of this process's devices, with the limit: (used, limit or None); None where it is the host's own memory
# fence:          `engine.fence()` gives a function that returns when the device has done what was given to it so far, on any thread;
#                 None where it has done so already. It waits for nothing itself
# flops:          `engine.count_flops()` starts counting what its programs multiply, and gives a function that returns the floating
#                 point operations since then, of all devices of the job; None where a program cannot be counted
# profile:        `engine.tracer(settings)` gives a Tracer; it raises UnsupportedError for settings that it cannot record
# uneven_inputs:  inside `engine.joined(handles)` processes may have different numbers of batches
# uneven_inputs:  inside `engine.joined(handles)` processes may have different numbers of batches
# grad_scaler:    `engine.grad_scaler` is the torch.amp.GradScaler that scales the loss under fp16, else None
# ddp:            the settings ddp_... are honoured; autocast_cache, process_group: that setting is


# -- before any framework is imported ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend declares; the conformance suite runs exactly this, and the core refuses the rest by name."""

    dialect: Dialect  # what its engine speaks natively
    mesh_axes: frozenset[str]
    mixed_precision: frozenset[str]
    accepts_bridges: bool  # True: a model of the other dialect may be lowered to it
    features: frozenset[Feature]
    kinds: Mapping[tuple[str, str], tuple[Dialect, Role]] = field(
        default_factory=dict
    )  # classes that only this backend knows


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether a backend can be used on this machine; if not, why, and the command that cures it."""

    is_usable: bool
    version: str | None = None
    reason: str | None = None
    cure: str | None = None
    is_loaded: bool = False  # its framework is already imported: the user's script speaks it
    device: str | None = (
        None  # the accelerator that it would compute on ("tpu"), where that can be told without importing it
    )


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """One process that the launcher starts on this machine: the environment that pins it to its devices."""

    environment: Mapping[str, str] = field(default_factory=dict)


class Backend(Protocol):
    """An adapter before its framework is imported. Touching it is cheap and never raises."""

    name: str
    capabilities: Capabilities

    def probe(self) -> Probe:
        """Whether it can be used here. Never raises, imports no framework."""
        ...

    def worker_slots(
        self, num_processes: int | None, *, use_cpu: bool, gpus: Sequence[str] | None = None
    ) -> tuple[WorkerSlot, ...]:
        """The processes to start on this machine. None: as many as the machine has devices for (torch: one per device; xla
        and jax: one). `gpus` are those that the job may use, in the words of CUDA_VISIBLE_DEVICES; None: all of the machine.
        Raises LaunchError for more processes than devices can serve."""
        ...

    def case(self) -> Case:
        """The smallest training in the backend's own dialect, to see whether an engine computes what it should. Imports the
        framework."""
        ...

    def multiply_exactly(self) -> None:
        """From now on products of float32 keep float32's precision, also on devices that shorten them otherwise (TF32, bfloat16).
        Imports the framework."""
        ...

    def holds_devices(self) -> str | None:
        """Why a process forked from this one could not use the framework any more (in words for the user), or None."""
        ...

    def seed(self, value: int) -> None:
        """Seed the framework's global generators, if it is loaded."""
        ...

    def open(self, config: Config, rendezvous: Rendezvous) -> Engine:
        """Import the framework and join the job. Every process of the job must call it."""
        ...


# -- the live connection of one process ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CompileEvent:
    """One program that the engine compiled (or fetched from the persistent cache).

    `cause` is "first call", or what changed since the most similar earlier program of this name, from what to what. `capture_s`
    is the bridge's part, `compile_s` tracing and compiling. `step` counts the optimizer updates that were taken before.
    """

    program: str
    cause: str
    capture_s: float
    compile_s: float
    step: int


@dataclass(frozen=True, slots=True)
class RetainedLoss:
    """A loss value whose graph is needed for another backward; `Engine.backward` takes it in place of the value."""

    value: Any


@dataclass(frozen=True, slots=True)
class LossCall:
    """A loss to be computed and differentiated: `function(*args, **kwargs)` gives the loss, or (loss, auxiliary values)."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StepSpec:
    """A fused training step: `loss_fn(model, batch)`, then the update of `optimizer` with an optional clip by global norm.

    `model` and `optimizer` are engine handles, `public_model` is what `loss_fn` takes in user code; the scheduler is stepped by
    the core, after the update. `scale` is one over the micro batches per update, `weight` the name of the auxiliary value that
    weights them instead. With a `bridge`, each batch becomes a ProgramCall by
    `bridge.lower(LossCall(loss_fn, (public_model, batch), {}), "loss")`. `on_grad_norm` takes the L2 norm of each update's
    gradients before the clip, on the device; where it is None nobody asks, and no norm is computed for it.
    """

    loss_fn: Callable[..., Any]
    model: Any
    public_model: Any
    optimizer: Any
    max_grad_norm: float | None = None
    scale: float = 1.0
    weight: str | None = None
    bridge: Bridge | None = None
    on_grad_norm: Callable[[Any], None] | None = None

    @property
    def norm_limit(self) -> float | None:
        """The norm to clip to, infinite where the norm is only asked for; None where neither."""
        if self.max_grad_norm is None and self.on_grad_norm is not None:
            return math.inf
        return self.max_grad_norm


class Tracer(Protocol):
    """Records what the host and the devices do, into files. Used in this order: warm_up, start, stop, and again; or discard."""

    native: Any  # the framework's own profiler, which user code may ask; None where it has none

    def warm_up(self) -> None:
        """Get ready: what the recorder needs to settle is thrown away."""
        ...

    def start(self, folder: Path, name: str) -> None:
        """Record from now on. The files will stand in `folder`, and `name` is like no other of it."""
        ...

    def stop(self) -> list[Path]:
        """Write the trace and return its files: a JSON of Chrome's format (`.json` or `.json.gz`) where the framework writes one."""
        ...

    def discard(self) -> None:
        """End a warm-up that no recording follows."""
        ...

    def span(self, name: str, step: int | None) -> AbstractContextManager[Any]:
        """A named span of the trace; with a number, that of a step, which is part of its name: `ProfilerStep#3`, or after a space
        where the framework gives # a meaning."""
        ...


class Engine(StatefulEngine, WeightingEngine, Protocol):
    """One per process. Handles that it returns are opaque to the core. What it remembers is read and written as `shards` says."""

    topology: Topology
    collectives: Collectives
    gradient_state: Any  # the core's accumulation.GradientState, set right after bind; None: every step is a real one

    @property
    def device(self) -> Any:
        """What `accelerator.device` gives in a script of the engine's own dialect."""
        ...

    def bind(self, plan: Plan) -> None:
        """Build the mesh and fix precision and accumulation; called once, before anything is prepared."""
        ...

    def seed(self, value: int) -> None:
        """Restart the engine's own random stream."""
        ...

    def synchronize(self) -> None:
        """Return when the device has finished all work given to it."""
        ...

    def close(self) -> None:
        """Leave the job. Idempotent."""
        ...

    def prepare_model(self, model: Any, *, evaluation_mode: bool = False) -> Any:
        """Native model (or a bridge's ModelSource) in, handle out: placed, wrapped, sharded. Values are copied, never lost."""
        ...

    def prepare_optimizer(self, optimizer: Any, model: Any | None) -> Any:
        """An OptimizerHandle (`polyaccel.prepared`), in the torch dialect with param_groups."""
        ...

    def prepare_scheduler(self, scheduler: Any, optimizer: Any | None) -> Any:
        """A handle with step(), get_last_lr(), state_dict(), load_state_dict()."""
        ...

    def prepare_loader(self, loader: Any, spec: LoaderSpec) -> Any:
        """A `polyaccel.data.PreparedLoader` that yields this process's share of every global batch, placed."""
        ...

    def unwrap(self, handle: Any) -> Any:
        """The user's own object, with current values. `remove_autocast(model)`, where an engine has it, lets that compute in the
        parameters' own precision."""
        ...

    def autocast(self, *, enabled: bool = True, cache_enabled: bool | None = None) -> AbstractContextManager[Any]:
        """The forward pass inside computes in the mixed precision; not enabled, in the dtype of its values, also inside another one."""
        ...

    def gradient_sync(self, model: Any, *, enabled: bool) -> AbstractContextManager[Any]:
        """Inside with enabled=False, backward does not exchange gradients between processes."""
        ...

    def parameter_average(self, model: Any) -> ParameterAverage:
        """A new moving average of a model's parameters."""
        ...

    def backward(self, loss: Any, *, scale: float, weight: Any = None) -> Any:
        """Add scale * d(loss) to the gradients; `loss` is a value, a RetainedLoss, a LossCall or a bridge's ProgramCall.

        For a call, returns what the function returned (loss, or (loss, aux)) with the loss as its mean over the global batch. With
        a `weight` (see WeightingEngine) the factor and the mean are weighted: a number, an array, or the name of one of aux.
        """
        ...

    def clip_grad_norm(self, target: Any, max_norm: float, norm_type: float) -> Any:
        """Scale gradients so that their total norm is at most max_norm; returns the norm before (a value of the engine).

        `target` is what user code gave: an iterable of the dialect's parameters or a prepared model; from a bridge a list of
        (ProgramModel, names or None for all).
        """
        ...

    def clip_grad_value(self, target: Any, clip_value: float) -> None:
        """Clamp every gradient element of `target` (as in clip_grad_norm) to [-clip_value, clip_value]."""
        ...

    def train_step(self, spec: StepSpec) -> Callable[..., Any] | None:
        """A fused `step(batch, sync=bool)`: computes, accumulates, and when `sync` updates. None: the core's own composition
        of backward, clip and optimizer.step is used."""
        ...


# -- bridges and the programs they make ----------------------------------------------------------------------------------


@dataclass(slots=True)
class ProgramResult:
    """What a program returns: gradients and mutated buffers by name; `grads` are of `loss_scale * loss`, `loss` is not scaled."""

    loss: Array | None
    outputs: list[Array]
    grads: dict[str, Array]
    buffers: dict[str, Array]


class Program(Protocol):
    """A pure function, traceable by jax.jit, made for one input signature (shapes of one data shard, or of the global batch).

    `params` and `buffers` are flat: `<model name>.<name in the model>`.
    """

    grad_names: tuple[str, ...]  # parameters that receive a gradient (empty for a forward program)
    output_axes: tuple[int | None, ...]  # per output: the dim that carries the batch; None: one value per shard
    draws_randomly: bool  # False: `key` is not used, and no number of the random stream is spent
    writes_params: bool  # True: among the `buffers` of its results are parameters that it wrote to, before any update

    def __call__(
        self,
        params: dict[str, Array],
        buffers: dict[str, Array],
        key: Array,
        inputs: Sequence[Array],
        loss_scale: Array | None,
    ) -> ProgramResult: ...


Partitioning = Literal["pmap", "sharding"]


@runtime_checkable
class ProgramCall(Protocol):
    """One piece of work on models, in whatever dialect it was written. The engine jits, shards, accumulates and updates.

    A global one may have more: `constants`, in words, that the processes of a job must have alike in what their gradients are computed
    by: those of operations on global values, and those of model calls, which each replica may have differently; None where it gives
    no gradients.
    """

    models: tuple[ProgramModel, ...]
    inputs: Sequence[Any]  # array leaves of the arguments: arrays of the engine, or host (numpy) arrays
    # Per input the dim cut over data shards, None: one value, the same on every shard. For all of them None: dim 0 of the inputs
    # whose dim 0 is the batch size, which is that of the first input with a dim.
    input_axes: Sequence[int | None] | None
    signature: Hashable  # equal signatures and equal input specs share one compiled program
    wants_64bit: bool  # trace and call it with jax's 64-bit types on, so that int64 stays exact
    draw: int | None  # the random counter to use (what `current_key` gave earlier); None: the next one
    is_global: (
        bool  # True: the program wants global shapes and cuts its own replica parts with `shard_call` (a recorded loop)
    )

    def build(self, specs: Sequence[ArraySpec], *, with_grads: bool, num_shards: int, shard_call: ShardCall) -> Program:
        """Make the program for inputs of these specs (per data shard, or global). Raises PrepareError / UnsupportedError."""
        ...

    def describe(self, inputs: Sequence[Any]) -> tuple[str, dict[str, str]]:
        """The user's name for what is called, and by readable name everything that a program of it is specialised on: shapes and
        dtypes of the inputs (arrays or tracers), static arguments, modes of the models. Called only when one is compiled."""
        ...

    def finish(self, loss: Array | None, outputs: list[Array]) -> Any:
        """What user code gets: the structure it wrote, in its own dialect."""
        ...


class ShardCall(Protocol):
    """Wraps a per-shard function so that it can be called on global arrays inside a global program (jax.shard_map).

    `in_axes` / `out_axes`: per array the dim that is cut over data shards, None: the same on all shards on the way in, and on
    the way out the mean over shards ("mean") or their sum ("sum") as `out_axes` says. The function's first argument is its
    shard index, for per-replica random keys.
    """

    @property
    def num_sequence_parts(self) -> int:
        """In how many equal parts, one after the other, devices hold the sequences of a global program."""
        ...

    def __call__(
        self,
        function: Callable[..., tuple[Array, ...]],
        in_axes: Sequence[int | None],
        out_axes: Sequence[int | str | None],
    ) -> Callable[..., tuple[Array, ...]]: ...

    def sum_over_shards(self, value: Array) -> Array:
        """Traced, in a per-shard function or in a replica program: the sum over all data shards, the same on each of them."""
        ...


class ModelSource(Protocol):
    """What a bridge lowers a model to: named host arrays and its mode. Programs come from ProgramCalls that name the model."""

    wants_64bit: bool  # its arrays, and its optimizer's update, keep 64-bit types
    transient: frozenset[str]  # buffers that the dialect does not save with the model

    def settle(self, *, for_writing: bool) -> None:
        """Give the handle everything that user code wrote or recorded: its arrays are about to be read, or replaced."""
        ...

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(params, buffers) as numpy arrays by the dialect's own names; tied parameters once."""
        ...

    def specs(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Of `read`, with a `shape` and a `dtype` each; no value is computed for it."""
        ...

    def hints(self) -> ModelHints:
        """What the model says of how its parameters are cut over a mesh."""
        ...

    def attach(self, model: ProgramModel) -> None:
        """Called by prepare_model with the handle that now owns the values."""
        ...


class ProgramModel(Protocol):
    """The handle of a model on a program-running engine: it owns the arrays."""

    name: str  # prefix of its arrays in programs, unique per engine
    params: dict[str, Array]
    buffers: dict[str, Array]
    grads: dict[str, Array]  # by name; empty after zero_grad
    source: Any
    version: int  # grows with every change of params or buffers
    engine: ProgramEngine

    def assign(self, values: Mapping[str, Any]) -> None:
        """Replace parameters and buffers by host arrays of the same shapes (copied, placed, cast to the dtype they have)."""
        ...

    def zero_grad(self, names: Sequence[str] | None = None) -> None:
        """Drop the gradients of these parameters (None: of all)."""
        ...


class OptimizerSource(Protocol):
    """What a bridge lowers an optimizer to: a pure update rule over a model's named parameters (names without model prefix)."""

    model: ProgramModel

    def names(self) -> tuple[str, ...]: ...
    def init(self, params: dict[str, Array]) -> dict[str, dict[str, Array]]: ...
    def hyperparameters(self) -> Any:
        """A pytree of numpy scalars, read from the live optimizer at every step and traced."""
        ...

    def signature(self) -> Hashable:
        """Static flags: the engine retraces only when it changes."""
        ...

    def update(
        self, params: dict[str, Array], grads: dict[str, Array], state: dict[str, dict[str, Array]], hyper: Any
    ) -> tuple[dict[str, Array], dict[str, dict[str, Array]]]:
        """Pure and traceable; parameters without a gradient stay as they are, with their state."""
        ...

    def attach(self, handle: Any) -> None:
        """Called by prepare_optimizer with the handle that now owns the state."""
        ...

    def parameter_names(self) -> list[str] | None:
        """As `StatefulEngine.parameter_names`."""
        ...

    def saved(self, state: Any) -> dict[str, Array]:
        """What of a state is saved, by the names that it has on every engine (see `shards.StatefulEngine`)."""
        ...

    def check(self, specs: Mapping[str, ArraySpec], state: Any) -> None:
        """Raises CheckpointError where arrays of these names, shapes and dtypes are not what `saved` gives of such a state."""
        ...

    def restored(self, arrays: Mapping[str, Any], state: Any) -> Any:
        """The state, in the structure of `state`, of host arrays by the names of `saved`."""
        ...


class HostLoader(Protocol):
    """A loader that can be cut: `shard` gives this process's share of every global batch as host batches."""

    def shard(self, sharding: Any) -> Any: ...


class ProgramEngine(Engine, Protocol):
    """An engine that runs programs (jax); what bridges and dialects may ask of it beside Engine."""

    plan: Plan

    def run_forward(self, call: ProgramCall) -> Any:
        """Run the call without gradients, update buffers, and return `call.finish(None, outputs)`."""
        ...

    def place(self, leaves: Sequence[Any]) -> list[Array]:
        """Host arrays of this process -> global arrays, batch dim cut over the data shards; asynchronous."""
        ...

    def to_host(self, array: Array) -> Any:
        """This process's part of an array as numpy; waits for the device."""
        ...

    def state_to_host(self, array: Array, what: str) -> Any:
        """The whole of a parameter, a gradient or of optimizer state as numpy; waits for the device.

        Raises UnsupportedError, naming `what`, where pieces of it lie on other processes, but for reads inside `reading_whole()`.
        """
        ...

    def reading_whole(self) -> AbstractContextManager[None]:
        """Inside, what lies in pieces on several processes is gathered when it is read: every process must read the same, in the same
        order."""
        ...

    def local(self, array: Array) -> Array:
        """This process's part of an array as an array of its own: the same one in a job of one process."""
        ...

    def current_key(self) -> tuple[Array, int]:
        """(base key, the counter of the next draw): forward passes that belong to one backward share them."""
        ...


class Bridge(Protocol):
    """Translates a dialect into the dialect that an engine speaks; knows no engine but what ProgramEngine says."""

    source: Dialect
    target: Dialect
    engine: Any  # the engine that it serves; set by the core right after the bridge is made

    def unwrap(self, value: Any) -> Any:
        """What `engine.unwrap` gave -> the user's own object."""
        ...

    def lower(self, value: Any, role: Role) -> Any:
        """User object -> what the engine takes: a model -> ModelSource, an optimizer -> OptimizerSource, a loader -> HostLoader,
        a LossCall or loss value ("loss") -> ProgramCall, any array ("value") -> an array that the engine's collectives take,
        an iterable of parameters or a model ("parameters") -> list of (ProgramModel, names or None for all)."""
        ...

    def lift(self, value: Any) -> Any:
        """Engine handle or value -> what user code sees: a model, an optimizer, a tensor; containers are mapped."""
        ...

    def lift_batch(self, host_batch: Any, placed_batch: Any) -> Any:
        """A batch of the user's dialect that carries its already placed arrays."""
        ...

    def device(self, engine: Engine) -> Any:
        """What `accelerator.device` gives in a script of the source dialect."""
        ...

    def autocast(self, engine: Engine, *, enabled: bool = True) -> AbstractContextManager[Any]:
        """Operations of the source dialect inside compute in the mixed precision; not enabled, in the dtype of their values."""
        ...

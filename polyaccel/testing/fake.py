"""A whole backend in numpy: one process, one device, a linear model whose gradients are written by hand.

`docs/writing_a_backend.md` walks through this file. It is complete: the conformance suite runs against it as it does against
torch, xla and jax.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyaccel.collective_calls import CollectiveCalls
from polyaccel.data import DataSharding, GlobalRows, PreparedLoader, ShardedBatchSampler
from polyaccel.errors import CheckpointError, LaunchError, PrepareError, UnsupportedError
from polyaccel.prepared import OptimizerHandle
from polyaccel.protocols import (
    ArraySpec,
    Capabilities,
    LoaderSpec,
    LossCall,
    Probe,
    RetainedLoss,
    Shard,
    StepSpec,
    WorkerSlot,
)
from polyaccel.store import MemoryStore
from polyaccel.topology import Topology
from polyaccel.weighting import named_weight

if TYPE_CHECKING:
    from polyaccel.accumulation import GradientState
    from polyaccel.config import Config
    from polyaccel.config.profile import ProfileKwargs
    from polyaccel.launch.rendezvous import Rendezvous
    from polyaccel.plan import Plan

# -- the dialect: what a user of this "framework" writes -------------------------------------------------------------------


class FakeModel:
    """y = x @ weight + bias, float32; `params` and `grads` by name."""

    def __init__(self, weight: Any, bias: Any) -> None:
        self.params = {"weight": np.array(weight, np.float32), "bias": np.array(bias, np.float32)}
        self.grads: dict[str, Any] = {}

    def __call__(self, x: Any) -> Any:
        return x @ self.params["weight"] + self.params["bias"]  # (batch, out)

    def squared_error(self, x: Any, y: Any) -> FakeLoss:
        """mean((model(x) - y) ** 2), with the way back."""
        error = self(x) - y

        def backward(scale: float) -> None:
            slope = (2 * scale / error.size) * error
            for name, grad in (("weight", x.T @ slope), ("bias", slope.sum(0))):
                self.grads[name] = self.grads.get(name, 0) + grad.astype(np.float32)

        return FakeLoss(np.float32((error**2).mean()), backward)


@dataclass(frozen=True, slots=True)
class FakeLoss:
    """A loss value that can still be differentiated."""

    value: Any
    backward: Callable[[float], None]

    def item(self) -> float:
        """The value as a Python float."""
        return float(self.value)

    __float__ = item


class FakeSGD:
    """params -= lr * grads. `param_groups` as in torch, so that a scheduler can set the rate."""

    def __init__(self, model: FakeModel, lr: float) -> None:
        self.model = model
        self.param_groups = [{"lr": lr}]
        self.step_was_skipped = False

    def step(self) -> None:
        """One update."""
        for name, grad in self.model.grads.items():
            self.model.params[name] = self.model.params[name] - np.float32(self.param_groups[0]["lr"]) * grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.model.grads.clear()


class FakeScheduler:
    """Multiplies the rate by `gamma` at every step."""

    def __init__(self, optimizer: FakeSGD, gamma: float) -> None:
        self.optimizer = optimizer
        self.gamma = gamma

    def step(self) -> None:
        """One step of the schedule."""
        for group in self.optimizer.param_groups:
            group["lr"] *= self.gamma

    def get_last_lr(self) -> list[float]:
        """The current rates."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """What it needs to continue."""
        return {"gamma": self.gamma}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        self.gamma = state["gamma"]


class FakeLoader:
    """Batches of rows of equally long arrays, in order."""

    def __init__(self, arrays: dict[str, Any], batch_size: int) -> None:
        self.arrays = arrays
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    @property
    def num_samples(self) -> int:
        """Rows."""
        return len(next(iter(self.arrays.values())))

    def batches(self) -> list[list[int]]:
        """Row numbers of each batch."""
        rows = list(range(self.num_samples))
        return [rows[start : start + self.batch_size] for start in range(0, self.num_samples, self.batch_size)]


# -- the engine ------------------------------------------------------------------------------------------------------------


class _Optimizer(OptimizerHandle):
    """What user code holds: steps only with the accumulation window."""

    def __init__(self, optimizer: FakeSGD, engine: FakeEngine) -> None:
        self.optimizer = optimizer
        self._engine = engine

    @property
    def step_was_skipped(self) -> bool:
        return bool(self._told_overflow)  # plain descent leaves no step out

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self, closure: None = None) -> None:
        if self._engine.is_syncing:
            self._told_overflow = None
            self._engine.end_window()
            self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._engine.is_syncing:
            self._engine.end_window()
            self.optimizer.zero_grad(set_to_none)


class _Collectives:
    """Between one process and itself."""

    def __init__(self) -> None:
        self.calls = CollectiveCalls()

    def all_gather(self, array: Any) -> Any:
        return np.atleast_1d(array)

    def all_reduce(self, array: Any, operation: str) -> Any:
        return np.array(array)

    def broadcast(self, array: Any, from_process: int) -> Any:
        return np.array(array)

    def all_gather_object(self, value: Any) -> list[Any]:
        from polyaccel import wire

        return [wire.decode(wire.encode(value))]

    def barrier(self, tag: str) -> None:
        return None

    def store(self) -> MemoryStore:
        return MemoryStore()


class FakeAverage:
    """A moving average of a model's parameters."""

    def __init__(self, model: FakeModel) -> None:
        self.shapes = {name: param.shape for name, param in model.params.items()}
        self._model = model
        self._averages = {name: param.copy() for name, param in model.params.items()}

    def update(self, weight: float) -> None:
        for name, param in self._model.params.items():
            self._averages[name] += np.float32(weight) * (param - self._averages[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        kept, self._model.params = self._model.params, self.read()
        try:
            yield
        finally:
            self._model.params = kept

    def read(self) -> dict[str, Any]:
        return {name: average.copy() for name, average in self._averages.items()}

    def write(self, arrays: Mapping[str, Any]) -> None:
        self._averages = {name: np.array(arrays[name], np.float32) for name in self.shapes}


class FakeTracer:
    """Writes the spans that the core names, and nothing else, since nothing else happens here."""

    native = None

    def __init__(self) -> None:
        self._spans: list[dict[str, Any]] = []

    def warm_up(self) -> None:
        return None

    def start(self, folder: Path, name: str) -> None:
        self._file = folder / f"{name}.trace.json"
        self._spans = []

    def stop(self) -> list[Path]:
        self._file.write_text(json.dumps({"traceEvents": self._spans}), "utf-8")
        return [self._file]

    def discard(self) -> None:
        return None

    @contextmanager
    def span(self, name: str, step: int | None) -> Iterator[None]:
        began = time.perf_counter_ns()
        yield
        microseconds = (time.perf_counter_ns() - began) / 1000
        label = name if step is None else f"{name}#{step}"
        self._spans.append({"name": label, "ph": "X", "ts": began / 1000, "dur": microseconds, "pid": 0, "tid": 0})


class FakeEngine:
    """One process, one device."""

    gradient_state: GradientState | None = None
    _divided_by = 1.0  # the weight that gradients of the open window were divided by

    def __init__(self) -> None:
        self.topology = Topology(0, 1, 0, 1, 1, "numpy")
        self.collectives = _Collectives()
        self.device = "cpu"
        self.generator = np.random.default_rng(0)
        self._prepared_loaders: list[Any] = []
        self._models: list[weakref.ref[FakeModel]] = []

    @property
    def is_syncing(self) -> bool:
        """True when this micro batch's step is a real one."""
        return self.gradient_state is None or self.gradient_state.sync_gradients

    def bind(self, plan: Plan) -> None:
        self.plan = plan

    def seed(self, value: int) -> None:
        self.generator = np.random.default_rng(value)

    def synchronize(self) -> None:
        return None

    def tracer(self, settings: ProfileKwargs) -> FakeTracer:
        return FakeTracer()

    def close(self) -> None:
        return None

    def prepare_model(self, model: FakeModel, *, evaluation_mode: bool = False) -> FakeModel:
        self._models.append(weakref.ref(model))
        return model

    def prepare_optimizer(self, optimizer: FakeSGD, model: Any | None) -> _Optimizer:
        if model is not None and optimizer.model is not model:
            raise PrepareError(
                "the optimizer updates a FakeModel that is not the one prepared with it",
                "prepare the optimizer's own model",
            )
        return _Optimizer(optimizer, self)

    def prepare_scheduler(self, scheduler: FakeScheduler, optimizer: Any | None) -> FakeScheduler:
        return scheduler

    def prepare_loader(self, loader: FakeLoader, spec: LoaderSpec) -> PreparedLoader:
        return PreparedLoader(_HostBatches(loader, spec.sharding(self.plan)), observer=self.gradient_state)

    def unwrap(self, handle: FakeModel) -> FakeModel:
        return handle

    def autocast(self, *, enabled: bool = True, cache_enabled: bool | None = None) -> AbstractContextManager[Any]:
        return nullcontext()

    def gradient_sync(self, model: Any, *, enabled: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Any, *, scale: float, weight: Any = None) -> Any:
        if isinstance(loss, RetainedLoss):
            loss = loss.value  # a FakeLoss holds its way back as long as it lives
        result = loss.function(*loss.args, **loss.kwargs) if isinstance(loss, LossCall) else loss
        value, *aux = result if isinstance(result, tuple) else (result,)
        if not isinstance(value, FakeLoss):
            raise PrepareError(f"backward got a {type(value).__name__}, not a loss", "pass model.squared_error(x, y)")
        if weight is not None:
            scale = float(named_weight(result, weight) if isinstance(weight, str) else weight)
            self._state.window_weights = (self._state.window_weights or 0.0) + scale
            for grads in self._gradients():  # those of a window that was normalised already, and goes on
                _times(grads, self._divided_by)
            self._divided_by = 1.0
        value.backward(scale)
        return (value.value, *aux) if aux else value.value

    def normalise_gradients(self) -> None:
        total = self._state.window_weights
        for grads in self._gradients():
            _times(grads, 1 / total if total else 0.0)
        self._divided_by = total

    def scale_gradients(self, factor: float) -> None:
        for grads in self._gradients():
            _times(grads, factor)

    def read_weight(self) -> float:
        return float(self._state.window_weights)

    def write_weight(self, total: float) -> None:
        self._state.window_weights = total

    def end_window(self) -> None:
        """An update begins, or gradients are dropped: weights count anew."""
        self._divided_by = 1.0
        if self.gradient_state is not None:
            self.gradient_state.window_weights = None

    @property
    def _state(self) -> GradientState:
        assert self.gradient_state is not None, "the core sets it right after bind"
        return self.gradient_state

    def _gradients(self) -> list[dict[str, Any]]:
        return [model.grads for reference in self._models if (model := reference()) is not None]

    def parameter_average(self, model: FakeModel) -> FakeAverage:
        return FakeAverage(model)

    def clip_grad_norm(self, target: FakeModel, max_norm: float, norm_type: float) -> Any:
        flat = np.concatenate([grad.ravel() for grad in target.grads.values()])
        norm = float(np.linalg.norm(flat, norm_type))
        factor = np.float32(min(1.0, max_norm / (norm + 1e-6)))
        target.grads = {name: grad * factor for name, grad in target.grads.items()}
        return norm

    def clip_grad_value(self, target: FakeModel, clip_value: float) -> None:
        target.grads = {name: grad.clip(-clip_value, clip_value) for name, grad in target.grads.items()}

    def train_step(self, spec: StepSpec) -> None:
        return None  # the core composes one from the methods above

    def read_state(self, handle: Any) -> Iterator[Shard]:
        if isinstance(handle, _Optimizer):
            return  # plain descent remembers nothing
        for name, array in handle.params.items():
            yield Shard(name, array.shape, (0,) * array.ndim, array.dtype.name, array.copy())

    def check_state(self, handle: Any, specs: Mapping[str, ArraySpec]) -> None:
        params = {} if isinstance(handle, _Optimizer) else handle.params
        wanted = {name: ArraySpec(array.shape, array.dtype.name) for name, array in params.items()}
        if wanted != dict(specs):
            names = sorted(name for name in {*wanted, *specs} if wanted.get(name) != specs.get(name))
            raise CheckpointError(
                f"the checkpoint does not fit the {type(handle).__name__}: {', '.join(names)}",
                "load its own checkpoint",
            )

    def write_state(self, handle: Any, shards: Iterable[Shard]) -> None:
        shards = list(shards)
        self.check_state(handle, {shard.name: ArraySpec(shard.global_shape, shard.dtype) for shard in shards})
        for shard in shards:
            _write(handle.params[shard.name], shard)

    def read_gradients(self, handle: FakeModel) -> Iterator[Shard]:
        for name, grad in handle.grads.items():
            yield Shard(name, (1, *grad.shape), (0,) * (grad.ndim + 1), grad.dtype.name, grad.copy()[None])

    def write_gradients(self, handle: FakeModel, shards: Iterable[Shard]) -> None:
        handle.grads.clear()
        for shard in shards:
            _write(handle.grads.setdefault(shard.name, np.zeros(shard.global_shape, np.float32)), shard)

    def parameter_names(self, handle: Any) -> None:
        return None

    def read_scaler(self) -> None:
        return None

    def write_scaler(self, state: Mapping[str, float | int]) -> None:
        return None

    def read_random(self) -> dict[str, Any]:
        return {"fake": self.generator.bit_generator.state}

    def write_random(self, state: Mapping[str, Any]) -> None:
        self.generator.bit_generator.state = state["fake"]


def _times(grads: dict[str, Any], factor: float) -> None:
    for name, grad in grads.items():
        grads[name] = np.float32(factor) * grad if factor else np.zeros_like(grad)


def _write(array: Any, shard: Shard) -> None:
    ends = zip(shard.offset, shard.data.shape, strict=True)
    array[tuple(slice(start, start + size) for start, size in ends)] = shard.data


class _HostBatches:
    """A FakeLoader's share of this process: row numbers from the core's sampler, rows from the arrays."""

    seed: int | None = None  # rows come in order

    def __init__(self, loader: FakeLoader, sharding: DataSharding) -> None:
        self.loader = loader
        self.batch_size: int | None = loader.batch_size
        self.total_batch_size = sharding.total_batch_size(loader.batch_size)
        self._sampler = ShardedBatchSampler(_Rows(loader), sharding)

    def __len__(self) -> int:
        return len(self._sampler)

    def set_epoch(self, epoch: int) -> None:
        return None

    def read(self, skip: int = 0, seed: int | None = None) -> Iterator[tuple[Any, GlobalRows | None]]:
        for index, chosen in enumerate(self._sampler):
            rows = self._sampler.rows.popleft()
            if index >= skip:
                yield {name: array[np.array(chosen)] for name, array in self.loader.arrays.items()}, rows


class _Rows:
    """The batch sampler of a FakeLoader."""

    drop_last = False

    def __init__(self, loader: FakeLoader) -> None:
        self.batch_size = loader.batch_size
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._loader.batches())


class FakeCase:
    """The smallest training of the dialect (`polyaccel.case.Case`)."""

    backend = "fake"
    dialect = "fake"
    has_schedulers = True

    def model(self, weight: Any, bias: Any) -> FakeModel:
        return FakeModel(weight, bias)

    def optimizer(self, model: FakeModel, lr: float) -> FakeSGD:
        return FakeSGD(model, lr)

    def scheduler(self, optimizer: FakeSGD, gamma: float) -> FakeScheduler:
        return FakeScheduler(optimizer, gamma)

    def loader(self, x: Any, y: Any, batch_size: int) -> FakeLoader:
        return FakeLoader({"x": x, "y": y}, batch_size)

    def loss(self, model: FakeModel, batch: Any) -> FakeLoss:
        return model.squared_error(batch["x"], batch["y"])

    def counted_loss(self, model: FakeModel, batch: Any) -> tuple[FakeLoss, dict[str, int]]:
        """The loss over the rows whose first target is positive, with how many they are."""
        counted = batch["y"][:, 0] > 0
        if not counted.any():
            return FakeLoss(np.float32(np.nan), lambda scale: None), {"rows": 0}
        return model.squared_error(batch["x"][counted], batch["y"][counted]), {"rows": int(counted.sum())}

    def parameters(self, model: FakeModel) -> FakeModel:
        return model

    def array(self, values: Any) -> Any:
        return np.asarray(values)

    def weights(self, model: FakeModel) -> dict[str, Any]:
        return model.params


class FakeBackend:
    """The declaration: what exists before anything is imported."""

    name = "fake"
    capabilities = Capabilities(
        dialect="fake",
        mesh_axes=frozenset({"data"}),
        mixed_precision=frozenset({"no"}),
        accepts_bridges=False,
        features=frozenset({"backward_value", "profile"}),
        kinds={
            ("polyaccel", "FakeModel"): ("fake", "model"),
            ("polyaccel", "FakeSGD"): ("fake", "optimizer"),
            ("polyaccel", "FakeScheduler"): ("fake", "scheduler"),
            ("polyaccel", "FakeLoader"): ("fake", "loader"),
        },
    )

    def probe(self) -> Probe:
        return Probe(is_usable=True, version=np.__version__)

    def worker_slots(
        self, num_processes: int | None, *, use_cpu: bool, gpus: Sequence[str] | None = None
    ) -> Sequence[WorkerSlot]:
        if num_processes not in (None, 1):
            raise LaunchError(
                f"--num-processes {num_processes} is more than backend 'fake' can start", "use --num-processes 1"
            )
        return (WorkerSlot(),)

    def case(self) -> FakeCase:
        return FakeCase()

    def multiply_exactly(self) -> None:
        """numpy does."""

    def holds_devices(self) -> str | None:
        return None

    def seed(self, value: int) -> None:
        return None

    def open(self, config: Config, rendezvous: Rendezvous) -> FakeEngine:
        if rendezvous.num_processes > 1:
            raise UnsupportedError("backend 'fake' cannot join a job of several processes", "start one process")
        return FakeEngine()

"""The torch engine: one process on one device, eager PyTorch, DistributedDataParallel or parameters in pieces between processes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polyaccel import trees
from polyaccel.data import PreparedLoader, prepared_loader, refuse_prepared
from polyaccel.errors import PrepareError, UnsupportedError
from polyaccel.protocols import ArraySpec, LoaderSpec, LossCall, ParameterAverage, RetainedLoss, Shard, StepSpec
from polyaccel_torch import compiling, data_parallel, joining, looking, parallel, recomputing, state, tpu
from polyaccel_torch.dialect import loaders, modules, optimizers, weights
from polyaccel_torch.dialect.averages import ModuleAverage
from polyaccel_torch.dialect.modules import Autocast
from polyaccel_torch.placement import StreamFeeder
from polyaccel_torch.precision import LossScaler, autocast_of

if TYPE_CHECKING:
    from polyaccel.config import Config
    from polyaccel.config.profile import ProfileKwargs
    from polyaccel.launch.rendezvous import Rendezvous
    from polyaccel.plan import Plan
    from polyaccel_torch.sharded import Sharding

_NOTHING: AbstractContextManager[None] = nullcontext()


class TorchEngine:
    """See `polyaccel.protocols.Engine`. A model's handle is an nn.Module, an optimizer's a PreparedOptimizer."""

    gradient_state: Any = None

    def __init__(self, config: Config, place: Rendezvous) -> None:
        self.config = config
        exchange_timeout = timedelta(seconds=config.timeout_s)
        self._job = parallel.join(
            place, use_cpu=config.cpu, exchange_timeout=exchange_timeout, process_group=config.process_group
        )
        self.topology = self._job.topology
        self.collectives = self._job.collectives
        self._plan: Plan | None = None
        self._autocast: Autocast | None = None
        self._scaler: LossScaler | None = None
        self._sharding: Sharding | None = None  # of models whose parameters are cut over processes
        self._usual_weight: torch.Tensor | None = (
            None  # fp16: mean over shards of a backward's weight in the last window
        )
        # Weak on both sides: what user code drops is freed. A module that is its own handle has no entry in `_originals`.
        self._handles: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
        self._originals: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
        self._optimizers: weakref.WeakSet[optimizers.PreparedOptimizer] = weakref.WeakSet()

    # -- the process ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self._job.device

    def bind(self, plan: Plan) -> None:
        """Fix precision and data shards, and make the mesh where models are cut. Every process must call it."""
        self._plan = plan
        if plan.mesh.fsdp * plan.mesh.tensor * plan.mesh.sequence > 1:
            from polyaccel_torch.sharded import Sharding

            self._sharding = Sharding(plan, self.config, self.device)
        elif plan.offload != "none":
            raise UnsupportedError(
                f"offload={plan.offload!r} ({self.config.sources.get('offload', 'default')}) with mesh.fsdp=1: every process keeps and"
                " updates whole parameters on its device",
                "use mesh={'fsdp': -1} with it",
            )
        self._autocast = autocast_of(plan.precision, self.device, cache=self.config.autocast_cache)
        scaling = plan.precision.loss_scaling
        make = torch.amp.GradScaler if self._sharding is None else self._sharding.make_scaler
        self._scaler = None if scaling is None else LossScaler(scaling, self.device, make)

    def seed(self, value: int) -> None:
        """Nothing: this engine draws from torch's own generators, which belong to the script (`set_seed` seeds them)."""

    def synchronize(self) -> None:
        """Wait for the GPU; the CPU has finished already."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    @property
    def device_name(self) -> str:
        """What the driver calls this process's device."""
        return looking.device_name(self.device)

    def device_memory(self) -> tuple[int, int | None] | None:
        """The most bytes that were in use on it, and its size; None on the CPU."""
        return looking.device_memory(self.device)

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss under fp16."""
        return None if self._scaler is None else self._scaler.scaler

    def fence(self) -> Callable[[], object] | None:
        """Waits for what the device has been given so far; None on the CPU."""
        return looking.fence(self.device)

    def tracer(self, settings: ProfileKwargs) -> looking.TorchTracer:
        """torch.profiler."""
        return looking.TorchTracer(settings)

    def close(self) -> None:
        """Leave the job."""
        self._job.leave()

    # -- prepare -------------------------------------------------------------------------------------------------------

    def create_model(self, make: Callable[[], Any]) -> Any:
        """What `make()` returns; where models are cut without memory for its parameters, which get their values in `prepare_model`."""
        return make() if self._sharding is None else self._sharding.create_model(make)

    def prepare_model(
        self, model: nn.Module, *, evaluation_mode: bool = False, device_placement: bool = True
    ) -> nn.Module:
        """On this process's device, under autocast, data parallel if there are other processes and it can be trained.

        In one process without compile, and on a mesh with fsdp or tensor, the handle is the module itself. With device_placement=False
        it stays where it is. Raises PrepareError before anything is changed.
        """
        known = self._handles.get(model)
        handle = known() if known is not None else None
        if handle is not None or model in self._originals:
            return model if handle is None else handle
        sharding = self._sharding
        modules.check_placeable(model, scales_loss=self._scaler is not None, takes_meta=sharding is not None)
        recompute = recomputing.recompute_blocks(model, self._bound.remat)
        if sharding is not None:
            sharding.prepare_model(model, device_placement=device_placement)
        elif device_placement and not modules.is_on(model, self.device):
            model.to(self.device)  # moves the values; the Parameter objects, and with them optimizers, stay valid
        recompute()
        modules.remove_autocast(model)
        handle = model
        is_trained = not evaluation_mode and any(parameter.requires_grad for parameter in model.parameters())
        is_whole = sharding is None and parallel.parallel_part(model) is None
        if self.topology.num_processes > 1 and is_trained and is_whole:
            handle = data_parallel.wrap(handle, self.device, self.config)
        if self._bound.compile:
            handle = compiling.compiled(handle, self.config)
        if self._autocast is not None and self._bound.precision.autocast:
            # Inside data parallelism, so that the user's own module keeps it; around a compiled graph, which hooks would break.
            modules.add_autocast(model if parallel.parallel_part(handle) is handle else handle, self._autocast)
        modules.mark_prepared(handle)
        self._handles[model] = weakref.ref(handle)
        if handle is not model:
            self._originals[handle] = model
        return handle

    def prepare_optimizer(self, optimizer: Any, model: nn.Module | None) -> optimizers.PreparedOptimizer:
        """Steps with the accumulation window, under fp16 through the loss scaler, in fused kernels where torch has them.

        An optimizer from a bridge has a `for_model(module or None)`, which makes it one of the model that it is prepared with.
        Raises PrepareError for parameters of a model that is not prepared.
        """
        if isinstance(optimizer, optimizers.PreparedOptimizer):
            return optimizer
        if hasattr(optimizer, "for_model"):
            optimizer = optimizer.for_model(None if model is None else self.unwrap(model))
        if self._sharding is not None:
            self._sharding.adopt(optimizer)
        owners = list(self._handles)  # an optimizer may update several models, prepared in any order
        if owners:
            optimizers.check_parameters(optimizer, owners)
        if optimizer.state:  # made before the parameters moved
            optimizer.load_state_dict(optimizer.state_dict())
        optimizers.use_fused_kernels(optimizer, owners)
        scaler = self._scaler
        prepared = optimizers.PreparedOptimizer(
            optimizer,
            self.gradient_state,
            update=None if scaler is None else scaler.step,
            skipped=None if scaler is None else lambda: scaler.was_skipped(optimizer),
            dropped=None if self._sharding is None else self._sharding.drop_gradients,
        )
        self._optimizers.add(prepared)
        return prepared

    def prepare_scheduler(self, scheduler: Any, optimizer: Any | None) -> Any:
        """The scheduler itself: it changes the parameter groups that the prepared optimizer shares."""
        return scheduler

    def prepare_loader(self, loader: Any, spec: LoaderSpec) -> PreparedLoader:
        """This process's share of every global batch, on its device; on a GPU copied there `spec.prefetch` batches ahead."""
        refuse_prepared(loader)
        is_host_loader = hasattr(loader, "shard") and hasattr(loader, "loader")  # a bridge made it
        host = loader if is_host_loader else loaders.TorchHostLoader(loader)
        batches = host.shard(
            spec.sharding(self._bound),
            spec=spec,
            exchange=self.collectives.all_gather_object if self.topology.num_processes > 1 else None,
            process_index=self.topology.process_index,
            pin_memory=spec.non_blocking and self.device.type == "cuda",
        )
        options = {"observer": self.gradient_state, "in_background": spec.read_in_background}
        if self.device.type == "cpu" or not spec.device_placement:  # nothing to transfer: no batch is held for it
            return prepared_loader(
                batches, lift=spec.lift, prefetch=spec.prefetch if spec.read_in_background else 1, **options
            )
        feeder = StreamFeeder(self.device, spec.lift)
        return prepared_loader(batches, place=feeder.place, lift=feeder.hand_out, prefetch=spec.prefetch, **options)

    def unwrap(self, handle: nn.Module) -> nn.Module:
        """The user's own module."""
        return self._originals.get(handle, handle)

    # -- the step ------------------------------------------------------------------------------------------------------

    def autocast(self, *, enabled: bool = True, cache_enabled: bool | None = None) -> AbstractContextManager[Any]:
        """The mixed precision for operations outside a prepared model; not enabled, the dtype of their values."""
        if self._autocast is None:
            return _NOTHING
        cache = self.config.autocast_cache if cache_enabled is None else cache_enabled
        return self._autocast(enabled=enabled, cache_enabled=cache)

    def gradient_sync(self, model: nn.Module, *, enabled: bool) -> AbstractContextManager[Any]:
        """With enabled=False, DistributedDataParallel.no_sync or its like: forward and backward must both be inside."""
        if self._sharding is not None:
            return _NOTHING if enabled else self._sharding.accumulating(model)
        part = None if enabled else parallel.parallel_part(model)
        return _NOTHING if part is None else part.no_sync()

    def sync_in_backward(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The next backward inside exchanges gradients, whatever the forward passes were told."""
        if self._sharding is not None:
            return self._sharding.exchanging(model)
        part = parallel.parallel_part(model)
        return _NOTHING if part is None else parallel.exchanging(part)

    def joined(self, handles: list[Any]) -> AbstractContextManager[None]:
        """Inside, processes may have different numbers of batches; see `joining.joined`.

        Raises UnsupportedError on a mesh with fsdp or tensor.
        """
        self._refuse_sharded(
            "join_uneven_inputs with even_batches=False",
            "use even_batches=True: all processes then have equally many batches",
        )
        return joining.joined(handles, self.collectives)

    def remove_autocast(self, model: nn.Module) -> None:
        """The user's own module computes in its parameters' precision from now on."""
        modules.remove_autocast(model)

    def parameter_average(self, model: nn.Module) -> ParameterAverage:
        """On the device; every process has the same one, as it has the same parameters, or that of its pieces."""
        own = self.unwrap(model)
        return ModuleAverage(own) if self._sharding is None else self._sharding.parameter_average(own)

    def average_parameters(self, model: nn.Module) -> None:
        """Replace the floating-point parameters by their mean over processes, in the memory that they are in.

        Raises UnsupportedError on a mesh with fsdp or tensor: no process has parameters of its own there.
        """
        self._refuse_sharded(
            "training of parameters of each process's own (LocalSGD)", "use a mesh of data and replica for it"
        )
        parameters = self.unwrap(model).parameters()
        self.collectives.average([p.detach() for p in parameters if p.is_floating_point() or p.is_complex()])

    def backward(self, loss: Any, *, scale: float, weight: Any = None) -> Any:
        """Accumulate gradients of `scale * loss`; a LossCall is computed first and its result returned, detached."""
        if weight is not None:
            return self._backward_weighted(loss, weight)
        if type(loss) is LossCall:
            result = loss.function(*loss.args, **loss.kwargs)
            self._differentiate(result[0] if isinstance(result, tuple) else result, scale)
            return self._over_shards(result)
        is_retained = type(loss) is RetainedLoss
        return self._differentiate(loss.value if is_retained else loss, scale, is_retained)

    def _differentiate(self, loss: Any, scale: float, retain_graph: bool = False) -> None:
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            _refuse_loss(loss)
        if scale != 1.0:
            loss = loss * scale
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        if self._sharding is not None:
            self._sharding.before_backward()
        loss.backward(retain_graph=retain_graph)

    def _backward_weighted(self, loss: Any, weight: Any) -> Any:
        result, value, weight, is_retained = weights.unpacked(loss, weight)
        weight = weights.as_scalar(weight, self.device)
        window = self._window_weights(weight)
        window.add(weight)
        factor = weight * window.unit
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            _refuse_loss(value)
        self._differentiate(value * factor, 1.0, is_retained)
        if result is None or self.topology.num_processes == 1:
            return None if result is None else self._over_shards(result)
        weight = weights.on_device(weight, self.device)
        share = torch.where(weight == 0, torch.zeros_like(value), value.detach() * weight)
        aux = result[1:] if isinstance(result, tuple) else ()
        shares, total, *aux = self._over_shards((share, weight, *aux))
        mean = torch.where(total == 0, torch.zeros_like(shares), shares / total.to(shares.dtype))
        return (mean, *aux) if isinstance(result, tuple) else mean

    def _window_weights(self, weight: weights.Scalar) -> weights.WindowWeights:
        window: weights.WindowWeights | None = self.gradient_state.window_weights
        if window is None:
            unit: weights.Scalar = 1.0
            # Thousands of tokens, times the loss scale, would leave float16, in which gradients may also be exchanged.
            if self._keeps_usual_size:
                if self._usual_weight is None:
                    first = weights.on_device(weight, self.device)
                    self._usual_weight = _or_one(self.collectives.mean_and_sum([first], [])[0][0])
                unit = 1 / self._usual_weight
            window = self.gradient_state.window_weights = weights.WindowWeights(unit=unit)
        return window

    @torch.no_grad()
    def normalise_gradients(self) -> None:
        """Over all processes with one exchange of a scalar; each on its own where they train parameters of their own."""
        window = self.gradient_state.window_weights
        total, num_shards = window.total, 1
        if self.topology.num_processes > 1 and self.gradient_state.exchanges_weights:
            mine = weights.on_device(total, self.device)
            total, num_shards = self.collectives.mean_and_sum([], [mine])[1][0], self.topology.num_processes
        if self._keeps_usual_size and num_shards == self.topology.num_processes:  # one value for all of them
            self._usual_weight = _or_one(weights.on_device(total, self.device) / (num_shards * window.count))
        window.close(weights.gradients_of(self._handles), total, num_shards)

    @property
    def _keeps_usual_size(self) -> bool:
        return self._scaler is not None or self.topology.num_processes > 1

    def scale_gradients(self, factor: float) -> None:
        """In place."""
        weights.multiply(weights.gradients_of(self._handles), factor)

    def read_weight(self) -> float:
        """This process's sum."""
        return float(self.gradient_state.window_weights.total)

    def write_weight(self, total: float) -> None:
        """Gradients are written and read in units of weight 1."""
        self.gradient_state.window_weights = weights.WindowWeights(total)
        self.gradient_state.window_weights.count = 1

    def _over_shards(self, result: Any) -> Any:
        """Loss and floating scalars averaged, integer scalars added up over processes; everything else is this process's own."""
        if self.topology.num_processes == 1 and isinstance(result, torch.Tensor):
            return result.detach()
        leaves, structure = trees.flatten(result)
        leaves = [self._as_tensor(leaf) for leaf in leaves]
        scalars = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and not leaf.dim()}
        means = [i for i, leaf in scalars.items() if leaf.is_floating_point()]
        sums = [i for i in scalars if i not in means]
        mean_values, sum_values = self.collectives.mean_and_sum(
            [leaves[i] for i in means], [leaves[i].long() for i in sums]
        )
        if (sharing := self._bound.num_processes_per_shard) > 1:  # each of them has counted the same
            sum_values = [value // sharing for value in sum_values]
        for i, value in zip((*means, *sums), (*mean_values, *sum_values), strict=True):
            leaves[i] = value
        return structure.unflatten(leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)

    def _as_tensor(self, leaf: Any) -> Any:
        if isinstance(leaf, float):
            return torch.tensor(leaf, dtype=torch.float64, device=self.device)
        return torch.tensor(leaf, device=self.device) if isinstance(leaf, (bool, int)) else leaf

    def clip_grad_norm(self, target: Any, max_norm: float, norm_type: float) -> torch.Tensor:
        """torch.nn.utils.clip_grad_norm_, on unscaled gradients."""
        if self._sharding is not None:
            return self._sharding.clip_grad_norm(self._unscaled(target), max_norm, norm_type)
        return nn.utils.clip_grad_norm_(self._unscaled(target), max_norm, norm_type)

    def clip_grad_value(self, target: Any, clip_value: float) -> None:
        """torch.nn.utils.clip_grad_value_, on unscaled gradients."""
        if self._sharding is not None:
            self._sharding.clip_grad_value(self._unscaled(target), clip_value)
            return
        nn.utils.clip_grad_value_(self._unscaled(target), clip_value)

    def _unscaled(self, target: Any) -> Any:
        """The parameters of a model, tensor or iterable; under fp16 their optimizers' gradients are divided by the scale."""
        parameters = target.parameters() if isinstance(target, nn.Module) else target
        if self._scaler is None:
            return parameters
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        clipped = {id(parameter) for parameter in parameters}
        for prepared in self._optimizers:
            # Another optimizer's gradients may still be growing: they must stay scaled.
            if any(id(p) in clipped for group in prepared.param_groups for p in group["params"]):
                self._scaler.unscale(prepared.optimizer)
        return parameters

    def train_step(self, spec: StepSpec) -> Callable[[Any, bool], Any] | None:
        """The calls of the other two forms in the same order, without what lies between them.

        None with weights, and for a script of another dialect, whose loss function takes no torch batches, unless its bridge
        has a step for it.
        """
        if spec.bridge is not None:
            make = getattr(spec.bridge, "train_step", None)
            return None if make is None or spec.weight is not None else make(spec)
        if spec.weight is not None:
            return None
        loss_fn, model, optimizer = spec.loss_fn, spec.public_model, spec.optimizer
        accumulating: Callable[[], AbstractContextManager[Any]] | None = None
        if not self.config.sync_each_batch:
            accumulating = self._accumulating(spec.model)
        max_norm, scale, on_grad_norm = spec.norm_limit, spec.scale, spec.on_grad_norm
        is_alone = self.topology.num_processes == 1

        def forward_and_backward(batch: Any) -> Any:
            result = loss_fn(model, batch)
            self._differentiate(result[0] if isinstance(result, tuple) else result, scale)
            return result

        def step(batch: Any, sync: bool) -> Any:
            if sync or accumulating is None:
                result = forward_and_backward(batch)
            else:
                with accumulating():
                    result = forward_and_backward(batch)
            if sync:
                if self.gradient_state.tail_factor != 1.0:
                    self.scale_gradients(self.gradient_state.tail_factor)
                if max_norm is not None:
                    norm = self.clip_grad_norm(model, max_norm, 2.0)
                    if on_grad_norm is not None:
                        on_grad_norm(norm)
                optimizer.step()
                optimizer.zero_grad()
            if is_alone and isinstance(result, torch.Tensor):
                return result.detach()
            return _named(self._over_shards(result))

        return step

    def _accumulating(self, model: nn.Module) -> Callable[[], AbstractContextManager[Any]] | None:
        """What a backward without an exchange runs in; None where there is none to leave out."""
        if self._sharding is not None:
            sharding = self._sharding
            return lambda: sharding.accumulating(model)
        part = parallel.parallel_part(model)
        return None if part is None else part.no_sync

    # -- state ---------------------------------------------------------------------------------------------------------

    def read_state(self, handle: Any) -> Iterator[Shard]:
        """All of it on process 0, nothing on the others, as every process holds the same values; or each its own pieces."""
        if self._sharding is not None:
            if isinstance(handle, optimizers.PreparedOptimizer):
                return self._sharding.read_optimizer(handle.optimizer, self._parameters_of(handle))
            return self._sharding.read_model(self.unwrap(handle))
        if self.topology.process_index != 0:
            return iter(())
        if isinstance(handle, optimizers.PreparedOptimizer):
            return state.read_optimizer(handle.optimizer, self._parameters_of(handle))
        return state.read_model(self.unwrap(handle))

    def write_state(self, handle: Any, shards: Iterable[Shard]) -> None:
        """Every process loads everything that it holds. Raises CheckpointError if names or shapes do not fit."""
        if self._sharding is not None:
            if isinstance(handle, optimizers.PreparedOptimizer):
                self._sharding.write_optimizer(handle.optimizer, self._parameters_of(handle), shards)
            else:
                self._sharding.write_model(self.unwrap(handle), shards)
            return
        if isinstance(handle, optimizers.PreparedOptimizer):
            state.write_optimizer(handle.optimizer, self._parameters_of(handle), shards)
        else:
            state.write_model(self.unwrap(handle), shards)

    def check_state(self, handle: Any, specs: Mapping[str, ArraySpec]) -> None:
        """Raises CheckpointError where `write_state` would."""
        if isinstance(handle, optimizers.PreparedOptimizer):
            state.check_optimizer(handle.optimizer, self._parameters_of(handle), specs)
        else:
            state.check_model(self.unwrap(handle), specs)

    def whole_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """A user's own module's `state_dict()`, gathered where its parameters are cut. Every process must call it."""
        return module.state_dict() if self._sharding is None else self._sharding.whole_state_dict(module)

    def parameter_names(self, handle: optimizers.PreparedOptimizer) -> list[str] | None:
        """In the order of the user's optimizer; None for one that a bridge made of another dialect's."""
        return None if hasattr(handle.optimizer, "read_arrays") else list(self._parameters_of(handle))

    def _parameters_of(self, handle: optimizers.PreparedOptimizer) -> dict[str, nn.Parameter]:
        updated = {id(parameter) for group in handle.param_groups for parameter in group["params"]}
        owners = [m for m in self._handles if any(id(parameter) in updated for parameter in m.parameters())]
        return optimizers.named_parameters(handle.optimizer, owners)

    def read_gradients(self, handle: nn.Module) -> Iterator[Shard]:
        """What every process has accumulated: between updates they differ, unless parameters are cut."""
        if self._sharding is not None:
            return self._sharding.read_gradients(self.unwrap(handle), scale=self._gradient_scale())
        place = (self.topology.process_index, self.topology.num_processes)
        return state.read_gradients(self.unwrap(handle), process=place, scale=self._gradient_scale())

    def write_gradients(self, handle: nn.Module, shards: Iterable[Shard]) -> None:
        """Replace this process's gradients."""
        scale = 1.0 if self._scaler is None else self._scaler.factor
        if self._sharding is not None:
            self._sharding.write_gradients(self.unwrap(handle), shards, scale=scale)
        else:
            state.write_gradients(self.unwrap(handle), shards, scale=scale)

    def _gradient_scale(self) -> float:
        window = self.gradient_state.window_weights
        unit = float(window.unit) if isinstance(window, weights.WindowWeights) else 1.0
        return unit if self._scaler is None else self._scaler.factor * unit

    def read_scaler(self) -> dict[str, float | int] | None:
        """The loss scale of fp16."""
        return None if self._scaler is None else self._scaler.read()

    def write_scaler(self, state: Mapping[str, float | int]) -> None:
        """Continue with this loss scale."""
        if self._scaler is not None:
            self._scaler.write(state)

    def read_random(self) -> dict[str, Any]:
        """The generator of this process's GPU or TPU; on the CPU the script's own is all there is."""
        if self.device.type == "tpu":
            return {"tpu": tpu.read_random()}
        if self.device.type != "cuda":
            return {}
        return {"cuda": torch.cuda.get_rng_state(self.device).numpy().tobytes()}

    def write_random(self, state: Mapping[str, Any]) -> None:
        """Continue with this generator."""
        if self.device.type == "tpu":
            tpu.write_random(state["tpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(torch.frombuffer(bytearray(state["cuda"]), dtype=torch.uint8), self.device)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _refuse_sharded(self, what: str, hint: str) -> None:
        if self._sharding is not None:
            sizes = self._bound.mesh
            raise UnsupportedError(
                f"{what} is not supported where models are cut over processes (mesh.fsdp={sizes.fsdp}, mesh.tensor={sizes.tensor},"
                f" mesh.sequence={sizes.sequence})",
                hint,
            )

    @property
    def plan(self) -> Plan:
        """What the engine was bound to."""
        return self._bound

    @property
    def _bound(self) -> Plan:
        assert self._plan is not None, "bind comes before prepare"
        return self._plan


def _or_one(mean: torch.Tensor) -> torch.Tensor:
    return torch.where(mean == 0, torch.ones_like(mean), mean)


def _named(result: Any) -> Any:
    if not isinstance(result, tuple):
        return result
    loss, aux = result
    return {"loss": loss, **aux} if isinstance(aux, dict) else {"loss": loss, "aux": aux}


def _refuse_loss(loss: Any) -> None:
    if not isinstance(loss, torch.Tensor):
        raise PrepareError(
            f"backward got a {type(loss).__module__}.{type(loss).__name__}, and this engine differentiates torch tensors",
            "return the loss that the prepared model's outputs give, before .item() or a conversion",
        )
    raise PrepareError(
        f"backward got a tensor of shape {tuple(loss.shape)} that depends on no parameter: it has no grad_fn",
        "compute the loss from the prepared model's outputs, outside torch.no_grad() and without .detach(), and check that"
        " parameters have requires_grad=True",
    )

"""A user's torch.optim optimizer on an engine that runs programs: torch's groups and schedulers stay, the engine holds the state."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, final

import torch
from torch.optim import Optimizer

from polyaccel.errors import PrepareError, UnsupportedError
from polyaccel.prepared import OptimizerHandle
from polyaccel.protocols import ArraySpec
from polyaccel_torch.dialect.optimizers import PreparedOptimizer as TorchOptimizer

from .torch_optimizers import lower_optimizer

if TYPE_CHECKING:
    from .modules import ManagedModel
    from .tape import Recorder


@final
class TorchOptimizerSource:
    """The update rule of a live torch optimizer over managed models (an OptimizerSource).

    Parameters of one model have its own names; where there are several models, `<model>.<name>`.
    """

    def __init__(self, optimizer: Optimizer, recorder: Recorder) -> None:
        self.optimizer = optimizer
        self.recorder = recorder
        self.managed = _models_of(optimizer, recorder)
        handles = tuple(model.handle for model in self.managed)
        self.model: Any = handles[0] if len(handles) == 1 else handles
        self.rule = lower_optimizer(optimizer, self._parameter_names())
        self.handle: Any = None
        self._hyper: tuple[Any, tuple[tuple[Any, ...], ...]] | None = None

    def _parameter_names(self) -> Mapping[int, str]:
        if len(self.managed) == 1:
            return self.managed[0].names
        return {key: f"{model.handle.name}.{name}" for model in self.managed for key, name in model.names.items()}

    def saved(self, state: Any) -> dict[str, Any]:
        """What torch would hold of the state, as `<parameter>.<slot>`: nothing of a parameter that never stepped."""
        names = self._saved_names()
        kept = self.rule.exported(state)
        return {f"{names[name]}.{slot}": value for name, entries in kept.items() for slot, value in entries.items()}

    def parameter_names(self) -> list[str]:
        """The parameters in the order of the user's optimizer, as `saved` names them."""
        names = self._saved_names()
        return [names[name] for name in self.rule.names]

    def check(self, specs: Mapping[str, ArraySpec], state: Any) -> None:
        """Raises CheckpointError for state of unknown parameters, of other slots, or of other shapes."""
        shapes = {name: {k: tuple(s.shape) for k, s in slots.items()} for name, slots in self._by_name(specs).items()}
        self.rule.check_state(shapes, self.handle.model.params)

    def restored(self, arrays: Mapping[str, Any], state: Any) -> Any:
        """The engine's state of host arrays as `saved` names them."""
        return self.rule.import_state(self._by_name(arrays), self.handle.model.params)

    def _by_name(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        own = {saved: name for name, saved in self._saved_names().items()}
        found: dict[str, dict[str, Any]] = {}
        for full_name, value in values.items():
            saved, _, slot = full_name.rpartition(".")
            found.setdefault(own.get(saved, saved), {})[slot] = value
        return found

    def _saved_names(self) -> dict[str, str]:
        """The name in a checkpoint of each parameter: with several models, the model's position among the optimizer's."""
        if len(self.managed) == 1:
            return {name: name for name in self.rule.names}
        found = {}
        for index, model in enumerate(self.managed):
            prefix = f"{model.handle.name}."
            for name in self.rule.names:
                if name.startswith(prefix):
                    found[name] = f"model_{index}.{name.removeprefix(prefix)}"
        return found

    def push_writes(self) -> None:
        """Give the engine what user code wrote to parameters and gradients."""
        for model in self.managed:
            model.push_writes()

    def forget_grads(self) -> None:
        """The gradients of its parameters are about to be dropped."""
        for model in self.managed:
            prefix = "" if len(self.managed) == 1 else f"{model.handle.name}."
            model.forget_grads(tuple(name.removeprefix(prefix) for name in self.rule.names if name.startswith(prefix)))

    def names(self) -> tuple[str, ...]:
        """The parameters it updates."""
        return self.rule.names

    def init(self, params: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The state before the first step."""
        return self.rule.init(params)

    def hyperparameters(self) -> Any:
        """The groups' present numbers, as nested tuples: the same object as long as none changed."""
        array = self.rule.hyperparameters()
        if self._hyper is None or self._hyper[0] is not array:
            self._hyper = (array, tuple(tuple(row) for row in array))
        return self._hyper[1]

    def signature(self) -> Hashable:
        """What a traced update was specialised on."""
        return self.rule.signature()

    def update(self, params: Any, grads: Any, state: Any, hyper: Any) -> tuple[Any, Any]:
        """Pure and traceable."""
        self.rule.mark_stepped()  # a fused step calls no step(), and torch's schedulers look for one before theirs
        return self.rule.update(params, grads, state, hyper)

    def attach(self, handle: Any) -> None:
        """The engine holds the state now; what the live optimizer had gathered goes with it."""
        self.handle = handle
        live = self.rule.live_state()
        if live:
            handle.state = self.rule.import_state(live, handle.model.params)
            self.optimizer.state.clear()


def _models_of(optimizer: Optimizer, recorder: Recorder) -> tuple[ManagedModel, ...]:
    owners: list[ManagedModel] = []
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            owner = next((model for model in recorder.models if id(parameter) in model.names), None)
            if owner is None:
                raise PrepareError(
                    f"parameter {position} of group {index} of {type(optimizer).__name__} (shape {tuple(parameter.shape)}) is in"
                    " no prepared model",
                    "make the optimizer from model.parameters() of a model that is prepared before it or in the same call",
                )
            if owner not in owners:
                owners.append(owner)
    # In the order of prepare: the state's names do not depend on the order of the groups.
    return tuple(model for model in recorder.models if model in owners)


class PreparedOptimizer(Optimizer, OptimizerHandle):
    """What user code holds for a prepared optimizer: it shares the user's groups, and its step runs on the engine."""

    def __init__(self, source: TorchOptimizerSource) -> None:
        # Not Optimizer.__init__: the groups are the user's own, checked when that optimizer was made.
        self.optimizer = source.optimizer
        self._source = source
        self.defaults = source.optimizer.defaults
        self._step_count = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The user's optimizer's own."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Mapping[torch.Tensor, dict[str, Any]]:  # type: ignore[override]
        """The state by parameter, fetched: a copy (change it through load_state_dict)."""
        packed = self.state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        return {parameters[index]: entries for index, entries in packed["state"].items()}

    def _syncs(self) -> bool:
        state = self._source.handle.engine.gradient_state
        return state is None or bool(state.sync_gradients)

    def step(self, closure: Callable[..., Any] | None = None) -> None:  # type: ignore[override]
        """Update the parameters from their gradients; nothing while gradients accumulate.

        Raises UnsupportedError for a closure: a compiled step cannot call back.
        """
        if closure is not None:
            raise UnsupportedError(
                f"{type(self.optimizer).__name__}.step(closure) calls the loss several times in one step",
                "compute the loss once, call accelerator.backward(loss) and optimizer.step()",
            )
        if not self._syncs():
            return
        self._told_overflow = None
        source = self._source
        source.recorder.settle()
        source.push_writes()
        source.handle.step()
        source.rule.mark_stepped()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of its parameters; nothing while gradients accumulate."""
        if not self._syncs():
            return
        self._source.push_writes()
        if set_to_none:
            self._source.forget_grads()
        self._source.handle.zero_grad(set_to_none)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step changed nothing because of gradients that were not finite (fp16). Waits for the device."""
        told = self._told_overflow
        return bool(self._source.handle.step_was_skipped) if told is None else told

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the compiled update knows its parameters."""
        raise UnsupportedError(
            f"add_param_group on a prepared {type(self.optimizer).__name__}",
            "add every group before accelerator.prepare; freeze parameters with requires_grad_(False) until they are wanted",
        )

    def state_dict(self) -> dict[str, Any]:
        """torch's own layout, with CPU tensors. Raises UnsupportedError where the processes of the job hold pieces of it."""
        source = self._source
        engine = source.handle.engine
        what = f"the state of {type(self.optimizer).__name__}"
        state = {
            name: {slot: engine.state_to_host(value, f"{slot!r} in {what}") for slot, value in entries.items()}
            for name, entries in source.handle.state.items()
        }
        return source.rule.state_dict(state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` of this or of torch's optimizer gave."""
        source = self._source
        source.handle.state = source.rule.load_state_dict(state_dict, source.handle.model.params)

    def __repr__(self) -> str:
        return f"Prepared({self.optimizer!r})"

    # A copy or pickle carries the user's optimizer with its state, over tensors of torch's own; the engine stays here.
    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = object.__new__(type(self.optimizer))
        plain.__setstate__({**self.optimizer.__getstate__(), "param_groups": _plain(self.param_groups), "state": {}})
        plain.load_state_dict(self.state_dict())
        return TorchOptimizer, (plain, None)


def _plain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def value(parameter: torch.Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(parameter.detach().cpu().clone(), parameter.requires_grad)

    return [{**group, "params": [value(parameter) for parameter in group["params"]]} for group in groups]

    def __getattr__(self, name: str) -> Any:
        if name in ("optimizer", "_source"):
            raise AttributeError(name)
        return getattr(self.optimizer, name)

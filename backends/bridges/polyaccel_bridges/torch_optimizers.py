"""A live torch.optim optimizer as a pure rule that a jax program runs: the user's object keeps the groups, jax keeps the state.

torch's own schedulers go on writing `param_groups`; every step reads them, so a changed number never retraces.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from typing import Any, final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from jax import Array
from numpy.typing import NDArray
from torch.optim import Optimizer

from polyaccel.errors import CheckpointError, PrepareError, UnsupportedError

from .optimizer_rules import RULES, Flags, Group, Rule, StateArray, number

Arrays = dict[str, dict[str, Array]]  # parameter name -> torch's state key -> array
HostArrays = dict[str, dict[str, NDArray[Any]]]

_ANY_FLAGS = Flags(momentum=True, amsgrad=True, centered=True)  # a state that holds every array its optimizer can have


def lower_optimizer(optimizer: Optimizer, names: Mapping[int, str]) -> OptimizerRule:
    """The rule that does in jax what `optimizer.step()` does in torch; `names` gives each parameter's name by its id().

    Call it once, in prepare; nothing of the optimizer is changed. `foreach`, `fused` and `capturable` say how torch executes
    and mean nothing here.

    Raises: UnsupportedError for a class without a rule, a subclass with its own step, `differentiable`, step hooks, and
    complex or sparse parameters; PrepareError for a parameter that is in no prepared model or in the optimizer twice.
    """
    base = _supported_class(optimizer)
    _refuse_hooks(optimizer)
    grouped_names: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for index, group in enumerate(optimizer.param_groups):
        if group.get("differentiable"):
            raise UnsupportedError(
                f"{type(optimizer).__name__}(differentiable=True): a compiled step cannot be differentiated through",
                "leave differentiable out, or choose the torch backend",
            )
        group_names = []
        for position, parameter in enumerate(group["params"]):
            shape = tuple(parameter.shape)
            where = f"parameter {position} of group {index} of {type(optimizer).__name__} (shape {shape})"
            name = _name_of(parameter, names, where)
            if name in seen:
                raise PrepareError(
                    f"{where} is {name!r}, which it already holds", "give every parameter to the optimizer once"
                )
            seen.add(name)
            group_names.append(name)
        grouped_names.append(tuple(group_names))
    return OptimizerRule(optimizer, base, tuple(grouped_names))


@final
class OptimizerRule:
    """The update rule of one live torch optimizer (made by `lower_optimizer`).

    `names` are the parameters it updates, in the optimizer's order. `is_elementwise` says that the update of an element needs
    that element alone: only then may it run on shards of a parameter (inside jax.shard_map) instead of whole ones.
    """

    def __init__(self, optimizer: Optimizer, base: type[Optimizer], grouped_names: tuple[tuple[str, ...], ...]) -> None:
        self._optimizer = optimizer
        self._base = base
        self._class_name = type(optimizer).__name__
        self._rule: Rule = RULES[base.__name__]
        self._groups = grouped_names
        # torch keeps step counters in its default dtype, whatever the parameter's.
        self._scalar_dtype = np.dtype(np.float64 if torch.get_default_dtype() == torch.float64 else np.float32)
        self._values: list[tuple[float, ...]] | None = None
        has_float64 = any(p.dtype == torch.float64 for group in optimizer.param_groups for p in group["params"])
        self._hyper: NDArray[Any] = np.zeros((0, 0), np.float64 if has_float64 else np.float32)
        self.names: tuple[str, ...] = tuple(name for group in grouped_names for name in group)
        self.is_elementwise: bool = self._rule.is_elementwise
        # A function of its own per formula: parameters of one shape share its trace, and XLA inlines it everywhere.
        self._formulas: dict[Flags, Callable[..., tuple[Array, dict[str, Array]]]] = {}

    @property
    def optimizer(self) -> Optimizer:
        """The user's live optimizer, whose `param_groups` schedulers and users go on changing."""
        return self._optimizer

    # -- one step ------------------------------------------------------------------------------------------------------

    def init(self, params: Mapping[str, Array]) -> Arrays:
        """The state before the first step: per parameter, torch's keys and dtypes, with the parameter's sharding where the
        shape is the parameter's. Pure, may be jitted or given to jax.eval_shape. SGD's momentum has a `step` beside torch's
        `momentum_buffer`. Parameters of the optimizer that are not in `params` (frozen ones) get no state."""
        return {
            name: {key: self._filled(entry, params[name]) for key, entry in self._layout(params[name], flags).items()}
            for name, _, flags in self._entries()
            if name in params
        }

    def hyperparameters(self) -> NDArray[Any]:
        """The groups' current numbers, shape (num_groups, num_numbers): an argument of the program, so no value retraces.

        float32, or float64 where a parameter is float64. The same array object is returned as long as nothing changed, so
        a caller may keep its device copy by identity; it must not be written to.
        """
        scalars = self._rule.scalars
        values = [tuple(scalars(group).values()) for group in self._optimizer.param_groups]
        if values != self._values:
            hyper = np.array(values, self._hyper.dtype)
            hyper.flags.writeable = False
            self._values, self._hyper = values, hyper
        return self._hyper

    def signature(self) -> Hashable:
        """What the program was specialised on: the groups' flags. When it changes, `update` has to be traced again.

        Raises: PrepareError if parameters or groups were added after prepare, UnsupportedError if a step hook was.
        """
        self._check_groups()
        _refuse_hooks(self._optimizer)
        return tuple([self._flags(group) for group in self._optimizer.param_groups])

    def update(
        self,
        params: Mapping[str, Array],
        grads: Mapping[str, Array],
        state: Mapping[str, Mapping[str, Array]],
        hyper: Array,
    ) -> tuple[dict[str, Array], Arrays]:
        """The parameters and state after one step. Pure; to be traced once per `signature()`.

        A parameter without a gradient stays as it is, with its state, and so does a parameter that is not the optimizer's.
        The arithmetic is float32 (float64 for float64 parameters) with one rounding at the end, as in torch's fused kernels; results keep
        their dtypes. Without `is_elementwise`, parameters and gradients must be whole arrays (or global ones under jax.jit).
        """
        new_params: dict[str, Array] = dict(params)
        new_state: Arrays = {name: dict(entries) for name, entries in state.items()}
        numbers: dict[int, dict[str, Array]] = {}
        for name, group, flags in self._entries():
            if name in grads:
                scalars = numbers.get(group)
                if scalars is None:
                    scalars = numbers[group] = dict(zip(self._scalar_names(), hyper[group]))
                full = self._completed(state.get(name, {}), params[name], flags)
                formula = self._formulas.get(flags)
                if formula is None:
                    formula = self._formulas[flags] = jax.jit(partial(self._update_one, flags))
                new_params[name], new_state[name] = formula(params[name], grads[name], full, scalars)
        return new_params, new_state

    def _update_one(
        self, flags: Flags, p: Array, g: Array, state: dict[str, Array], scalars: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        dtype = jnp.promote_types(p.dtype, jnp.float32)
        wide = {key: value.astype(dtype) for key, value in state.items()}
        h = {key: value.astype(dtype) for key, value in scalars.items()}
        h["dtype_eps"] = jnp.asarray(float(ml_dtypes.finfo(p.dtype).eps), dtype)
        g = -g.astype(dtype) if flags.maximize else g.astype(dtype)
        step = state["step"] + jnp.asarray(1, state["step"].dtype) if "step" in state else None
        t = jnp.asarray(1, dtype) if step is None else step.astype(dtype)
        new_p, changed = self._rule.update(p.astype(dtype), g, t, wide, h, flags)
        new_state = {**state, **{key: value.astype(state[key].dtype) for key, value in changed.items()}}
        if step is not None:
            new_state["step"] = step
        return new_p.astype(p.dtype), new_state

    def mark_stepped(self) -> None:
        """Tell the live optimizer that a step was taken, so that a torch scheduler does not warn about a wrong order."""
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # what torch's own step sets for the schedulers

    # -- state to and from torch ---------------------------------------------------------------------------------------

    def exported(self, state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Of the state what torch would hold, with its keys and dtypes: no entry for a parameter that never stepped."""
        exported: dict[str, dict[str, Any]] = {}
        for name in self.names:
            entries = dict(state.get(name, {}))
            if entries and np.asarray(entries.get("step", np.float32(1))) > 0:
                if self._base is torch.optim.SGD:
                    del entries["step"]  # see init: torch has none
                exported[name] = entries
        return exported

    def export_state(self, state: Mapping[str, Mapping[str, Any]]) -> HostArrays:
        """`exported`, on the host. The arrays must be addressable as a whole from this process."""
        return {
            name: {key: np.asarray(value) for key, value in entries.items()}
            for name, entries in self.exported(state).items()
        }

    def import_state(self, exported: Mapping[str, Mapping[str, Any]], params: Mapping[str, Any]) -> HostArrays:
        """The inverse of `export_state`: host arrays with the keys, shapes and dtypes of `init(params)`; values are numpy arrays,
        torch tensors or numbers. Parameters without an entry start anew; only `shape` and `dtype` of `params` are read.

        Raises: CheckpointError for an unknown parameter, a missing or foreign key, or another shape.
        """
        self._check_names(exported)
        result: HostArrays = {}
        for name, _, flags in self._entries():
            if name in params:
                result[name] = self._import_one(name, exported.get(name) or {}, params[name], flags)
        return result

    def check_state(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], params: Mapping[str, Any]) -> None:
        """Raises CheckpointError where `import_state` of arrays with these shapes would."""
        self._check_names(shapes)
        for name, _, flags in self._entries():
            if name in params and shapes.get(name):
                self._check_one(name, shapes[name], params[name], flags)

    def _check_names(self, given: Mapping[str, Any]) -> None:
        unknown = sorted(set(given) - set(self.names))
        if unknown:
            raise CheckpointError(
                f"the state holds {unknown[0]!r}, which this {self._class_name} does not update",
                "load the state into an optimizer over the same parameters",
            )

    def _check_one(self, name: str, shapes: Mapping[str, tuple[int, ...]], param: Any, flags: Flags) -> None:
        wanted, known = self._layout(param, flags), self._rule.layout(tuple(param.shape), _ANY_FLAGS)
        given = {*shapes, *(("step",) if self._base is torch.optim.SGD and "momentum_buffer" in shapes else ())}
        missing, foreign = sorted(set(wanted) - given), sorted(given - set(known))
        if missing or foreign:
            reason = f"has no {missing[0]!r}" if missing else f"has {foreign[0]!r}"
            raise CheckpointError(
                f"the state of {name!r} {reason}, which {self._class_name} {'needs' if missing else 'does not know'}",
                "load the state of the same optimizer class, made with the same options",
            )
        for key, shape in shapes.items():
            if tuple(shape) != known[key].shape:
                raise CheckpointError(
                    f"{key!r} of {name!r} has shape {tuple(shape)} in the state; the parameter needs {known[key].shape}",
                    "load the state of a model of the same sizes",
                )

    def _import_one(self, name: str, given: Mapping[str, Any], param: Any, flags: Flags) -> dict[str, NDArray[Any]]:
        wanted = self._layout(param, flags)
        values = {key: value for key, value in given.items() if value is not None}
        if not values:
            return {key: np.full(entry.shape, entry.fill, self._dtype(entry, param)) for key, entry in wanted.items()}
        self._check_one(name, {key: tuple(np.shape(value)) for key, value in values.items()}, param, flags)
        if self._base is torch.optim.SGD and "momentum_buffer" in values:
            values.setdefault("step", 1.0)  # any count that is not 0: the buffer exists
        known = self._rule.layout(tuple(param.shape), _ANY_FLAGS)
        return {key: _host_array(value, self._dtype(known[key], param)) for key, value in values.items()}

    def live_state(self) -> HostArrays:
        """The state that the live torch optimizer holds itself (one that was stepped or loaded before prepare), for `import_state`."""
        return self._by_name(self._optimizer.state)

    def state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """torch's own `optimizer.state_dict()` with CPU tensors, as if torch had taken the steps; its hooks run."""
        exported = self.export_state(state)
        tensors: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
        for name, parameter in self._parameters():
            if name in exported:
                tensors[parameter] = {key: _host_tensor(value) for key, value in exported[name].items()}
        own = self._optimizer.state
        self._optimizer.state = tensors
        try:
            return self._optimizer.state_dict()
        finally:
            self._optimizer.state = own

    def load_state_dict(self, state_dict: Mapping[str, Any], params: Mapping[str, Any]) -> HostArrays:
        """Load what `state_dict()` (ours or torch's) gave: numbers of the groups into the live optimizer, state as host arrays.

        torch validates the groups and runs its hooks. The live optimizer is left without state of its own, and is unchanged
        when this raises. Raises: ValueError (torch's) for other groups, CheckpointError as `import_state`.
        """
        loaded: HostArrays = {}

        # The last hook sees what all others made of it, and keeps torch from casting the state to the live parameters' device,
        # which may be meta by now.
        def take_state(optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            _check_same_groups(optimizer, given)
            order = (i for group in given["param_groups"] for i in group["params"])
            entries = {name: given["state"].get(i, {}) for i, name in zip(order, self.names, strict=True)}
            loaded.update(self.import_state({name: entry for name, entry in entries.items() if entry}, params))
            return {**given, "state": {}}

        handle = self._optimizer.register_load_state_dict_pre_hook(take_state)
        try:
            self._optimizer.load_state_dict(dict(state_dict))
        finally:
            handle.remove()
        return loaded

    # -- what the groups say -------------------------------------------------------------------------------------------

    def _entries(self) -> Iterator[tuple[str, int, Flags]]:
        for index, (names, group) in enumerate(zip(self._groups, self._optimizer.param_groups)):
            flags = self._flags(group)
            for name in names:
                yield name, index, flags

    def _parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._check_groups()
        return zip(self.names, (p for group in self._optimizer.param_groups for p in group["params"]), strict=True)

    def _by_name(self, live: Mapping[torch.Tensor, Mapping[str, Any]]) -> HostArrays:
        found: HostArrays = {}
        for name, parameter in self._parameters():
            values = {key: value for key, value in live.get(parameter, {}).items() if value is not None}
            if values and number(values.get("step", 1)) > 0:
                found[name] = {key: _host_array(value, None) for key, value in values.items()}
        return found

    def _flags(self, group: Group) -> Flags:
        get = group.get
        return Flags(
            maximize=bool(get("maximize")),
            momentum=get("momentum", 0) != 0,
            nesterov=bool(get("nesterov")),
            amsgrad=bool(get("amsgrad")),
            centered=bool(get("centered")),
            decoupled_weight_decay=bool(get("decoupled_weight_decay")) or self._base is torch.optim.AdamW,
            has_dtype_eps=self._base is torch.optim.Adafactor and group["eps"][0] is None,
            initial_accumulator_value=self._optimizer.defaults.get("initial_accumulator_value", 0.0),
        )

    def _check_groups(self) -> None:
        groups = self._optimizer.param_groups
        for index, group in enumerate(groups):
            prepared = len(self._groups[index]) if index < len(self._groups) else 0
            if len(group["params"]) != prepared or len(groups) < len(self._groups):
                raise PrepareError(
                    f"the parameter groups of {self._class_name} changed after prepare: group {index} has "
                    f"{len(group['params'])} parameters and had {prepared}",
                    "call add_param_group before accelerator.prepare, or prepare the optimizer again",
                )

    def _scalar_names(self) -> tuple[str, ...]:
        return tuple(self._rule.scalars(self._optimizer.param_groups[0]))

    # -- the arrays of a state -----------------------------------------------------------------------------------------

    def _layout(self, param: Any, flags: Flags) -> dict[str, StateArray]:
        return self._rule.layout(tuple(param.shape), flags)

    def _dtype(self, entry: StateArray, param: Any) -> np.dtype[Any]:
        return self._scalar_dtype if entry.is_scalar else np.dtype(param.dtype)

    def _filled(self, entry: StateArray, param: Array) -> Array:
        dtype = self._dtype(entry, param)
        if entry.shape == tuple(param.shape) and not entry.is_scalar:
            return jnp.full_like(param, entry.fill, dtype)
        return jnp.full(entry.shape, entry.fill, dtype)

    def _completed(self, state: Mapping[str, Array], param: Array, flags: Flags) -> dict[str, Array]:
        """The state with the arrays that a flag switched on since `init` needs, at their first values."""
        layout = self._layout(param, flags)
        return {**{key: self._filled(entry, param) for key, entry in layout.items() if key not in state}, **state}


def _supported_class(optimizer: Optimizer) -> type[Optimizer]:
    """The torch.optim class whose rule `optimizer` follows: its own or, for a subclass that keeps `step`, its parent's."""
    cls = type(optimizer)
    supported: list[type[Optimizer]] = [getattr(torch.optim, name) for name in RULES]
    base = next((parent for parent in cls.__mro__ if parent in supported), None)
    if base is not None and _keeps_step(cls, base):
        return base
    reason = "it has no rule in jax" if base is None else f"it changes how {base.__name__} steps"
    raise UnsupportedError(
        f"the jax backend cannot run the optimizer {cls.__name__}: {reason}",
        f"use one of torch.optim's {', '.join(sorted(RULES))}, or choose the torch backend",
    )


def _keeps_step(cls: type[Optimizer], base: type[Optimizer]) -> bool:
    # torch wraps step on the class at the first construction, also on a subclass that only inherits it.
    return inspect.unwrap(cls.step) is inspect.unwrap(base.step) and cls._init_group is base._init_group  # type: ignore[attr-defined]


def _refuse_hooks(optimizer: Optimizer) -> None:
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:  # no public way to ask
        raise UnsupportedError(
            f"{type(optimizer).__name__} has step hooks, which a compiled step cannot call",
            "remove the hooks and do their work in the training loop, or choose the torch backend",
        )


def _name_of(parameter: torch.Tensor, names: Mapping[int, str], where: str) -> str:
    name = names.get(id(parameter))
    if name is None:
        raise PrepareError(
            f"{where} is in no prepared model",
            "make the optimizer from model.parameters() of the model that is prepared with it, before or in the same prepare",
        )
    if parameter.is_complex():
        raise UnsupportedError(f"{where}, {name!r}, is complex", "train real parameters, or choose the torch backend")
    if any(tensor is not None and tensor.layout is not torch.strided for tensor in (parameter, parameter.grad)):
        raise UnsupportedError(
            f"{where}, {name!r}, or its gradient is sparse", "use dense gradients (nn.Embedding(sparse=False))"
        )
    return name


def _check_same_groups(optimizer: Optimizer, given: Mapping[str, Any]) -> None:
    # torch checks the same right after its hooks; ours runs before and must not act on other groups.
    if [len(g["params"]) for g in given["param_groups"]] != [len(g["params"]) for g in optimizer.param_groups]:
        raise ValueError("loaded state dict contains other parameter groups than this optimizer has")


def _host_array(value: Any, dtype: np.dtype[Any] | None) -> NDArray[Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        # numpy has no bfloat16 of its own: the same 16 bits, under the name that jax uses.
        value = (
            value.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if value.dtype == torch.bfloat16 else value.numpy()
        )
    return np.array(value, dtype)


def _host_tensor(value: NDArray[Any]) -> torch.Tensor:
    value = np.array(value)
    if value.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)

"""optax transformations and nnx.Optimizer as torch optimizers: jitted updates of torch's own parameters, written back in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from polyaccel.errors import CheckpointError, PrepareError, UnsupportedError
from polyaccel_jax import dialect

from .exchange import to_tensor
from .flax_arrays import as_argument, fence, finish, host, is_key, like, place, words
from .flax_modules import FlaxModule, HeldModel

if TYPE_CHECKING:
    from .flax_programs import FlaxRuntime

Slots = defaultdict[torch.Tensor, Any]


class LoweredOptimizer:
    """An optimizer of a flax script before it is known whose parameters it updates."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def for_model(self, module: nn.Module | None) -> OptaxOptimizer:
        """The torch optimizer over a lowered model's parameters. Raises PrepareError where there is not exactly one model."""
        if not isinstance(module, FlaxModule):
            raise PrepareError(
                f"{type(self.optimizer).__name__} does not say which model it trains",
                "prepare it in one call with its model: accelerator.prepare(model, optimizer)",
            )
        return OptaxOptimizer(self.optimizer, module.held)


class OptaxOptimizer(torch.optim.Optimizer):
    """Updates a lowered model by optax. Its state lives in jax; `state` shows it as torch tensors, by parameter and slot.

    A parameter without a gradient is updated with zeros, as in optax; without any gradient a step does nothing.
    """

    def __init__(self, optimizer: Any, held: HeldModel) -> None:
        self.source = dialect.optimizer_source(optimizer, held)
        self.held = held
        self.names: tuple[str, ...] = tuple(self.source.names())
        params = dict(zip(self.names, held.leaves(self.names), strict=True))
        fence(held.engine.engine.device)
        initial = finish(jax.jit(self.source.init)(params))
        self._treedef: Any
        leaves, self._treedef = jax.tree.flatten(initial)
        # Copies: what is donated below must be nobody else's, neither torch's parameters nor the user's own state.
        self.leaves: list[jax.Array] = finish([jnp.copy(leaf) for leaf in place(leaves, held.engine.device)])
        self.state_names: list[str] = self.source.state_names(initial)
        self._update = jax.jit(self.traced_update, donate_argnums=2)
        super().__init__([held.tensors[name] for name in self.names], {})
        self.source.attach(self)

    # -- the update ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from their gradients, in place."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tensors = self.held.tensors
        known = self.held.engine.gradients
        grads = {name: _argument(grad, known) for name in self.names if (grad := tensors[name].grad) is not None}
        if not grads:
            return loss
        fence(self.held.engine.engine.device)
        params = self.held.leaves(self.names)
        new, self.leaves = finish(self._update(params, grads, self.leaves))
        known.clear()  # `zero_grad` shall free them
        self.held.write(dict(zip(self.names, new, strict=True)))
        return loss

    def traced_update(self, params: list[jax.Array], grads: dict[str, jax.Array], leaves: list[jax.Array]) -> Any:
        """Traced: parameters and gradients to new parameters, in the order of `names`, and new state."""
        # Behind the barrier nothing that comes out can be the very memory of a parameter or gradient, which are torch's.
        params, grads = jax.lax.optimization_barrier((params, grads))
        named = dict(zip(self.names, params, strict=True))
        grads = {name: grad.astype(named[name].dtype) for name, grad in grads.items()}
        state = jax.tree.unflatten(self._treedef, leaves)
        new, state = self.source.update(named, grads, state, self.source.hyperparameters())
        leaves, treedef = jax.tree.flatten(state)
        if treedef != self._treedef:
            raise UnsupportedError(
                "the optimizer's update changed the structure of its state",
                "use an optimizer whose state keeps its structure",
            )
        return [new[name].astype(named[name].dtype) for name in self.names], leaves

    # -- the state, as optax has it --------------------------------------------------------------------------------------

    @property
    def opt_state(self) -> Any:
        """The optax state; valid until the next step."""
        return jax.tree.unflatten(self._treedef, self.leaves)

    @opt_state.setter
    def opt_state(self, value: Any) -> None:
        leaves, treedef = jax.tree.flatten(value)
        if treedef != self._treedef:
            raise PrepareError(
                "the optimizer state has another structure than this optimizer's",
                "load the state of an equal optimizer",
            )
        device = self.held.engine.device
        cast = [
            new if is_key(old) else jnp.asarray(new, old.dtype) for new, old in zip(leaves, self.leaves, strict=True)
        ]
        self.leaves = finish([jnp.copy(leaf) for leaf in place(cast, device)])

    # -- the state, as torch has it --------------------------------------------------------------------------------------

    @property
    def state(self) -> Slots:
        """Copies of the state by parameter and slot (`0/mu`). What belongs to no parameter (a step count) is the first one's."""
        slots: Slots = defaultdict(dict)
        for (name, slot), leaf in zip(self._slots(), self.leaves, strict=True):
            slots[self.held.tensors[name]][slot] = to_tensor(host(words(leaf)))
        return slots

    @state.setter
    def state(self, value: Mapping[Any, Any]) -> None:
        if value:  # torch's constructor sets an empty one
            raise UnsupportedError("the state of an optax optimizer cannot be set by parameter", "use load_state_dict")

    def state_dict(self) -> dict[str, Any]:
        """torch's form: slots by the position of their parameter."""
        positions = {id(self.held.tensors[name]): index for index, name in enumerate(self.names)}
        state = {positions[id(parameter)]: slots for parameter, slots in self.state.items()}
        return {"state": state, "param_groups": [{"params": list(range(len(self.names)))}]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave. Raises CheckpointError, before anything changes, if slots or shapes differ."""
        positions = {name: index for index, name in enumerate(self.names)}
        given = {(index, slot): value for index, slots in state_dict["state"].items() for slot, value in slots.items()}
        wanted = [(positions[name], slot) for name, slot in self._slots()]
        if set(given) != set(wanted):
            names = sorted({slot for _, slot in set(given) ^ set(wanted)})
            raise CheckpointError(
                f"the saved state is not that of this optax transformation: {', '.join(names)} differ",
                "build the optimizer with the transformation that it was saved with",
            )
        leaves = []
        for where, old in zip(wanted, self.leaves, strict=True):
            new = torch.as_tensor(given[where])
            if tuple(new.shape) != words(old).shape:
                raise CheckpointError(
                    f"the saved {where[1]} of {self.names[where[0]]} has shape {tuple(new.shape)}, and {words(old).shape} is needed",
                    "build the model with the settings that it was saved with",
                )
            leaves.append(like(new, old))
        self.opt_state = jax.tree.unflatten(self._treedef, leaves)

    def _slots(self) -> list[tuple[str, str]]:
        """Of every state leaf: the parameter that it belongs to, and what it is of it."""
        found = []
        for full in self.state_names:
            name, dot, slot = full.rpartition(".")
            found.append((name, slot) if dot else (self.names[0], full))
        return found

    # -- the state, as shards have it ------------------------------------------------------------------------------------

    def read_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The state by the names that it has on every engine (`head.kernel.0/mu`, `0/count`), copied to the host."""
        return {name: np.array(host(words(leaf))) for name, leaf in zip(self.state_names, self.leaves, strict=True)}

    def write_arrays(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `read_arrays` gave, as tensors: a value for every name, of the same shape."""
        leaves = [like(tensors[name], old) for name, old in zip(self.state_names, self.leaves, strict=True)]
        self.opt_state = jax.tree.unflatten(self._treedef, leaves)


def _argument(grad: torch.Tensor, known: Mapping[int, jax.Array]) -> Any:
    """A gradient for the update. One that torch left where XLA wrote it is the array that it was, whatever was written to it."""
    array = known.get(grad.data_ptr())
    if array is not None and array.shape == tuple(grad.shape) and grad.is_contiguous():
        return array
    return as_argument(grad)


class HeldOptimizer:
    """What the flax dialect asks of an engine's optimizer, in terms of a torch engine's."""

    def __init__(self, runtime: FlaxRuntime, handle: Any, optimizer: OptaxOptimizer) -> None:
        self.engine = runtime
        self._handle = handle
        self._optimizer = optimizer

    def step(self) -> None:
        """The engine's step: under fp16 it may leave the parameters alone."""
        self._handle.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        self._handle.zero_grad(set_to_none)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step changed nothing because a gradient was not finite (fp16)."""
        return bool(self._handle.step_was_skipped)

    @property
    def state(self) -> Any:
        """The optax state; valid until the next step."""
        return self._optimizer.opt_state

    @state.setter
    def state(self, value: Any) -> None:
        self._optimizer.opt_state = value

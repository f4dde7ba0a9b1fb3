"""Hands user objects to the engine, through a bridge where they speak another dialect, and remembers which handle is whose."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polyaccel.dialects import Dialect, Role, identify
from polyaccel.errors import PrepareError, UnsupportedError
from polyaccel.protocols import Bridge, Capabilities, Engine, LoaderSpec
from polyaccel.registry import load_bridge

_ORDER: tuple[Role, ...] = ("model", "optimizer", "loader", "scheduler")


@dataclass(frozen=True, slots=True)
class Prepared:
    """One prepared object: the user's own, the engine's handle of it, and what user code holds from then on."""

    role: Role
    original: Any
    handle: Any
    public: Any


_preparations: list[weakref.ref[Preparation]] = []  # of every Accelerator that is still in use, the oldest first


def placements_of(given: Sequence[bool | None] | None, number: int, *, default: bool) -> list[bool]:
    """Whether to place each of `number` objects: what is given for it, else the default. Raises PrepareError for another number."""
    given = [None] * number if given is None else given
    if len(given) != number:
        raise PrepareError(
            f"device_placement has {len(given)} values for {number} objects",
            "give one value per argument of prepare; None means the Accelerator's own setting",
        )
    return [default if value is None else bool(value) for value in given]


def is_spread(model: Any) -> bool:
    """Whether a device_map has spread the model, or a part of it, over several devices (`dispatch_model`)."""
    parts = model.modules() if callable(getattr(model, "modules", None)) else [model]
    return any(len(getattr(part, "hf_device_map", ())) > 1 for part in parts)


def _refuse_spread(objects: tuple[Any, ...]) -> None:
    for position, value in enumerate(objects):
        if callable(getattr(value, "modules", None)) and is_spread(value):
            raise PrepareError(
                f"argument {position} of prepare, a {type(value).__name__}, is spread over devices by its device_map, and every process"
                " of this job trains a whole model on its own device",
                "load it without device_map, start one process, or use prepare_model(model, evaluation_mode=True)",
            )


def engine_of_model(model: Any) -> tuple[Engine, Any]:
    """The engine that a model was last prepared for, and its handle there. Raises PrepareError for one that is not prepared."""
    _preparations[:] = [reference for reference in _preparations if reference() is not None]
    for reference in reversed(_preparations):
        preparation = reference()
        if preparation is not None and (entry := preparation.entry_of(model)) is not None and entry.role == "model":
            return preparation._engine, entry.handle
    raise PrepareError(
        f"model, a {type(model).__name__}, is not a prepared model of an Accelerator in use",
        "pass what accelerator.prepare returned for it, and keep the Accelerator while its model is in use",
    )


class Preparation:
    """Everything that one Accelerator has prepared, and the dialect of its script once a model told it."""

    def __init__(self, engine: Engine, capabilities: Capabilities, backend: str, *, expected: Dialect | None) -> None:
        self.entries: list[Prepared] = []
        self.bridge: Bridge | None = None
        self._engine = engine
        self._capabilities = capabilities
        self._backend = backend
        self._expected_dialect = expected
        self._script: Dialect | None = None
        self._expected: Bridge | None = None
        self.on_prepared: list[Callable[[], None]] = []  # called after every prepare
        _preparations.append(weakref.ref(self))

    @property
    def script_bridge(self) -> Bridge | None:
        """The bridge of the script's dialect. Before a model has told the dialect, that of what the script has imported: values
        such as `accelerator.device` are asked for early."""
        if self.bridge is not None or self._script is not None:
            return self.bridge
        expected = self._expected_dialect
        if expected is None or expected == self._capabilities.dialect or not self._capabilities.accepts_bridges:
            return None
        return self._bridge_for(expected)

    @property
    def is_of_torch(self) -> bool:
        """Whether the engine runs torch modules as they are, without a bridge."""
        return self._capabilities.dialect == "torch"

    # -- in ------------------------------------------------------------------------------------------------------------

    def prepare(
        self,
        objects: tuple[Any, ...],
        *,
        spec: LoaderSpec,
        placements: Sequence[bool],
        evaluation_mode: bool = False,
        unknown: Role | None = None,
    ) -> list[Any]:
        """The public object of each, in the order given; a prepared one stays as it is, an object of no known class passes
        through, or is taken for what `unknown` says.

        Models go first, then optimizers (which need their model), loaders, and schedulers (which need their optimizer).
        Everything is checked before anything is prepared.
        """
        kinds = [None if self.entry_of(value) else self._identify(value, unknown) for value in objects]
        self._check(objects, kinds)
        self._check_placements(kinds, placements)
        if not evaluation_mode and self._engine.topology.num_processes > 1:
            _refuse_spread(objects)
        for value, kind in zip(objects, kinds, strict=True):
            if kind is not None and kind[1] == "model":
                self._enter_dialect(kind[0], value)
        if not evaluation_mode:
            self._meet(
                [value for value, kind in zip(objects, kinds, strict=True) if kind is not None and kind[1] == "model"]
            )
        given = [entry for entry in map(self.entry_of, objects) if entry is not None]
        in_this_call = [entry for entry in given if entry.role == "model"]
        results = [entry.public if (entry := self.entry_of(value)) else value for value in objects]
        for role in _ORDER:
            for position, (value, kind) in enumerate(zip(objects, kinds, strict=True)):
                if kind is None or kind[1] != role:
                    continue
                entry = self.entry_of(value) or self._prepare_one(
                    value, kind, in_this_call, replace(spec, device_placement=placements[position]), evaluation_mode
                )
                if role == "model" and entry not in in_this_call:
                    in_this_call.append(entry)
                results[position] = entry.public
        for call in self.on_prepared:
            call()
        return results

    def _meet(self, models: list[Any]) -> None:
        """Before models become those of the whole job: a process that does not come, or comes with others, is named."""
        if models and self._engine.topology.num_processes > 1:
            self._engine.collectives.barrier(", ".join(type(model).__name__ for model in models))

    def _identify(self, value: Any, unknown: Role | None) -> tuple[Dialect, Role] | None:
        found = identify(value, self._capabilities.kinds)
        if found is None and unknown is not None:
            expected = self._expected_dialect if self._capabilities.accepts_bridges else None
            return (self._script or expected or self._capabilities.dialect), unknown
        return found

    def _check(self, objects: tuple[Any, ...], kinds: list[tuple[Dialect, Role] | None]) -> None:
        for position, (value, kind) in enumerate(zip(objects, kinds, strict=True)):
            if kind is None:
                continue
            if kind[1] == "loss":
                raise PrepareError(
                    f"argument {position} of prepare is an array of shape {tuple(getattr(value, 'shape', ()))}",
                    "prepare takes models, optimizers, loaders and schedulers",
                )
        models = {kind[0] for kind in kinds if kind is not None and kind[1] == "model"}
        if self._script is not None:
            models.add(self._script)
        optimizers = {kind[0] for kind in kinds if kind is not None and kind[1] == "optimizer"}
        if getattr(self.bridge, "trains_with_native_optimizers", False):
            optimizers.discard(self._capabilities.dialect)
        if len(models | optimizers) > 1:
            raise PrepareError(
                "a torch and a flax object cannot train together in one Accelerator",
                "write model and optimizer in one dialect",
            )

    def _check_placements(self, kinds: list[tuple[Dialect, Role] | None], placements: Sequence[bool]) -> None:
        if "host_placement" in self._capabilities.features:
            return
        for position, (kind, is_placed) in enumerate(zip(kinds, placements, strict=True)):
            if kind is not None and kind[1] in ("model", "loader") and not is_placed:
                raise UnsupportedError(
                    f"device_placement=False for the {kind[1]} at position {position}: backend {self._backend!r} computes with what"
                    " it has placed itself",
                    "leave device_placement out, or use the backend torch",
                )

    def _enter_dialect(self, dialect: Dialect, model: Any) -> None:
        self._script = dialect
        if dialect == self._capabilities.dialect or self.bridge is not None:
            return
        if not self._capabilities.accepts_bridges:
            cure = "jax" if dialect == "flax" else "torch"
            raise UnsupportedError(
                f"backend {self._backend!r} cannot run {type(model).__name__}, which is written in {dialect}",
                f"use backend={cure!r} for this script",
            )
        self.bridge = self._bridge_for(dialect)

    def _prepare_one(
        self, value: Any, kind: tuple[Dialect, Role], models: list[Prepared], spec: LoaderSpec, evaluation_mode: bool
    ) -> Prepared:
        dialect, role = kind
        bridge = None if dialect == self._capabilities.dialect else self._bridge_for(dialect)
        native = value if bridge is None else bridge.lower(value, role)
        engine = self._engine
        if role == "model":
            stays: Any = {} if spec.device_placement else {"device_placement": False}
            handle = engine.prepare_model(native, evaluation_mode=evaluation_mode, **stays)
        elif role == "optimizer":
            handle = engine.prepare_optimizer(native, self._only_model(models))
        elif role == "scheduler":
            handle = engine.prepare_scheduler(native, self._optimizer_of(value))
        else:
            handle = engine.prepare_loader(native, self._loader_spec(spec, bridge))
        public = handle if bridge is None or role in ("loader", "scheduler") else bridge.lift(handle)
        entry = Prepared(role, value, handle, public)
        self.entries.append(entry)
        return entry

    def _bridge_for(self, dialect: Dialect) -> Bridge:
        if self.bridge is not None:
            return self.bridge
        if self._expected is None or self._expected.source != dialect:
            self._expected = load_bridge(dialect, self._capabilities.dialect, backend=self._backend)
            self._expected.engine = self._engine
        return self._expected

    def _loader_spec(self, spec: LoaderSpec, bridge: Bridge | None) -> LoaderSpec:
        # User code sees batches of its own dialect: the script's bridge lifts them. A torch DataLoader in a flax script on jax needs
        # a bridge to be cut, but no lifting; one that is prepared before any model is taken for a torch script's.
        lifting = self.bridge or (bridge if self._script is None else None)
        return replace(spec, lift=None if lifting is None else lifting.lift_batch)

    def _only_model(self, models: list[Prepared]) -> Any | None:
        """The model handle an optimizer without parameters of its own (optax) belongs to; None if that is not clear."""
        candidates = models or [entry for entry in self.entries if entry.role == "model"]
        return candidates[0].handle if len(candidates) == 1 else None

    def _optimizer_of(self, scheduler: Any) -> Any | None:
        wanted = getattr(scheduler, "optimizer", None)
        optimizers = [entry for entry in self.entries if entry.role == "optimizer"]
        for entry in optimizers:
            if wanted is entry.original or wanted is entry.public:
                return entry.handle
        return None

    def optimizers_of(self, scheduler: Any) -> list[Any]:
        """Public optimizers that a scheduler follows: its own if it is prepared, else all of them (rule S7)."""
        wanted = getattr(scheduler, "optimizer", None)
        entries = [entry for entry in self.entries if entry.role == "optimizer"]
        own = [entry.public for entry in entries if wanted is entry.original or wanted is entry.public]
        return own or [entry.public for entry in entries]

    # -- out -----------------------------------------------------------------------------------------------------------

    def entry_of(self, value: Any) -> Prepared | None:
        """The entry whose original or public object `value` is."""
        for entry in self.entries:
            if value is entry.public or value is entry.original:
                return entry
        return None

    def is_foreign_loader(self, value: Any) -> bool:
        """Whether it passed through and is an iterable that knows where it stands."""
        has_state = all(hasattr(value, name) for name in ("__iter__", "state_dict", "load_state_dict"))
        return has_state and self.entry_of(value) is None

    def handles(self, role: Role) -> list[Any]:
        """The engine's handles of one role, in the order in which they were prepared."""
        return [entry.handle for entry in self.entries if entry.role == role]

    def replace_public(self, entry: Prepared, public: Any) -> Prepared:
        """Give user code another object for an entry (a scheduler's gate)."""
        renewed = Prepared(entry.role, entry.original, entry.handle, public)
        self.entries[self.entries.index(entry)] = renewed
        return renewed

    def handle_of(self, value: Any, role: Role, *, argument: str) -> Any:
        """The engine's handle of a prepared object. Raises PrepareError naming the argument if it is not prepared."""
        entry = self.entry_of(value)
        if entry is None or entry.role != role:
            raise PrepareError(
                f"{argument}, a {type(value).__name__}, is not a prepared {role}",
                "pass what accelerator.prepare returned for it",
            )
        return entry.handle

    def public(self, role: Role) -> list[Any]:
        """What user code holds, of one role, in the order in which it was prepared."""
        return [entry.public for entry in self.entries if entry.role == role]

    def forget(self) -> None:
        """Drop every reference."""
        self.entries.clear()

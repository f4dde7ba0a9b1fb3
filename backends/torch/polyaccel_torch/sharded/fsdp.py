"""FSDP2 over the data axes: blocks are gathered one at a time, gradients are averaged straight into pieces, precision as the plan says."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from polyaccel.precision import PrecisionPolicy
from polyaccel.sharding.rules import Spec
from polyaccel_torch.sharded import repeated

_have_accumulated: weakref.WeakSet[Any] = (
    weakref.WeakSet()
)  # models that were inside `accumulating` since their gradients were dropped
Placement = Callable[[nn.Parameter], Shard | None]


def blocks_of(module: nn.Module) -> dict[str, nn.Module]:
    """The parts that are gathered one at a time, by name: what the model says may not be split (`_no_split_modules`), else the blocks
    of its outermost lists of blocks of one class. The model itself gathers what is left.

    A block that shares a parameter with another part is none: both have to find it whole at the same time.
    """
    found = dict(_named_blocks(module))
    users: dict[int, set[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        owner = next((block for block in found if name == block or name.startswith(f"{block}.")), "")
        for parameter in part.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(owner)
    shared = {owner for owners in users.values() if len(owners) > 1 for owner in owners}
    has_parameters = {owner for owners in users.values() for owner in owners}
    return {name: block for name, block in found.items() if name in has_parameters and name not in shared}


def _named_blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    whole = set(getattr(module, "_no_split_modules", None) or ())
    taken: list[str] = []
    for name, part in module.named_modules():
        if any(name.startswith(f"{block}.") for block in taken):
            continue
        if whole:
            if name and type(part).__name__ in whole:
                taken.append(name)
                yield name, part
            continue
        blocks = list(part.named_children())
        is_list = isinstance(part, (nn.ModuleList, nn.Sequential)) and len(blocks) > 1
        is_called = not any(isinstance(block, (nn.ModuleList, nn.ModuleDict)) for _, block in blocks)
        if is_list and is_called and len({type(block) for _, block in blocks}) == 1:
            for key, block in blocks:
                path = f"{name}.{key}" if name else key
                taken.append(path)
                yield path, block


def mixed_precision(policy: PrecisionPolicy) -> MixedPrecisionPolicy:
    """Parameters travel and compute in the narrow dtype, gradients are added up in float32; autocast keeps what needs float32.

    Inputs and outputs are not cast here: autocast does it where it is safe.
    """
    if policy.compute_dtype == "float32":
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    narrow = getattr(torch, policy.compute_dtype)
    return MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)


def placement_of(specs: Mapping[int, Spec], parts: int) -> Placement:
    """Which dim of a parameter is cut over `fsdp`, by the parameter's id; None: dim 0, of which the last process may have less."""

    def placement(parameter: nn.Parameter) -> Shard | None:
        spec = specs.get(id(parameter), ())
        if "fsdp" not in spec:
            return None
        dim = spec.index("fsdp")
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return Shard(dim) if dim == 0 or local.shape[dim] % parts == 0 else None

    return placement


def shard(
    part: nn.Module,
    mesh: DeviceMesh,
    policy: PrecisionPolicy,
    placement: Placement,
    whole: set[nn.Parameter],
    *,
    is_offloaded: bool = False,
) -> None:
    """Cut a block's parameters, in place, but for those that stay `whole`, and put its buffers on the device. Blocks come before the
    model that they are in. Offloaded, parameters, gradients and optimizer state rest in host memory.

    They are cut again after every forward, the model's own ones too: between steps no parameter is whole, and each stays the same
    object, by which optimizers know it.
    """
    fully_shard(
        part,
        mesh=mesh,
        reshard_after_forward=True,
        shard_placement_fn=placement,
        mp_policy=mixed_precision(policy),
        offload_policy=CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if is_offloaded else OffloadPolicy(),
        ignored_params=whole or None,
    )


def averaging_part(handle: nn.Module) -> FSDPModule | None:
    """The model whose backward averages gradients, under torch.compile too; None without one."""
    part = getattr(handle, "_orig_mod", handle)
    return part if isinstance(part, FSDPModule) else None


@contextmanager
def accumulating(part: FSDPModule) -> Iterator[None]:
    """Inside, a backward adds to this process's own gradients, which stay whole until the next one outside averages them."""
    _set_averaging(part, False)
    _have_accumulated.add(part)
    try:
        yield
    finally:
        _set_averaging(part, True)


@contextmanager
def exchanging(part: FSDPModule) -> Iterator[None]:
    """Inside `accumulating`: a backward averages all the same."""
    _set_averaging(part, True)
    yield


def _set_averaging(part: FSDPModule, is_averaging: bool) -> None:
    part.set_requires_gradient_sync(is_averaging)
    if (others := repeated.of_model.get(part)) is not None:  # type: ignore[call-overload]
        others.is_averaging = is_averaging


def _groups(part: FSDPModule) -> Iterator[Any]:
    modules: list[nn.Module] = list(part.modules())  # type: ignore[attr-defined]
    for state in (module._get_fsdp_state() for module in modules if isinstance(module, FSDPModule)):
        yield from state._fsdp_param_groups


def _cut_parameters(part: FSDPModule) -> Iterator[Any]:
    """FSDP2's record of every parameter that it cuts in a model."""
    for group in _groups(part):
        yield from group.fsdp_params


def records_of(part: FSDPModule) -> dict[int, tuple[Any, torch.dtype]]:
    """By the id of the parameter that the model shows, FSDP2's record of it, and the dtype in which its gradients are added up."""
    found = {}
    for group in _groups(part):
        kind = group.mp_policy.reduce_dtype or group.mp_policy.param_dtype
        found.update({id(one.sharded_param): (one, kind or one.sharded_param.dtype) for one in group.fsdp_params})
    return found


def own_gradient(record: Any) -> Any:
    """What backward passes without an exchange have left of a parameter's gradient, whole; None without one."""
    if record.unsharded_accumulated_grad is not None:
        return record.unsharded_accumulated_grad
    return getattr(getattr(record, "_unsharded_param", None), "grad", None)


def has_accumulated(part: FSDPModule) -> None:
    """Note that a model has gradients of each data shard's own, which were not computed here."""
    _have_accumulated.add(part)
    if (others := repeated.of_model.get(part)) is not None:  # type: ignore[call-overload]
        others.has_own = True


def drop_own_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Forget what backward passes inside `accumulating` have left for these parameters; `zero_grad` does not reach it.

    A torch without such a place is one that this version of polyaccel was not written for: it raises AttributeError.
    """
    parts = list(_have_accumulated)
    if not parts:
        return
    dropped = {id(parameter) for parameter in parameters}
    for part in parts:
        for record in _cut_parameters(part):
            if id(record.sharded_param) in dropped:
                record.unsharded_accumulated_grad = None
                if (whole := getattr(record, "_unsharded_param", None)) is not None:
                    whole.grad = None
        if not has_own_gradients(part):
            _have_accumulated.discard(part)


def _zero_grad(model: Callable[[], Any], set_to_none: bool = True) -> None:
    part: Any = model()
    type(part).zero_grad(part, set_to_none)
    drop_own_gradients(part.parameters())


def complete(model: nn.Module) -> None:
    """Let methods of a whole model that is cut do what they say: `zero_grad`, and `generate` of transformers, which is a forward."""
    model.zero_grad = functools.partial(_zero_grad, weakref.ref(model))  # type: ignore[method-assign]
    if callable(getattr(model, "generate", None)):
        register_fsdp_forward_method(model, "generate")


def has_own_gradients(part: FSDPModule) -> bool:
    """Whether a backward inside `accumulating` has left gradients that no exchange has averaged yet."""
    others = repeated.of_model.get(part)  # type: ignore[call-overload]
    if others is not None and others.has_own:
        return True
    return any(own_gradient(record) is not None for record in _cut_parameters(part))

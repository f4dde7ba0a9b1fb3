"""Operations on sequences in parts for which torch's DTensor has no rule, or one that is wrong there: their handlers.

Attention gathers keys and values, losses divide by the tokens of all parts, noise differs from part to part. Convolutions, whose rule
takes every process of the job for a neighbour, and what has no rule are computed whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from polyaccel import trees
from polyaccel.errors import UnsupportedError
from polyaccel_torch.sharded.layouts import Placements, laid_out, local_as, mesh_of, reduced, whole
from polyaccel_torch.sharded.mesh import with_layout_of
from polyaccel_torch.sharded.sequence_attention import attention, attention_backward
from polyaccel_torch.sharded.sequence_products import addmm, mm

_SUM, _MEAN, _NONE = 2, 1, 0  # ATen's Reduction
_OF_OPTIMIZERS = ("aten::_foreach_", "aten::_fused_", "aten::_amp_")


@functools.cache
def know_sequences(device_type: str) -> None:
    """Tell DTensor these rules; once in a process. They hold for all DTensors, and are right for all of them."""
    aten = torch.ops.aten
    rules: dict[Any, Callable[[Any, dict[str, Any]], Any]] = {
        aten._scaled_dot_product_flash_attention_for_cpu.default: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: attention_backward,
        aten.nll_loss_forward.default: _nll_loss,
        aten.nll_loss_backward.default: _nll_loss_backward,
        aten.nll_loss2d_forward.default: _nll_loss,
        aten.nll_loss2d_backward.default: _nll_loss_backward,
        aten.cat.default: _cat,
        aten.unbind.int: _unbind,
        aten.fill_.Tensor: _fill,
        aten.mm.default: mm,
        aten.addmm.default: addmm,
    }
    on_whole = (
        aten.convolution.default,
        aten.convolution_backward.default,
        aten._local_scalar_dense.default,
        aten.equal.default,
        aten.nonzero.default,
    )
    noise = (
        aten.bernoulli.default,
        aten.bernoulli_.float,
        aten.native_dropout.default,
        aten.normal_.default,
        aten.uniform_.default,
        aten.rand_like.default,
        aten.randn_like.default,
        aten.randint_like.default,
        aten.randint_like.low_dtype,
    )
    # torch's own context_parallel and loss_parallel extend this table; there is no public name for it.
    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    handlers.update(_without_rules())
    handlers.update(dict.fromkeys(on_whole, _on_whole_inputs))
    handlers.update({op: functools.partial(_handled, rule) for op, rule in rules.items()})
    if device_type == "cpu":  # elsewhere torch draws for tensors in pieces as for whole ones
        handlers.update(dict.fromkeys(noise, _noise))


def _handled(rule: Callable[..., Any], op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The rule, given all arguments by name."""
    schema = op._schema.arguments
    given = {one.name: one.default_value for one in schema}
    given.update(zip((one.name for one in schema), args, strict=False))
    given.update(kwargs)
    with torch.no_grad():  # below autograd, where arguments still say that they need gradients
        return rule(op, given)


# -- losses ----------------------------------------------------------------------------------------------------------------


def _tokens(logits: Any, mesh: DeviceMesh) -> tuple[list[Placement], list[Placement]]:
    """How logits (tokens, classes), or (batch, classes, ...), and their targets lie: in pieces along tokens, never along classes."""
    of_logits, of_targets = whole(mesh), whole(mesh)
    if not isinstance(logits, DTensor) or logits.dim() == 1:
        return of_logits, of_targets
    for axis, place in enumerate(logits.placements):
        dim = getattr(place, "dim", None)
        if dim is None or dim == 1 or (logits.shape[dim] // getattr(place, "split_factor", 1)) % mesh.size(axis):
            continue
        if type(place) is Shard:
            of_logits[axis], of_targets[axis] = place, Shard(dim - 1 if dim > 1 else dim)
        elif dim == 0:  # strided: (batch, length) became one dim, length in pieces
            of_logits[axis] = of_targets[axis] = place
    return of_logits, of_targets


def _nll_loss(op: Any, given: dict[str, Any]) -> Any:
    mesh = mesh_of(given)
    of_logits, of_targets = _tokens(given["self"], mesh)
    reduction = given["reduction"]
    loss, count = op(
        local_as(given["self"], mesh, of_logits),
        local_as(given["target"], mesh, of_targets),
        local_as(given["weight"], mesh, whole(mesh)),
        _SUM if reduction == _MEAN else reduction,
        given["ignore_index"],
    )
    if reduction == _NONE:
        return laid_out(loss, mesh, of_targets), laid_out(count, mesh, whole(mesh))
    summands = [Replicate() if isinstance(place, Replicate) else Partial() for place in of_targets]
    total = laid_out(count, mesh, summands).redistribute(placements=whole(mesh))
    if reduction == _MEAN:
        loss = loss / total.to_local()
    return laid_out(loss, mesh, summands), total


def _nll_loss_backward(op: Any, given: dict[str, Any]) -> Any:
    mesh = mesh_of(given)
    of_logits, of_targets = _tokens(given["self"], mesh)
    grad = op(
        local_as(given["grad_output"], mesh, of_targets if given["reduction"] == _NONE else whole(mesh)),
        local_as(given["self"], mesh, of_logits),
        local_as(given["target"], mesh, of_targets),
        local_as(given["weight"], mesh, whole(mesh)),
        given["reduction"],
        given["ignore_index"],
        local_as(given["total_weight"], mesh, whole(mesh)),
    )
    return laid_out(grad, mesh, of_logits)


# -- operations without a rule of torch's, or with none for sequences in parts ----------------------------------------------


def _without_rules() -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Operations of torch that write nothing and that DTensor has no rule for, with what is right for all of them.

    Some can be taken apart into operations with rules, from which torch learns how pieces lie; it then computes the whole operation on
    pieces. That is wrong where an argument stands for the whole: a mean over its elements, a size. So these are taken apart here.
    """
    known = DTensor._op_dispatcher.sharding_propagator
    ruled = {*known.op_strategy_funcs, *known.op_single_dim_strategy_funcs, *known.op_to_rules}
    ruled.update(DTensor._op_dispatcher._custom_op_handlers, DTensor._op_dispatcher._random_ops)
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("aten::") or name.startswith(_OF_OPTIMIZERS):
            continue
        packet, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if op is None or op in ruled or op._schema.is_mutable:
            continue
        if op not in decomposition_table:
            yield op, _on_whole_inputs
        elif any(_counts(argument) for argument in op._schema.arguments):
            yield op, _by_its_parts


def _counts(argument: Any) -> bool:
    kind = str(argument.type)
    return "int" in kind.lower() and argument.name not in ("dim", "dtype")


def _by_its_parts(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    with torch.no_grad():
        try:
            return decomposition_table[op](*args, **kwargs)
        except (
            NotImplementedError,
            UnsupportedError,
        ):  # a part has no rule, of torch's or of ours: on all processes alike
            return _on_whole_inputs(op, args, kwargs)


def _on_whole_inputs(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Every process computes all of it."""
    leaves, structure = trees.flatten((tuple(args), kwargs))
    mesh = next(leaf.device_mesh for leaf in leaves if isinstance(leaf, DTensor))

    def repeated(leaf: Any) -> Any:
        return laid_out(leaf, mesh, whole(mesh)) if isinstance(leaf, torch.Tensor) else leaf

    with torch.no_grad():
        args, kwargs = structure.unflatten(
            local_as(leaf, mesh, whole(mesh)) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
        )
        found = op(*args, **kwargs)
        return repeated(found) if isinstance(found, torch.Tensor) else trees.map_leaves(repeated, found)


def _cat(op: Any, given: dict[str, Any]) -> Any:
    """torch takes the dims of the first tensor for those of all, which is wrong where that is a legacy empty one of one dim, with which
    transformers' caches begin. Here such a one is left out, and what it would have been joined to stays in parts."""
    mesh = mesh_of(given)
    tensors = [tensor for tensor in given["tensors"] if tensor.shape != (0,)] or given["tensors"][:1]
    dim = given["dim"] % max(tensors[0].dim(), 1)
    if len(tensors) == 1 and isinstance(tensors[0], DTensor):
        kept = reduced(tensors[0], mesh)
        return laid_out(local_as(tensors[0], mesh, kept).clone(), mesh, kept)
    kept = whole(mesh)
    for axis in range(mesh.ndim):
        places = [tensor.placements[axis] for tensor in tensors if isinstance(tensor, DTensor)]
        cuts = [place for place in places if type(place) is Shard and place.dim != dim and place not in kept]
        if cuts and all(tensor.shape[cuts[0].dim] % mesh.size(axis) == 0 for tensor in tensors):
            kept[axis] = cuts[0]
    return laid_out(op([local_as(tensor, mesh, kept) for tensor in tensors], dim), mesh, kept)


def _unbind(op: Any, given: dict[str, Any]) -> Any:
    tensor, mesh = given["self"], mesh_of(given)
    dim = given["dim"] % tensor.dim()
    kept = whole(mesh)
    for axis, place in enumerate(tensor.placements):
        if type(place) is Shard and place.dim != dim and tensor.shape[place.dim] % mesh.size(axis) == 0:
            kept[axis] = place
    left = [Shard(place.dim - (place.dim > dim)) if type(place) is Shard else place for place in kept]
    return [laid_out(one, mesh, left) for one in op(local_as(tensor, mesh, kept), dim)]


def _fill(op: Any, given: dict[str, Any]) -> Any:
    tensor, mesh = given["self"], mesh_of(given)
    if any(isinstance(place, Partial) for place in tensor.placements):
        raise _unwritable(op, tensor)
    op(tensor.to_local(), local_as(given["value"], mesh, whole(mesh)))
    return tensor


def _unwritable(op: Any, tensor: DTensor) -> UnsupportedError:
    name = op._schema.name.removeprefix("aten::")
    return UnsupportedError(
        f"the model writes in place ({name}) into a tensor of shape {tuple(tensor.shape)} that mesh.sequence has in summands: a sum over"
        " the sequence which no process has added up yet",
        "make a new tensor (torch.rand_like, torch.full_like) instead of writing into this one, or leave mesh.sequence at 1 for this model",
    )


# -- noise -----------------------------------------------------------------------------------------------------------------


def _noise(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """On the CPU, where torch has no generator for tensors in pieces: every process draws one number, and each part begins from
    it and from its own place."""
    like = args[0]
    is_in_place = op._schema.arguments[0].alias_info is not None
    with torch.no_grad():
        if any(isinstance(place, Partial) for place in like.placements):
            if is_in_place:
                raise _unwritable(op, like)
            like = like.redistribute(placements=reduced(like, like.device_mesh))
        mesh, placements = like.device_mesh, like.placements
        with _drawing_for(_part_of(mesh, placements), kwargs.get("generator")):
            found = op(like.to_local(), *args[1:], **kwargs)
        if is_in_place:
            return args[0]
        if isinstance(found, torch.Tensor):
            return with_layout_of(found, like)
        return tuple(with_layout_of(one, like) for one in found)


def _part_of(mesh: DeviceMesh, placements: Placements) -> int | None:
    """Which part of a tensor lies here, counted over the axes that it is cut along; None where it is whole."""
    cut = [axis for axis, place in enumerate(placements) if not isinstance(place, Replicate)]
    if not cut:
        return None
    return sum(
        mesh.get_local_rank(axis) * math.prod(mesh.size(inner) for inner in cut[position + 1 :])
        for position, axis in enumerate(cut)
    )


@contextmanager
def _drawing_for(part: int | None, generator: torch.Generator | None) -> Iterator[None]:
    if part is None:
        yield
        return
    generator = torch.default_generator if generator is None else generator
    seed = int(torch.randint(2**62, (), generator=generator))
    state = generator.get_state()
    generator.manual_seed(seed + part)
    try:
        yield
    finally:
        generator.set_state(state)

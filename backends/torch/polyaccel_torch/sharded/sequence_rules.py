"""Operations on sequences in parts for which torch's DTensor has no rule, or one that is wrong there: their handlers.

Attention is computed from this process's queries and all keys and values; a causal one from those before and those beside the queries,
which kernels can do without a mask. Losses divide by the tokens of all parts, noise differs from part to part, and convolutions, whose
rule takes every process of the job for a neighbour, get whole inputs.
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
from polyaccel_torch.sharded.mesh import with_layout_of

Placements = Sequence[Placement]
_ROWS = 2  # the queries' dim in (batch, heads, length, dim), and in the sums (batch, heads, length)
_SUM, _MEAN, _NONE = 2, 1, 0  # ATen's Reduction
_OF_OPTIMIZERS = ("aten::_foreach_", "aten::_fused_", "aten::_amp_")


@functools.cache
def know_sequences(device_type: str) -> None:
    """Tell DTensor these rules; once in a process. They hold for all DTensors, and are right for all of them."""
    aten = torch.ops.aten
    rules: dict[Any, Callable[[dict[str, Any]], Any]] = {
        aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
        aten.nll_loss_forward.default: _nll_loss,
        aten.nll_loss_backward.default: _nll_loss_backward,
        aten.nll_loss2d_forward.default: _nll_loss,
        aten.nll_loss2d_backward.default: _nll_loss_backward,
        aten.cat.default: _cat,
        aten.unbind.int: _unbind,
        aten.fill_.Tensor: _fill,
    }
    whole = (
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
    handlers = DTensor._op_dispatcher._custom_op_handlers
    handlers.update(_without_rules())
    handlers.update(dict.fromkeys(whole, _on_whole_inputs))
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


def _mesh_of(given: dict[str, Any]) -> DeviceMesh:
    leaves, _ = trees.flatten(given)
    return next(leaf.device_mesh for leaf in leaves if isinstance(leaf, DTensor))


def _local(tensor: Any, mesh: DeviceMesh, placements: Placements) -> Any:
    """This process's piece of a tensor that lies so; None stays."""
    if tensor is None:
        return None
    if not isinstance(tensor, DTensor):  # whole
        tensor = DTensor.from_local(tensor, mesh, _whole(mesh), run_check=False)
    return tensor.redistribute(placements=placements).to_local()


def _laid_out(local: torch.Tensor, mesh: DeviceMesh, placements: Placements) -> DTensor:
    return DTensor.from_local(local, mesh, placements, run_check=False)


def _whole(mesh: DeviceMesh) -> list[Placement]:
    return [Replicate()] * mesh.ndim


# -- attention -------------------------------------------------------------------------------------------------------------


class _Layout:
    """How one attention lies on its mesh: heads and batch in pieces, or rows of queries, or everything whole."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.mesh = _mesh_of(given)
        query, key = given["query"], given["key"]
        self.is_causal: bool = given["is_causal"]
        self.queries: list[Placement] = _whole(self.mesh)
        self.first_row, self.num_rows = 0, int(query.shape[_ROWS])
        self.is_cut = False
        taken: set[int] = set()
        for axis, place in enumerate(query.placements if isinstance(query, DTensor) else ()):
            if type(place) is not Shard or place.dim in taken or place.dim > _ROWS:
                continue
            size = self.mesh.size(axis)
            if query.shape[place.dim] % size:
                continue
            if place.dim == _ROWS:
                if self.is_causal and query.shape[_ROWS] != key.shape[_ROWS]:
                    continue
                self.num_rows //= size
                self.first_row = self.mesh.get_local_rank(axis) * self.num_rows
                self.is_cut = True
            elif key.shape[place.dim] % size:
                continue
            self.queries[axis] = place
            taken.add(place.dim)
        self.keys = [Replicate() if place == Shard(_ROWS) else place for place in self.queries]

    def mask(self, mask: Any) -> Any:
        """This process's piece: cut as the queries are where it has that dim; whole where it is broadcast along it."""
        if mask is None:
            return None
        missing = 4 - mask.dim()
        places: list[Placement] = []
        for place in self.queries:
            dim = place.dim - missing if isinstance(place, Shard) else -1
            places.append(Shard(dim) if dim >= 0 and mask.shape[dim] > 1 else Replicate())
        return _local(mask, self.mesh, places)

    def segments(self) -> Iterator[tuple[slice, bool]]:
        """Which keys these queries see, and whether the kernel has to look at their order."""
        if not (self.is_causal and self.is_cut):
            yield slice(None), self.is_causal
            return
        if self.first_row:
            yield slice(0, self.first_row), False
        yield slice(self.first_row, self.first_row + self.num_rows), True


def _attention(op: Any, given: dict[str, Any]) -> Any:
    layout = _Layout(given)
    mesh = layout.mesh
    query = _local(given["query"], mesh, layout.queries)
    key, value = (_local(given[name], mesh, layout.keys) for name in ("key", "value"))
    options = {"attn_mask": layout.mask(given["attn_mask"]), "scale": given["scale"]}
    out: Any = None
    for seen, is_causal in layout.segments():
        more = op(query, key[:, :, seen], value[:, :, seen], given["dropout_p"], is_causal, **options)
        out = more if out is None else _joined(out, more)
    return tuple(_laid_out(local, mesh, layout.queries) for local in out)


def _joined(first: Any, second: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys from that over each of them; sums are logarithms of those of exponents."""
    (one, sum_one), (other, sum_other) = first, second
    total = torch.logaddexp(sum_one, sum_other)
    share_one, share_other = ((part - total).exp().unsqueeze(-1) for part in (sum_one, sum_other))
    return (one * share_one + other * share_other).to(one.dtype), total


def _attention_backward(op: Any, given: dict[str, Any]) -> Any:
    """By the kernel, segment by segment: with the sums over all keys it gives each segment's share of every gradient."""
    layout = _Layout(given)
    mesh = layout.mesh
    grad, query, out, sums = (
        _local(given[name], mesh, layout.queries) for name in ("grad_out", "query", "out", "logsumexp")
    )
    key, value = (_local(given[name], mesh, layout.keys) for name in ("key", "value"))
    options = {"attn_mask": layout.mask(given["attn_mask"]), "scale": given["scale"]}
    grads: Any = None
    for seen, is_causal in layout.segments():
        some = (key[:, :, seen], value[:, :, seen])
        found = op(grad, query, *some, out, sums, given["dropout_p"], is_causal, **options)
        if grads is None:
            grads = [torch.zeros_like(found[0]), torch.zeros_like(key), torch.zeros_like(value)]
        grads[0] += found[0]
        grads[1][:, :, seen] += found[1]
        grads[2][:, :, seen] += found[2]
    summands = [Partial() if place == Shard(_ROWS) else place for place in layout.queries]
    laid_out = [_laid_out(grads[0], mesh, layout.queries)]
    for name, local in zip(("key", "value"), grads[1:], strict=True):
        found = _laid_out(local, mesh, summands)
        laid_out.append(found.redistribute(placements=_reduced(given[name], mesh)))
    return tuple(laid_out)


def _reduced(like: Any, mesh: DeviceMesh) -> Placements:
    """As a tensor lies, but never in summands."""
    placements = like.placements if isinstance(like, DTensor) else _whole(mesh)
    return [Replicate() if isinstance(place, Partial) else place for place in placements]


# -- losses ----------------------------------------------------------------------------------------------------------------


def _tokens(logits: Any, mesh: DeviceMesh) -> tuple[list[Placement], list[Placement]]:
    """How logits (tokens, classes), or (batch, classes, ...), and their targets lie: in pieces along tokens, never along classes."""
    of_logits, of_targets = _whole(mesh), _whole(mesh)
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
    mesh = _mesh_of(given)
    of_logits, of_targets = _tokens(given["self"], mesh)
    reduction = given["reduction"]
    loss, count = op(
        _local(given["self"], mesh, of_logits),
        _local(given["target"], mesh, of_targets),
        _local(given["weight"], mesh, _whole(mesh)),
        _SUM if reduction == _MEAN else reduction,
        given["ignore_index"],
    )
    if reduction == _NONE:
        return _laid_out(loss, mesh, of_targets), _laid_out(count, mesh, _whole(mesh))
    summands = [Replicate() if isinstance(place, Replicate) else Partial() for place in of_targets]
    total = _laid_out(count, mesh, summands).redistribute(placements=_whole(mesh))
    if reduction == _MEAN:
        loss = loss / total.to_local()
    return _laid_out(loss, mesh, summands), total


def _nll_loss_backward(op: Any, given: dict[str, Any]) -> Any:
    mesh = _mesh_of(given)
    of_logits, of_targets = _tokens(given["self"], mesh)
    grad = op(
        _local(given["grad_output"], mesh, of_targets if given["reduction"] == _NONE else _whole(mesh)),
        _local(given["self"], mesh, of_logits),
        _local(given["target"], mesh, of_targets),
        _local(given["weight"], mesh, _whole(mesh)),
        given["reduction"],
        given["ignore_index"],
        _local(given["total_weight"], mesh, _whole(mesh)),
    )
    return _laid_out(grad, mesh, of_logits)


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
        except NotImplementedError:  # a part has no rule: on all processes alike
            return _on_whole_inputs(op, args, kwargs)


def _on_whole_inputs(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Every process computes all of it."""
    leaves, structure = trees.flatten((tuple(args), kwargs))
    mesh = next(leaf.device_mesh for leaf in leaves if isinstance(leaf, DTensor))

    def laid_out(leaf: Any) -> Any:
        return _laid_out(leaf, mesh, _whole(mesh)) if isinstance(leaf, torch.Tensor) else leaf

    with torch.no_grad():
        args, kwargs = structure.unflatten(
            _local(leaf, mesh, _whole(mesh)) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
        )
        found = op(*args, **kwargs)
        return laid_out(found) if isinstance(found, torch.Tensor) else trees.map_leaves(laid_out, found)


def _cat(op: Any, given: dict[str, Any]) -> Any:
    """torch takes the dims of the first tensor for those of all, which is wrong where that is a legacy empty one of one dim, with which
    transformers' caches begin. Here such a one is left out, and what it would have been joined to stays in parts."""
    mesh = _mesh_of(given)
    tensors = [tensor for tensor in given["tensors"] if tensor.shape != (0,)] or given["tensors"][:1]
    dim = given["dim"] % max(tensors[0].dim(), 1)
    if len(tensors) == 1 and isinstance(tensors[0], DTensor):
        kept = _reduced(tensors[0], mesh)
        return _laid_out(_local(tensors[0], mesh, kept).clone(), mesh, kept)
    kept = _whole(mesh)
    for axis in range(mesh.ndim):
        places = [tensor.placements[axis] for tensor in tensors if isinstance(tensor, DTensor)]
        cuts = [place for place in places if type(place) is Shard and place.dim != dim and place not in kept]
        if cuts and all(tensor.shape[cuts[0].dim] % mesh.size(axis) == 0 for tensor in tensors):
            kept[axis] = cuts[0]
    return _laid_out(op([_local(tensor, mesh, kept) for tensor in tensors], dim), mesh, kept)


def _unbind(op: Any, given: dict[str, Any]) -> Any:
    tensor, mesh = given["self"], _mesh_of(given)
    dim = given["dim"] % tensor.dim()
    kept = _whole(mesh)
    for axis, place in enumerate(tensor.placements):
        if type(place) is Shard and place.dim != dim and tensor.shape[place.dim] % mesh.size(axis) == 0:
            kept[axis] = place
    left = [Shard(place.dim - (place.dim > dim)) if type(place) is Shard else place for place in kept]
    return [_laid_out(one, mesh, left) for one in op(_local(tensor, mesh, kept), dim)]


def _fill(op: Any, given: dict[str, Any]) -> Any:
    tensor, mesh = given["self"], _mesh_of(given)
    if any(isinstance(place, Partial) for place in tensor.placements):
        raise NotImplementedError(f"{op} on a tensor that lies in summands")
    op(tensor.to_local(), _local(given["value"], mesh, _whole(mesh)))
    return tensor


# -- noise -----------------------------------------------------------------------------------------------------------------


def _noise(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """On the CPU, where torch has no generator for tensors in pieces: every process draws one number, and each part begins from
    it and from its own place."""
    like = args[0]
    is_in_place = op._schema.arguments[0].alias_info is not None
    with torch.no_grad():
        if any(isinstance(place, Partial) for place in like.placements):
            if is_in_place:
                raise NotImplementedError(f"{op} on a tensor that lies in summands")
            like = like.redistribute(placements=_reduced(like, like.device_mesh))
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

"""Layers split over the `tensor` axis, as specs say: what is a plain tensor is the same on all of the axis's processes.

Between a layer whose outputs are cut and one whose inputs are, activations are DTensors: torch knows that they are pieces, and an
operation that needs more than a piece gathers it. Everywhere else they are whole, and the numbers are those of one device.
With the axis `sequence`, all of a model is computed in DTensors, of which these layers change the outermost placement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from polyaccel.sharding.rules import Spec
from polyaccel_torch.dialect.sharding_hints import is_conv1d
from polyaccel_torch.sharded.attention import split_attention_by_heads
from polyaccel_torch.sharded.mesh import local_of, with_layout_of

Specs = Mapping[str, Spec]  # of every parameter of a model, tied ones under their first name
Cut = Literal["outputs", "inputs", "rows", "columns"]  # of a layer; of an embedding's table


def without_tensor(spec: Spec) -> Spec:
    """The same, whole along the tensor axis."""
    return tuple(None if axis == "tensor" else axis for axis in spec)


def splittable(module: nn.Module, specs: Specs) -> tuple[dict[str, Spec], dict[str, str]]:
    """Specs that torch can carry out; and parameters that stay whole along the tensor axis although theirs cut them, with the reason.

    Weights of nn.Linear, nn.Embedding and transformers' Conv1D can be cut, also one that several of the first two share. Subclasses may
    be used without being called (the out_proj of nn.MultiheadAttention), where no hook sees their input.
    """
    users: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((part, key))
    kept: dict[str, Spec] = dict(specs)
    whole: dict[str, str] = {}
    for name, parameter in module.named_parameters():
        why = _obstacle(name, users[id(parameter)], specs) if "tensor" in specs[name] else None
        if why is not None:
            kept[name], whole[name] = without_tensor(specs[name]), why
    return kept, whole


def _obstacle(name: str, users: list[tuple[nn.Module, str]], specs: Specs) -> str | None:
    for part, key in users:
        kind = _kind(part)
        if kind is None or key not in ("weight", "bias"):
            return (
                f"torch splits layers of nn.Linear, nn.Embedding and Conv1D, and it belongs to a {type(part).__name__}"
            )
        if len(users) > 1 and (kind == "conv1d" or key == "bias"):
            return "several layers share it"
        if key == "bias":
            weight = specs.get(f"{name.rpartition('.')[0]}.weight", ())
            if len(weight) != 2 or weight[_output_dim(part)] != "tensor":
                return "its layer's outputs are not cut, and a bias is cut with them"
    return None


def _kind(part: nn.Module) -> Literal["linear", "embedding", "conv1d"] | None:
    if is_conv1d(part):
        return "conv1d"
    if type(part) is nn.Linear:
        return "linear"
    return "embedding" if type(part) is nn.Embedding else None


def _output_dim(part: nn.Module) -> int:
    return 1 if _kind(part) == "conv1d" else 0


# -- cutting ---------------------------------------------------------------------------------------------------------------


def split_layers(module: nn.Module, mesh: DeviceMesh, specs: Mapping[int, Spec]) -> None:
    """Cut the layers of a module, in place, by the specs of their parameters, which are known by id. Ties stay.

    Parameters must be the same on all processes of the axis, or on the meta device. Raises nothing for specs that `splittable` gave.
    """
    cuts = cuts_of(module, specs)
    if not cuts:
        return
    split_attention_by_heads()
    cut_already: dict[int, nn.Parameter] = {}
    for name, cut in cuts.items():
        layer = module.get_submodule(name)
        for key, parameter in list(layer.named_parameters(recurse=False)):
            spec = specs.get(id(parameter), ())
            if id(parameter) not in cut_already:
                placement = Shard(spec.index("tensor")) if "tensor" in spec else Replicate()
                cut_already[id(parameter)] = _distributed(parameter, mesh, placement)
            layer.register_parameter(key, cut_already[id(parameter)])
        feeds = cut == "outputs" and _stays_cut(module, name.rpartition(".")[0], cuts, mesh.size(0))
        # Nearest to the layer, so that hooks of the script meet what they met before.
        layer.register_forward_pre_hook(partial(_enter, mesh, cut), with_kwargs=True)
        layer.register_forward_hook(_stay_cut if feeds else _leave, prepend=True)


def _distributed(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    # Outermost is the tensor axis, along a sequence every process has all of it.
    placements = [placement, *[Replicate()] * (mesh.ndim - 1)]
    piece = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
    local = local_of(piece)
    if not local.is_meta and local.untyped_storage().nbytes() > local.numel() * local.element_size():
        # A piece along dim 0 is a view of the whole parameter, which would stay in memory for it.
        piece = with_layout_of(local.clone(), piece)  # type: ignore[assignment]
    return nn.Parameter(piece, requires_grad=parameter.requires_grad)


def cuts_of(module: nn.Module, specs: Mapping[int, Spec]) -> dict[str, Cut]:
    """How every layer of a module is cut, by its name; specs by the id of a parameter."""
    return dict(_cut_layers(module, specs))


def _cut_layers(module: nn.Module, specs: Mapping[int, Spec]) -> Iterator[tuple[str, Cut]]:
    for name, part in module.named_modules():
        spec = specs.get(id(part._parameters.get("weight")), ())
        if "tensor" not in spec:
            continue
        if isinstance(part, nn.Embedding):
            yield name, "rows" if spec[0] == "tensor" else "columns"
        else:
            yield name, "outputs" if spec[_output_dim(part)] == "tensor" else "inputs"


def _stays_cut(module: nn.Module, path: str, cuts: Mapping[str, Cut], num_pieces: int) -> bool:
    """Whether activations lie in pieces inside a part (an attention, an MLP): it ends in a layer of cut inputs, and has no parameters
    beside its cut layers. A plain parameter that meets pieces would get pieces of a gradient.

    Not so where a layer gives more than the part ends in: such a fused projection is taken apart in between, and its cuts do not fall
    between its parts. And not where a cut falls into a head of an attention, which says how large they are as transformers' do.
    """
    part = module.get_submodule(path)
    inside = {other: module.get_submodule(other) for other in cuts if other.rpartition(".")[0] == path}
    widths = [_features(layer)[0] for other, layer in inside.items() if cuts[other] == "inputs"]
    given = [_features(layer)[1] for other, layer in inside.items() if cuts[other] == "outputs"]
    head_dim = getattr(part, "head_dim", None)
    grain = head_dim if isinstance(head_dim, int) else 1
    if not widths or max(given) > max(widths) or any(size % (grain * num_pieces) for size in given):
        return False
    owned = {id(parameter) for layer in inside.values() for parameter in layer.parameters()}
    return all(id(parameter) in owned for parameter in part.parameters())


def _features(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a layer, cut or not."""
    weight: Any = layer.weight
    return (weight.shape[0], weight.shape[1]) if _output_dim(layer) else (weight.shape[1], weight.shape[0])


# -- what a cut layer takes and gives --------------------------------------------------------------------------------------


def _enter(
    mesh: DeviceMesh, cut: Cut, layer: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A plain input is whole; it, and one that arrives in pieces, is laid out as the layer needs it."""
    let_plain_tensors_be_whole()
    given = args[0] if args else kwargs["input"]
    if not isinstance(given, DTensor):
        given = DTensor.from_local(given, mesh, [Replicate()] * mesh.ndim, run_check=False)
    wanted: Placement = Shard(-1) if cut == "inputs" else Replicate()
    given = given.redistribute(placements=[wanted, *given.placements[1:]])
    return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "input": given})


def _stay_cut(layer: nn.Module, args: Any, output: Any) -> Any:
    return output.redistribute(placements=[Shard(-1), *output.placements[1:]])


def _leave(layer: nn.Module, args: Any, output: Any) -> Any:
    if len(output.placements) > 1:  # parts of sequences: all of the model is in DTensors
        return output.redistribute(placements=[Replicate(), *output.placements[1:]])
    return _Whole.apply(output)


class _Whole(torch.autograd.Function):
    """A DTensor as a whole plain tensor. `to_local` would give a view, on which FSDP2 loses its hooks when user code writes to it."""

    @staticmethod
    def forward(ctx: Any, pieces: Any) -> torch.Tensor:
        ctx.mesh, (ctx.placement,) = pieces.device_mesh, pieces.placements
        return pieces.redistribute(placements=[Replicate()]).to_local()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        placement = ctx.placement if isinstance(ctx.placement, Shard) else Replicate()
        return DTensor.from_local(grad, ctx.mesh, [Replicate()], run_check=False).redistribute(placements=[placement])


def let_plain_tensors_be_whole() -> None:
    """From now on, in this thread, a plain tensor beside a DTensor counts as whole: masks, rotary tables, scalars.

    torch keeps the flag by thread, and `implicit_replication` takes it back at its end: it is set wherever such a region is entered, and
    before a backward pass, all of whose threads take it over from the one that begins it.
    """
    DTensor._op_dispatcher._allow_implicit_replication = True

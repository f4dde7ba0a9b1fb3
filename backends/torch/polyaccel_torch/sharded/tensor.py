"""Layers split over the `tensor` axis: from specs to torch's styles, so that what is a plain tensor is the same on all of its processes.

Between a layer whose outputs are cut and one whose inputs are, activations are DTensors: torch knows that they are pieces, and an
operation that needs more than a piece gathers it. Everywhere else they are whole, and the numbers are those of one device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from polyaccel_torch.sharded.attention import split_attention_by_heads
from polyaccel_torch.sharded.mesh import local_of, with_layout_of
from polyaccel_torch.sharded.specs import Spec, Specs, without_tensor

_for_this_process = ExitStack()


def split_layers(module: nn.Module, mesh: DeviceMesh, specs: Specs, *, prefix: str = "") -> None:
    """Cut the Linear layers of a module, in place, as specs say; `prefix` is the module's place in the model that has the specs.

    Parameters must be the same on all processes of the axis, or on the meta device.
    """
    styles = styles_of(module, specs, prefix=prefix)
    if not styles:
        return
    _let_plain_tensors_be_whole()
    split_attention_by_heads()
    parallelize_module(module, mesh, styles, src_data_rank=None)
    for name in styles:
        _let_go_of_the_rest(module.get_submodule(name))


def _let_go_of_the_rest(layer: nn.Module) -> None:
    """A piece along dim 0 is a view of the whole parameter, which would stay in memory for it."""
    for key, parameter in list(layer.named_parameters(recurse=False)):
        local = local_of(parameter.detach())
        if local.untyped_storage().nbytes() > local.numel() * local.element_size():
            own = with_layout_of(local.clone(), parameter)
            layer.register_parameter(key, nn.Parameter(own, requires_grad=parameter.requires_grad))


def splittable(module: nn.Module, specs: Specs) -> tuple[dict[str, Spec], list[str]]:
    """Specs that torch can carry out, and the names of parameters that stay whole along the tensor axis although theirs cut them.

    Those of nn.Linear and nn.Embedding can be. Subclasses may be used without being called (the out_proj of nn.MultiheadAttention), where
    no hook sees their input; where two layers share a parameter, each would get pieces of its own. A bias goes with its weight.
    """
    users = Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)
    kept: dict[str, Spec] = dict(specs)
    whole: list[str] = []
    for name, parameter in module.named_parameters():
        if "tensor" not in specs[name]:
            continue
        layer, _, key = name.rpartition(".")
        weight = specs.get(f"{layer}.weight", ())
        is_alone = users[id(parameter)] == 1 and type(module.get_submodule(layer)) in (nn.Linear, nn.Embedding)
        if not is_alone or (key == "bias" and (not weight or weight[0] != "tensor")):
            kept[name] = without_tensor(specs[name])
            whole.append(name)
    return kept, whole


def styles_of(module: nn.Module, specs: Specs, *, prefix: str = "") -> dict[str, ParallelStyle]:
    """The style of every layer that is cut, by its name in `module`."""
    cuts = dict(_cut_layers(module, specs, prefix))
    styles: dict[str, ParallelStyle] = {}
    for name, cut in cuts.items():
        if cut in ("inputs", "rows"):
            # A whole input is cut here, and one that arrives in pieces stays as it is.
            styles[name] = RowwiseParallel(input_layouts=Replicate())
        elif cut == "outputs" and _feeds_its_siblings(module, name, cuts):
            styles[name] = ColwiseParallel(use_local_output=False)
        else:
            styles[name] = ColwiseParallel(output_layouts=Replicate())
    return styles


def _cut_layers(module: nn.Module, specs: Specs, prefix: str) -> Iterator[tuple[str, str]]:
    for name, part in module.named_modules():
        spec = specs.get(f"{prefix}{name}.weight", ())
        if "tensor" in spec and isinstance(part, nn.Embedding):
            yield name, "rows" if spec[0] == "tensor" else "columns"
        elif "tensor" in spec:
            yield name, "outputs" if spec[0] == "tensor" else "inputs"


def _feeds_its_siblings(module: nn.Module, name: str, cuts: dict[str, str]) -> bool:
    """Whether the layer stands in a part (an attention, an MLP) that ends in a layer of cut inputs and has no parameters beside its
    cut layers: a plain parameter that meets pieces would get pieces of a gradient."""
    path = name.rpartition(".")[0]
    inside = {other for other in cuts if other.rpartition(".")[0] == path}
    if not any(cuts[other] == "inputs" for other in inside):
        return False
    dot = f"{path}." if path else ""
    owned = {f"{other}.{key}" for other in inside for key, _ in module.get_submodule(other).named_parameters()}
    return all(f"{dot}{key}" in owned for key, _ in module.get_submodule(path).named_parameters())


def _let_plain_tensors_be_whole() -> None:
    """From now on, in this process, a plain tensor beside a DTensor counts as whole: masks, rotary tables, scalars, backward too."""
    _for_this_process.close()
    _for_this_process.enter_context(implicit_replication())

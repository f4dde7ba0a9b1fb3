"""Runs a function over nn.Modules under PyTorch's tracer, forward and backward; private APIs of torch that this takes are here.

Nothing is computed and no parameter is read: parameters, buffers and inputs are fake tensors made from shape, dtype and requires_grad.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.compiler
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from polyaccel.errors import PolyaccelError, PrepareError

from .capture_errors import explained
from .captured_gradients import gradients
from .decompositions import capture_decompositions
from .fixed_shapes import FixedShapes
from .graphs import TensorSpec
from .host_random import host_random_state, refuse_host_random
from .module_state import ModuleState, collect_state, filled
from .raising_branches import poisoned
from .recomputation import hold_back_recomputation
from .sources import SourceNotes
from .upstream_dtypes import correct_dtypes

CAPTURE_LOCK = threading.RLock()  # capture exchanges module slots and process-wide flags
Kind = Literal["training", "forward", "vjp"]


@contextlib.contextmanager
def capturing_flags() -> Iterator[None]:
    """Process-wide flags while a function is traced, and the CPU generator's state, in which random draws are numbered."""
    generator = torch.default_generator
    generator_state = generator.get_state()
    compiling = torch.compiler._is_compiling_flag
    mkldnn = torch._C._get_mkldnn_enabled()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # Libraries skip value-dependent branches under this flag (attention masks in transformers).
    torch.compiler._is_compiling_flag = True
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operation per encoder layer otherwise
    torch._C._set_mkldnn_enabled(False)  # one opaque operation per recurrent layer otherwise
    generator.manual_seed(0)
    try:
        yield
    finally:
        generator.set_state(generator_state)
        torch._C._set_mkldnn_enabled(mkldnn)
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.compiler._is_compiling_flag = compiling


@dataclass(slots=True)
class Traced:
    """The traced graph; `wanted` are parameter names and input indices, `grads` their gradients' nodes."""

    module: GraphModule
    state: ModuleState
    inputs: dict[str, Node]
    outputs: list[Node]
    wanted: list[str | int]
    grads: list[Node | None]
    written: list[tuple[str, Node]]
    mutated_inputs: tuple[int, ...]


@dataclass(slots=True)
class _Layout:
    """What the flat outputs of the traced function are; filled while it runs."""

    num_outputs: int = 0
    wanted: list[str | int] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    written_after: list[str] = field(default_factory=list)
    mutated_inputs: list[int] = field(default_factory=list)


def trace(
    function: Callable[..., Any],
    modules: Mapping[str, nn.Module],
    inputs: Sequence[TensorSpec],
    autocast: torch.dtype | None,
    kind: Kind,
) -> Traced:
    """Run `function` once on fake tensors. Raises PrepareError where it is no fixed program, else torch's error with a note."""
    with CAPTURE_LOCK:
        state = collect_state(modules)
        layout = _Layout()

        def traced(*flat: torch.Tensor) -> list[torch.Tensor | None]:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)):
                return _run(function, state, inputs, flat, autocast, kind, layout)

        def traced_graph() -> GraphModule:
            specs = [*state.specs.values(), *inputs]
            with capturing_flags(), FakeTensorMode(allow_non_fake_inputs=True):
                fakes = [torch.empty(spec.shape, dtype=spec.dtype, device="cpu") for spec in specs]
                try:
                    with enable_python_dispatcher(), FunctionalTensorMode():
                        return make_fx(traced, decomposition_table=capture_decompositions())(*fakes)
                except PolyaccelError:
                    raise
                except Exception as error:
                    raise explained(error, state.paths) from error

        drawn = host_random_state()
        module = traced_graph()
        if host_random_state() != drawn:
            refuse_host_random(
                module, traced_graph, ", ".join(type(root).__name__ for root in modules.values()) or "the function"
            )
    correct_dtypes(module.graph)
    hold_back_recomputation(module.graph)
    nodes = list(module.graph.nodes)
    results = list(nodes[-1].args[0])
    outputs, rest = results[: layout.num_outputs], results[layout.num_outputs :]
    written, rest = rest[: len(layout.written)], rest[len(layout.written) :]
    grads, after = rest[: len(layout.wanted)], rest[len(layout.wanted) :]
    _refuse_late_writes(dict(zip(layout.written, written)), dict(zip(layout.written_after, after)))
    names = [*state.specs, *(f"input {index}" for index in range(len(inputs)))]
    return Traced(
        module=module,
        state=state,
        inputs=dict(zip(names, (node for node in nodes if node.op == "placeholder"), strict=True)),
        outputs=outputs,
        wanted=layout.wanted,
        grads=grads,
        written=list(zip(layout.written, written, strict=True)),
        mutated_inputs=tuple(layout.mutated_inputs),
    )


def _refuse_late_writes(forward: Mapping[str, Node], backward: Mapping[str, Node]) -> None:
    """The two halves of a vjp run apart, and only the forward hands out buffers."""
    for name, node in backward.items():
        if name not in forward or _root(node) is not _root(forward[name]):
            raise PrepareError(
                f"the backward pass writes to {name} (a checkpointed module with running statistics does)",
                "pass the loss function itself, `accelerator.backward(loss_fn, batch)`, or do not checkpoint that module",
            )


def _root(node: Node) -> Node:
    same = (torch.ops.aten.alias.default, torch.ops.aten.detach.default, torch.ops.aten.clone.default)
    while node.target in same and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _run(
    function: Callable[..., Any],
    state: ModuleState,
    inputs: Sequence[TensorSpec],
    flat: Sequence[torch.Tensor],
    autocast: torch.dtype | None,
    kind: Kind,
    layout: _Layout,
) -> list[torch.Tensor | None]:
    """Runs once, under the tracer: forward, backward and what was written, as one flat list."""
    specs = [*state.specs.values(), *inputs]
    leaves: list[torch.Tensor] = [FunctionalTensor.to_functional(fake) for fake in flat]
    if kind != "forward":
        for leaf, spec in zip(leaves, specs, strict=True):
            leaf.requires_grad_(spec.requires_grad)
    held = dict(zip(state.specs, leaves, strict=False))
    arguments = leaves[len(held) :]
    proxies = get_proxy_mode()
    assert proxies is not None
    notes = SourceNotes(proxies.tracer.graph, state.paths)
    gradients_on = torch.no_grad() if kind == "forward" else torch.enable_grad()
    mixed = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)
    with notes, filled(state, held), FixedShapes() as forms:
        with gradients_on, mixed:
            outputs = poisoned(_outputs(function(*arguments), kind), forms.raises)
        layout.num_outputs = len(outputs)
        reassigned = _reassigned(state, held)
        grads: list[torch.Tensor | None] = []
        written = _written(state, held, reassigned)
        if kind != "forward":
            layout.wanted, wanted = _wanted(state, inputs, leaves)
            grads = gradients(outputs, wanted, is_loss=kind == "training")
            after = _written(state, held, reassigned)  # a checkpointed BatchNorm writes once more in the backward
            if kind == "training":
                written = after
            else:
                layout.written_after = list(after)
                grads += after.values()
    layout.written = list(written)
    layout.mutated_inputs = [index for index, leaf in enumerate(arguments) if _is_written(leaf)]
    return [_plain(tensor) for tensor in (*(out.detach() for out in outputs), *written.values(), *grads)]


def _written(
    state: ModuleState, held: Mapping[str, torch.Tensor], reassigned: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What the tensors that were written hold now; the copies do not follow later writes."""
    found: dict[str, torch.Tensor] = {}
    for name, leaf in held.items():
        value = reassigned.get(name, leaf)
        if value is not leaf or _is_written(leaf):
            found[name] = value.detach().to(state.specs[name].dtype).clone()
    return found


def _outputs(returned: Any, kind: Kind) -> list[torch.Tensor]:
    if kind != "training":
        return list(returned)
    loss, aux = returned
    if not isinstance(loss, torch.Tensor):
        raise PrepareError(f"the loss is a {type(loss).__name__}, not a tensor", "return the loss tensor itself")
    if loss.numel() != 1:
        raise PrepareError(
            f"the loss has shape {tuple(loss.shape)}; a gradient needs a scalar",
            "reduce it, for example with loss.mean()",
        )
    if not loss.requires_grad:
        raise PrepareError(
            "the loss depends on no trainable parameter of the prepared models",
            "compute it from the prepared model's output, outside torch.no_grad(), and leave some requires_grad on",
        )
    return [loss, *(value.detach() for value in aux)]


def _wanted(
    state: ModuleState, inputs: Sequence[TensorSpec], leaves: Sequence[torch.Tensor]
) -> tuple[list[str | int], list[torch.Tensor]]:
    labels: list[str | int] = [*state.specs, *range(len(inputs))]
    chosen = [(label, leaf) for label, leaf in zip(labels, leaves, strict=True) if leaf.requires_grad and leaf.is_leaf]
    return [label for label, _ in chosen], [leaf for _, leaf in chosen]


def _reassigned(state: ModuleState, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Slots that the function filled anew (`self.running = ...` on a registered buffer) instead of writing in place."""
    found: dict[str, torch.Tensor] = {}
    for place in state.places:
        value = place.holder.get(place.key)
        if isinstance(value, torch.Tensor) and value is not held[place.name]:
            spec = state.specs[place.name]
            if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
                raise PrepareError(
                    f"the buffer {place.name} changes from {spec.dtype}{list(spec.shape)} to {value.dtype}{list(value.shape)}",
                    "keep shape and dtype of registered buffers; where the first forward alone changes them, run the model once on a"
                    " real batch before it is prepared",
                )
            found[place.name] = value
    return found


def _is_written(leaf: torch.Tensor) -> bool:
    assert isinstance(leaf, FunctionalTensor)
    return bool(torch._functionalize_has_data_mutation(leaf.elem))  # type: ignore[attr-defined]


def _plain(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if isinstance(tensor, FunctionalTensor):
        torch._sync(tensor)
        return torch._from_functional_tensor(tensor.elem)
    return tensor

"""PyTorch turns functions over nn.Modules into functional graphs of ATen operations; every private API of torch that this takes is here.

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
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from polyaccel.errors import PolyaccelError, PrepareError

from .decompositions import capture_decompositions
from .programs import ArraySpec, Program, compile_program, refuse_missing
from .recomputation import hold_back_recomputation
from .sources import SourceNotes, source_of_error

_COTANGENT = "polyaccel_cotangent"
_LOCK = threading.RLock()  # capture exchanges module slots and process-wide flags


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before there is one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class TrainingGraph:
    """Forward, loss and backward of one step as a Program; run it with `replay.run_training`.

    `state_names`: every parameter and buffer it takes, in order, with whether it is a parameter. `grad_names`: the parameters
    that the loss reaches. `buffer_names`: the buffers (and parameters, if the function writes to one) that it changes.
    `tied`: every further name of a shared parameter or buffer -> the one name it is kept under.
    `output_specs`: loss, then aux. `mutated_inputs`: the inputs that the function wrote to in place.
    """

    program: Program
    state_names: tuple[tuple[str, bool], ...]
    grad_names: tuple[str, ...]
    buffer_names: tuple[str, ...]
    tied: Mapping[str, str]
    num_aux: int
    output_specs: tuple[ArraySpec, ...]
    mutated_inputs: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ForwardGraph:
    """A function without gradients as a Program; run it with `replay.run_forward`. Fields as in TrainingGraph."""

    program: Program
    state_names: tuple[tuple[str, bool], ...]
    buffer_names: tuple[str, ...]
    tied: Mapping[str, str]
    output_specs: tuple[ArraySpec, ...]
    mutated_inputs: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class VjpGraph:
    """A function and its vector-Jacobian product as two Programs; run them with `replay.run_vjp_forward` and `run_vjp_backward`.

    `differentiable`: for each output, whether it has a gradient. `input_grads`: for each input, whether it gets one. Other
    fields as in TrainingGraph.
    """

    forward: Program
    backward: Program
    num_residuals: int
    state_names: tuple[tuple[str, bool], ...]
    grad_names: tuple[str, ...]
    buffer_names: tuple[str, ...]
    tied: Mapping[str, str]
    output_specs: tuple[ArraySpec, ...]
    differentiable: tuple[bool, ...]
    input_grads: tuple[bool, ...]
    mutated_inputs: tuple[int, ...]


def capture_training(
    function: Callable[..., tuple[torch.Tensor, Sequence[torch.Tensor]]],
    modules: Mapping[str, nn.Module],
    inputs: Sequence[TensorSpec],
    *,
    autocast: torch.dtype | None,
) -> TrainingGraph:
    """The step `function(*inputs) -> (scalar loss, auxiliary tensors)`, which closes over `modules`, with its gradients.

    Auxiliary tensors come out detached. With `autocast` the function runs under `torch.autocast("cpu", autocast)`.

    Raises:
        PrepareError: control flow or shapes depend on values; the loss is no scalar or reaches no parameter.
        UnsupportedError: operations without lowering, all of them at once.
    """
    traced = _trace(function, modules, inputs, autocast, "training")
    grads = [(name, node) for name, node in zip(traced.wanted, traced.grads, strict=True) if node is not None]
    nodes = [*traced.outputs, *(node for _, node in grads), *(node for _, node in traced.written)]
    refuse_missing(traced.module.graph, nodes)
    program = compile_program(traced.module, traced.inputs, nodes)
    return TrainingGraph(
        program=program,
        state_names=traced.state.names,
        grad_names=tuple(str(name) for name, _ in grads),
        buffer_names=tuple(name for name, _ in traced.written),
        tied=traced.state.tied,
        num_aux=len(traced.outputs) - 1,
        output_specs=_specs(program, len(traced.outputs)),
        mutated_inputs=traced.mutated_inputs,
    )


def capture_forward(
    function: Callable[..., Sequence[torch.Tensor]],
    modules: Mapping[str, nn.Module],
    inputs: Sequence[TensorSpec],
    *,
    autocast: torch.dtype | None,
) -> ForwardGraph:
    """`function(*inputs) -> tensors` under `torch.no_grad()`. Raises as `capture_training`."""
    traced = _trace(function, modules, inputs, autocast, "forward")
    nodes = [*traced.outputs, *(node for _, node in traced.written)]
    refuse_missing(traced.module.graph, nodes)
    program = compile_program(traced.module, traced.inputs, nodes)
    return ForwardGraph(
        program=program,
        state_names=traced.state.names,
        buffer_names=tuple(name for name, _ in traced.written),
        tied=traced.state.tied,
        output_specs=_specs(program, len(traced.outputs)),
        mutated_inputs=traced.mutated_inputs,
    )


def capture_vjp(
    function: Callable[..., Sequence[torch.Tensor]],
    modules: Mapping[str, nn.Module],
    inputs: Sequence[TensorSpec],
    *,
    autocast: torch.dtype | None,
) -> VjpGraph:
    """`function(*inputs) -> tensors` as two halves: forward, and from the outputs' cotangents to parameter and input gradients.

    Raises as `capture_training`.
    """
    traced = _trace(function, modules, inputs, autocast, "vjp")
    graph = traced.module.graph
    seeds = {node.meta[_COTANGENT]: node for node in graph.nodes if _COTANGENT in node.meta}
    differentiable = tuple(index in seeds for index in range(len(traced.outputs)))
    params = [(n, node) for n, node in zip(traced.wanted, traced.grads, strict=True) if isinstance(n, str) and node]
    by_input = {n: node for n, node in zip(traced.wanted, traced.grads, strict=True) if isinstance(n, int)}
    gradients = [*(node for _, node in params), *(by_input.get(index) for index in range(len(inputs)))]

    written = [node for _, node in traced.written]
    refuse_missing(graph, [*traced.outputs, *written, *gradients])

    # Everything traced before the first cotangent is the forward; what the backward takes from it are the residuals.
    forward_nodes: set[Node] = set()
    for node in graph.nodes:
        if _COTANGENT in node.meta:
            break
        if node.op != "get_attr":
            forward_nodes.add(node)
    residuals = _frontier(gradients, forward_nodes, set(seeds.values()))
    forward = compile_program(traced.module, traced.inputs, [*traced.outputs, *written, *residuals])
    given = {f"residual {index}": node for index, node in enumerate(residuals)}
    given |= {f"the cotangent of output {index}": seeds[index] for index in sorted(seeds)}
    backward = compile_program(traced.module, given, gradients)
    return VjpGraph(
        forward=forward,
        backward=backward,
        num_residuals=len(residuals),
        state_names=traced.state.names,
        grad_names=tuple(str(name) for name, _ in params),
        buffer_names=tuple(name for name, _ in traced.written),
        tied=traced.state.tied,
        output_specs=_specs(forward, len(traced.outputs)),
        differentiable=differentiable,
        input_grads=tuple(by_input.get(index) is not None for index in range(len(inputs))),
        mutated_inputs=traced.mutated_inputs,
    )


def _specs(program: Program, count: int) -> tuple[ArraySpec, ...]:
    return tuple(spec for spec in program.output_specs[:count] if spec is not None)


def _frontier(targets: Sequence[Node | None], forward: set[Node], given: set[Node]) -> list[Node]:
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    waiting = [node for node in targets if node is not None]
    while waiting:
        node = waiting.pop()
        if node in seen or node in given:
            continue
        seen.add(node)
        if node in forward:
            found[node] = None
        else:
            waiting.extend(node.all_input_nodes)
    return list(found)


@dataclass(frozen=True, slots=True)
class _Place:
    holder: dict[str, Any]
    key: str
    name: str


@dataclass(slots=True)
class _State:
    """Every parameter and buffer slot of the modules; tensors that fill several slots are kept under the first name."""

    specs: dict[str, TensorSpec] = field(default_factory=dict)
    is_param: dict[str, bool] = field(default_factory=dict)
    places: list[_Place] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    submodules: list[nn.Module] = field(default_factory=list)
    paths: dict[int, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[tuple[str, bool], ...]:
        return tuple(self.is_param.items())


def _collect(modules: Mapping[str, nn.Module]) -> _State:
    state = _State()
    first: dict[int, str] = {}
    for key, root in modules.items():
        for path, module in root.named_modules(prefix=key, remove_duplicate=False):
            is_new = id(module) not in state.paths
            if is_new:
                state.paths[id(module)] = path
                state.submodules.append(module)
            for holder, is_param in ((module._parameters, True), (module._buffers, False)):
                for slot, tensor in holder.items():
                    if tensor is None:
                        continue
                    full = f"{path}.{slot}"
                    if nn.parameter.is_lazy(tensor):
                        raise PrepareError(
                            f"{full} of the lazy module {type(module).__name__} has no shape yet",
                            "run the model once on a real batch before it is prepared",
                        )
                    name = first.setdefault(id(tensor), full)
                    if name != full:
                        state.tied[full] = name
                    else:
                        requires_grad = is_param and tensor.requires_grad
                        state.specs[name] = TensorSpec(tuple(tensor.shape), tensor.dtype, requires_grad)
                        state.is_param[name] = is_param
                    if is_new:
                        state.places.append(_Place(holder, slot, name))
    return state


@contextlib.contextmanager
def _filled(state: _State, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The modules' slots hold `tensors`; afterwards they, and every attribute that the function set, are as before."""
    attributes = [(module, dict(module.__dict__)) for module in state.submodules]
    holders = {id(place.holder): place.holder for place in state.places}
    for module in state.submodules:
        holders.update({id(holder): holder for holder in (module._parameters, module._buffers)})
    contents = [(holder, dict(holder)) for holder in holders.values()]
    try:
        for place in state.places:
            place.holder[place.key] = tensors[place.name]
        for module in state.submodules:
            if isinstance(module, nn.RNNBase):  # it hands these to the kernel and not its parameters
                module.__dict__["_flat_weights"] = [getattr(module, name, None) for name in module._flat_weights_names]
        yield
    finally:
        for holder, saved in contents:
            holder.clear()
            holder.update(saved)
        for module, attributes_before in attributes:
            module.__dict__.clear()
            module.__dict__.update(attributes_before)


@contextlib.contextmanager
def _capturing() -> Iterator[None]:
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
class _Traced:
    """The traced graph; `wanted` are parameter names and input indices, `grads` their gradients' nodes."""

    module: GraphModule
    state: _State
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


_Kind = Literal["training", "forward", "vjp"]


def _trace(
    function: Callable[..., Any],
    modules: Mapping[str, nn.Module],
    inputs: Sequence[TensorSpec],
    autocast: torch.dtype | None,
    kind: _Kind,
) -> _Traced:
    with _LOCK:
        state = _collect(modules)
        layout = _Layout()

        def traced(*flat: torch.Tensor) -> list[torch.Tensor | None]:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)):
                return _run(function, state, inputs, flat, autocast, kind, layout)

        specs = [*state.specs.values(), *inputs]
        fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        with _capturing(), fake_mode:
            fakes = [torch.empty(spec.shape, dtype=spec.dtype, device="cpu") for spec in specs]
            try:
                with enable_python_dispatcher(), FunctionalTensorMode():
                    module = make_fx(traced, decomposition_table=capture_decompositions())(*fakes)
            except PolyaccelError:
                raise
            except Exception as error:
                raise _explained(error, state.paths) from error
    hold_back_recomputation(module.graph)
    nodes = list(module.graph.nodes)
    results = list(nodes[-1].args[0])
    outputs, rest = results[: layout.num_outputs], results[layout.num_outputs :]
    written, rest = rest[: len(layout.written)], rest[len(layout.written) :]
    grads, after = rest[: len(layout.wanted)], rest[len(layout.wanted) :]
    _refuse_late_writes(dict(zip(layout.written, written)), dict(zip(layout.written_after, after)))
    names = [*state.specs, *(f"input {index}" for index in range(len(inputs)))]
    return _Traced(
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
    state: _State,
    inputs: Sequence[TensorSpec],
    flat: Sequence[torch.Tensor],
    autocast: torch.dtype | None,
    kind: _Kind,
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
    with notes, _filled(state, held):
        with gradients_on, mixed:
            outputs = _outputs(function(*arguments), kind)
        layout.num_outputs = len(outputs)
        reassigned = _reassigned(state, held)
        grads: list[torch.Tensor | None] = []
        written = _written(state, held, reassigned)
        if kind != "forward":
            layout.wanted, wanted = _wanted(state, inputs, leaves)
            grads = _gradients(outputs, wanted, kind)
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
    state: _State, held: Mapping[str, torch.Tensor], reassigned: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What the tensors that were written hold now; the copies do not follow later writes."""
    found: dict[str, torch.Tensor] = {}
    for name, leaf in held.items():
        value = reassigned.get(name, leaf)
        if value is not leaf or _is_written(leaf):
            found[name] = value.detach().to(state.specs[name].dtype).clone()
    return found


def _outputs(returned: Any, kind: _Kind) -> list[torch.Tensor]:
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
    state: _State, inputs: Sequence[TensorSpec], leaves: Sequence[torch.Tensor]
) -> tuple[list[str | int], list[torch.Tensor]]:
    labels: list[str | int] = [*state.specs, *range(len(inputs))]
    chosen = [(label, leaf) for label, leaf in zip(labels, leaves, strict=True) if leaf.requires_grad and leaf.is_leaf]
    return [label for label, _ in chosen], [leaf for _, leaf in chosen]


def _gradients(
    outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], kind: _Kind
) -> list[torch.Tensor | None]:
    roots = [(index, out) for index, out in enumerate(outputs) if out.requires_grad]
    if not roots or not wanted:
        return [None] * len(wanted)
    if kind == "training":
        roots = roots[:1]
    seeds = None if kind == "training" else [_cotangent(index, out) for index, out in roots]
    heads = [out for _, out in roots]
    nodes = _autograd_nodes(heads)
    if not any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in nodes):
        return list(torch.autograd.grad(heads, wanted, seeds, allow_unused=True))
    # A custom Function may run a backward of its own (reentrant checkpointing), whose gradients reach `.grad` and nothing else.
    leaves = [node.variable for node in nodes if hasattr(node, "variable")]
    before = [(leaf, leaf.grad) for leaf in leaves if not any(leaf is tensor for tensor in wanted)]
    try:
        torch.autograd.backward(heads, seeds)
        return [tensor.grad for tensor in wanted]
    finally:
        for leaf, grad in before:
            leaf.grad = grad


def _autograd_nodes(heads: Sequence[torch.Tensor]) -> list[Any]:
    found: dict[Any, None] = {}
    waiting: list[Any] = [head.grad_fn for head in heads]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found[node] = None
        waiting.extend(following for following, _ in node.next_functions)
    return list(found)


def _cotangent(index: int, output: torch.Tensor) -> torch.Tensor:
    """A tensor whose node stands for the cotangent of an output: `capture_vjp` makes it an input of the backward half."""
    seed = torch.empty(tuple(output.shape), dtype=output.dtype, device="cpu")
    proxies = get_proxy_mode()
    assert proxies is not None
    node = next(iter(reversed(proxies.tracer.graph.nodes)))
    node.meta[_COTANGENT] = index
    return seed


def _reassigned(state: _State, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Slots that the function filled anew (`self.running = ...` on a registered buffer) instead of writing in place."""
    found: dict[str, torch.Tensor] = {}
    for place in state.places:
        value = place.holder.get(place.key)
        if isinstance(value, torch.Tensor) and value is not held[place.name]:
            spec = state.specs[place.name]
            if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
                raise PrepareError(
                    f"the buffer {place.name} changes from {spec.dtype}{list(spec.shape)} to {value.dtype}{list(value.shape)}",
                    "keep shape and dtype of registered buffers, or use the torch backend",
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


def _explained(error: Exception, paths: Mapping[int, str]) -> Exception:
    """Our error where the values of tensors decide what is computed; otherwise the original one with the place in a note."""
    source = source_of_error(error, paths)
    hint = "express the branch with torch.where, move it out of the model, or use the torch backend"
    if isinstance(error, DataDependentOutputException):
        return PrepareError(
            f"Python code uses the value of a tensor ({error.func}), so the model is no fixed program: {source}", hint
        )
    if isinstance(error, DynamicOutputShapeException):
        return PrepareError(
            f"the shape of the result of {error.func} depends on values, so the model is no fixed program: {source}",
            "use a mask with torch.where instead of selecting elements, move it out of the model, or use the torch backend",
        )
    if isinstance(error, GuardOnDataDependentSymNode | UnsupportedOperatorException):
        return PrepareError(f"PyTorch cannot capture this: {error}; {source}", hint)
    error.add_note(f"while the model was captured: {source}")
    return error

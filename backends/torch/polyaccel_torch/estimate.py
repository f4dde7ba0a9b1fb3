"""The memory that a torch module needs, counted on tensors without values: `polyaccel estimate-memory`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # public in name alone, and what torch.compile stands on

from polyaccel.errors import ConfigError, PrepareError, UnsupportedError, nearest
from polyaccel.estimates import TRAINING_PRECISIONS, Answer, InputShape, Part, Question
from polyaccel_torch.big_models.empty import init_empty_weights
from polyaccel_torch.big_models.layers import get_max_layer_size
from polyaccel_torch.big_models.sizes import compute_module_sizes
from polyaccel_torch.big_models.tensors import like, places

_DEFAULT_LENGTH = 512
# Classes of transformers that compute a loss from labels of the inputs' shape.
_WITH_LABELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")


def answer(question: Question) -> Answer:
    """Count it. Raises ConfigError for an unknown optimizer, PrepareError for a factory that makes no module."""
    notes: list[str] = []
    model = _model(question)
    model.train()
    inputs, call = _inputs(question, model, notes)
    optimizer_bytes = _optimizer_bytes(model, question)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    parameters = tuple(_part(name, value, embeddings) for name, value in model.named_parameters())
    buffers = tuple(_part(name, value, embeddings, is_matrix=False) for name, value in model.named_buffers())
    layers = _layers(model, {part.name: part for part in (*parameters, *buffers)})
    wanted = [precision for precision in question.precisions if precision in TRAINING_PRECISIONS]
    activations = _activations(model, call, wanted, notes) if call is not None else {}
    if activations:
        notes.append(
            "activations: what autograd keeps of a forward for the backward, traced with the CPU's operations; a backward needs"
            " some more for a moment, and other kernels may keep less"
        )
    return Answer(
        dialect="torch",
        parameters=parameters,
        buffers=buffers,
        trainable_count=sum(parameter.numel() for parameter in trained),
        trainable_bytes=sum(parameter.numel() * parameter.dtype.itemsize for parameter in trained),
        optimizer_bytes=optimizer_bytes,
        layers=layers,
        activations=activations,
        inputs=inputs if activations else (),
        notes=notes,
    )


def _model(question: Question) -> nn.Module:
    with init_empty_weights():
        if question.config_folder is not None:
            return _transformer(question.config_folder)
        made = question.factory()
    if not isinstance(made, nn.Module):
        raise PrepareError(
            f"{question.factory!r} made a {type(made).__name__}, and no torch module", "return the module, and it alone"
        )
    return made


def _transformer(folder: str) -> nn.Module:
    try:
        transformers: Any = import_module(
            "transformers"
        )  # by name: the adapter does not build on it, the user's question does
    except ImportError as error:
        raise UnsupportedError(
            f"{folder} is a transformers configuration, and transformers is not installed", "pip install transformers"
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} cannot be read as a configuration: {error}", "check its model_type") from error
    names = getattr(config, "architectures", None) or []
    kind = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    # Trained in mixed precision, parameters are float32, whatever the checkpoint of the configuration was saved in.
    config.dtype = torch.float32
    model: nn.Module = transformers.AutoModel.from_config(config) if kind is None else kind(config)
    model.tie_weights()  # type: ignore[operator]
    return model


def _part(name: str, tensor: torch.Tensor, embeddings: set[int], is_matrix: bool = True) -> Part:
    is_quantized = is_matrix and tensor.dim() >= 2 and tensor.is_floating_point() and id(tensor) not in embeddings
    count = tensor.numel()
    return Part(name, count, count if is_quantized else 0, count * tensor.dtype.itemsize, tensor.is_floating_point())


def _layers(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, tuple[Part, ...]]:
    """The modules that are not split (those that a transformers model names, and those without children), with their tensors."""
    whole: Any = getattr(model, "_no_split_modules", None) or ()
    sizes = compute_module_sizes(model)
    found: dict[str, tuple[Part, ...]] = {}
    for name, module in model.named_modules():
        is_layer = not any(module.children()) or type(module).__name__ in whole
        if is_layer and not any(name.startswith(f"{layer}.") for layer in found):
            inside = name + "." if name else ""
            found[name] = tuple(part for key, part in parts.items() if key.startswith(inside))
    largest, names = get_max_layer_size([("", model)], sizes, whole)
    assert not names or max(sum(part.bytes for part in layer) for layer in found.values()) == largest
    return found


def _inputs(
    question: Question, model: nn.Module, notes: list[str]
) -> tuple[tuple[InputShape, ...], Mapping[str, InputShape] | tuple[InputShape, ...] | None]:
    """What is fed: for the report, and for the call."""
    if question.inputs:
        return question.inputs, question.inputs
    config: Any = getattr(model, "config", None)
    main: Any = getattr(model, "main_input_name", None)
    if question.config_folder is None and (config is None or main is None):
        notes.append("activations are not counted: the module's inputs are not known (--input B,3,224,224)")
        return (), None
    if main == "input_ids":
        limit = getattr(config, "max_position_embeddings", None) or _DEFAULT_LENGTH
        length = question.sequence_length or min(_DEFAULT_LENGTH, limit)
        ids = InputShape((question.batch_size, length), "int64")
        named = {"input_ids": ids}
        if type(model).__name__.endswith(_WITH_LABELS):
            named["labels"] = ids
        return tuple(named.values()), named
    if main == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        side, channels = config.image_size, getattr(config, "num_channels", 3)
        shape = InputShape((question.batch_size, channels, side, side), "float32")
        return (shape,), {"pixel_values": shape}
    notes.append(f"activations are not counted: the shape of {main} is not known (--input SHAPE[:DTYPE])")
    return (), None


def _activations(
    model: nn.Module,
    call: Mapping[str, InputShape] | tuple[InputShape, ...],
    precisions: Iterable[str],
    notes: list[str],
) -> dict[str, int]:
    """Bytes that a forward keeps, by precision. Where it cannot be traced, a note says why."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    found: dict[str, int] = {}
    with mode:
        _make_fake(model, mode)
        args = tuple(map(_tensor, call)) if isinstance(call, tuple) else ()
        kwargs = {} if isinstance(call, tuple) else {name: _tensor(shape) for name, shape in call.items()}
        try:
            for precision in precisions:
                found[precision] = saved_bytes(model, args, kwargs, getattr(torch, precision))
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:  # needs values, or other inputs
            notes.append(
                f"activations are not counted: {type(model).__name__} cannot run on shapes alone, or not with these inputs"
                f" ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            )
            return {}
    return found


def saved_bytes(model: nn.Module, args: Any, kwargs: Mapping[str, Any], dtype: torch.dtype) -> int:
    """Bytes of memory that one forward in training keeps for its backward, without the model's own tensors and the inputs.

    Below float32 it runs under autocast. Each piece of memory counts once, in whole.
    """
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), *given)}
    kept: dict[int, torch.UntypedStorage] = {}  # held until all are counted: an address is used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    casting: Any = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), casting:
        outputs = model(*args, **kwargs)
    total = sum(storage.nbytes() for storage in kept.values())
    del outputs
    return total


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Tensors that say they are on the CPU, and have no memory there."""
    made: dict[int, torch.Tensor] = {}
    held = places(model)
    originals = [place.tensor for place in held.values()]  # alive, so that each keeps an identity of its own
    for place, old in zip(held.values(), originals, strict=True):
        if id(old) not in made:
            empty = torch.empty(old.shape, dtype=old.dtype) if old.is_meta else mode.from_tensor(old.detach())
            made[id(old)] = like(old, empty)
        place.put(made[id(old)])


def _tensor(shape: InputShape) -> torch.Tensor:
    return torch.empty(shape.shape, dtype=getattr(torch, shape.dtype))


def _optimizer_bytes(model: nn.Module, question: Question) -> int:
    """What the optimizer holds after its first step, from that step on tensors without memory."""
    known = {
        name.lower(): kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    name = question.optimizer.lower()
    if name not in known:
        if "8bit" in name or "4bit" in name:
            hint = "count adamw: 8-bit states are a quarter of its optimizer bytes, and the blocks' scales"
            raise UnsupportedError(f"--optimizer {question.optimizer} is none of torch.optim", hint)
        raise ConfigError(f"--optimizer {question.optimizer} is none of torch.optim", nearest(name, known))
    trained = [p for p in model.parameters() if p.requires_grad]
    stand_ins = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in trained]
    if not stand_ins:
        return 0
    try:
        optimizer = known[name](stand_ins, **{"lr": 1e-3, **question.optimizer_settings})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--optimizer {question.optimizer}: {error}", "see its arguments in torch.optim") from error
    for group in optimizer.param_groups:
        if "foreach" in group:
            group["foreach"] = False  # one at a time needs no kernel that meta tensors lack
    for stand_in in stand_ins:
        stand_in.grad = torch.empty_like(stand_in)
    try:
        optimizer.step()
    except RuntimeError:
        # Some read a number back in the update itself; their state is there before it.
        if any(not optimizer.state.get(stand_in) for stand_in in stand_ins):
            raise
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in _tensors(optimizer.state))


def _tensors(state: Mapping[Any, Mapping[str, Any]]) -> Iterator[torch.Tensor]:
    for values in state.values():
        yield from (value for value in values.values() if isinstance(value, torch.Tensor))

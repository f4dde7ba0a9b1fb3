"""Accelerate's settings for libraries that are no engine here: each says, where it is used, what to use instead."""

from __future__ import annotations

from typing import Any, NoReturn

from polyaccel.errors import UnsupportedError

__all__ = [
    "AORecipeKwargs",
    "DeepSpeedPlugin",
    "DeepSpeedSequenceParallelConfig",
    "FP8RecipeKwargs",
    "MSAMPRecipeKwargs",
    "MegatronLMPlugin",
    "TERecipeKwargs",
]

_SHARD = (
    "shard with the mesh instead: Accelerator(mesh={'fsdp': -1}) for ZeRO's stages 1 to 3, {'data': -1} for stage 0;"
    " its offloading is offload='cpu', on torch"
)
_NARROW = "use mixed_precision='bf16'"

# Arguments of Accelerator.
ARGUMENTS = {
    "deepspeed_plugin": _SHARD,
    "deepspeed_plugins": _SHARD,
    "megatron_lm_plugin": "use the mesh instead: Accelerator(mesh={'fsdp': -1, 'tensor': n}), and 'sequence' on an engine that has it;"
    " no engine has pipelines",
}


def refuse_argument(name: str) -> NoReturn:
    """Raises UnsupportedError for one of `ARGUMENTS`."""
    raise UnsupportedError(f"{name} is not supported: no engine here is of that kind", ARGUMENTS[name])


class _Absent:
    """A name that scripts import. Making one raises UnsupportedError, which says what to use instead."""

    _instead = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(f"{type(self).__name__} is not supported: no engine here is of that kind", self._instead)


class DeepSpeedPlugin(_Absent):
    """DeepSpeed. Instead: the mesh."""

    _instead = _SHARD


class DummyOptim(_Absent):
    """An optimizer that DeepSpeed's configuration stands for. Instead: the optimizer itself."""

    _instead = "prepare an optimizer of torch.optim"


class DummyScheduler(_Absent):
    """A schedule that DeepSpeed's configuration stands for. Instead: the schedule itself."""

    _instead = "prepare a scheduler of torch.optim.lr_scheduler"


class DeepSpeedSequenceParallelConfig(_Absent):
    """Ulysses. Instead: the mesh axis `sequence`."""

    _instead = "use Accelerator(mesh={'sequence': n}), or ParallelismConfig(sp_size=n), on an engine that has the axis"


class MegatronLMPlugin(_Absent):
    """Megatron-LM. Instead: the mesh."""

    _instead = ARGUMENTS["megatron_lm_plugin"]


class MegatronLMDummyScheduler(DummyScheduler):
    """A schedule that Megatron-LM's configuration stands for. Instead: the schedule itself."""


class FP8RecipeKwargs(_Absent):
    """fp8. Instead: bf16."""

    _instead = _NARROW


class AORecipeKwargs(FP8RecipeKwargs):
    """fp8 of torchao. Instead: bf16."""


class TERecipeKwargs(FP8RecipeKwargs):
    """fp8 of Transformer Engine. Instead: bf16."""


class MSAMPRecipeKwargs(FP8RecipeKwargs):
    """fp8 of MS-AMP. Instead: bf16."""

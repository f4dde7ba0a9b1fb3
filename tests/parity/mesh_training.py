"""Run on every engine and mesh by test_mesh_parity.py and mesh_parity.py: the GPT of examples/mesh_gpt.py, losses and bytes as JSON.

Nothing here names a mesh. The bytes are those that one device holds, and those that the core's plan of shardings says.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from polyaccel import Accelerator, set_seed
from polyaccel.sharding.plan import local_shape, plan_shardings

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from mesh_gpt import CONTEXT, GPT, next_byte_loss

BATCH, LAYERS, WIDTH, MAX_NORM = 8, 2, 64, 0.5


def batches(num_steps: int) -> TensorDataset:
    tokens = torch.randint(256, (num_steps * BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
    return TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def train(accelerator: Accelerator, form: str, num_steps: int) -> tuple[list[float], Any, Any]:
    """Losses of so many steps of the torch script, the model and the optimizer. form: "loss", "function" (of `backward`) or "fused"."""
    set_seed(0)
    model = GPT(layers=LAYERS, width=WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(batches(num_steps), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    fused = (
        accelerator.train_step(next_byte_loss, model, optimizer, max_grad_norm=MAX_NORM) if form == "fused" else None
    )
    losses = []
    for batch in loader:
        if fused is not None:
            losses.append(float(fused(batch)))
            continue
        if form == "loss":
            loss = next_byte_loss(model, batch)
            accelerator.backward(loss)
        else:
            loss = accelerator.backward(next_byte_loss, model, batch)
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")) if form == "loss" else float(loss))
    return losses, model, optimizer


def predicted_bytes(shapes: dict[str, tuple[int, ...]], sizes: dict[str, int], *, backend: str = "jax") -> int:
    """Of the float32 parameters that one device keeps, as the core's plan of shardings says.

    torch's FSDP2 cuts the piece of a vector that `tensor` has cut once more, over `fsdp`: the plan gives one axis to one dim.
    """
    total = 0
    for name, spec in plan_shardings(shapes, sizes).specs.items():
        is_cut_again = backend == "torch" and spec == ("tensor",)
        total += 4 * math.prod(local_shape(shapes[name], spec, sizes)) // (sizes["fsdp"] if is_cut_again else 1)
    return total


def held_bytes(accelerator: Accelerator, model: Any, optimizer: Any) -> tuple[int, int]:
    """(parameters, optimizer state without its counters) of one device of this process, as its engine holds them."""
    if accelerator.backend == "jax":
        from polyaccel_jax.handles import JaxModel, JaxOptimizer

        held = gc.get_objects()  # the handles are behind whatever the script's dialect prepared
        (handle,) = [one for one in held if type(one) is JaxModel]
        (rule,) = [one for one in held if type(one) is JaxOptimizer]
        return _on_first_device(handle.leaves), _on_first_device(leaf for leaf in rule.leaves if leaf.ndim)
    state = [value for slots in optimizer.state.values() for value in slots.values() if isinstance(value, torch.Tensor)]
    local = _xla_local if accelerator.backend == "xla" else _torch_local
    return sum(local(model.parameters())), sum(local(value for value in state if value.dim()))


def _on_first_device(arrays: Iterable[Any]) -> int:
    return sum(array.addressable_shards[0].data.nbytes for array in arrays)


def _torch_local(tensors: Iterable[Any]) -> Iterator[int]:
    for tensor in tensors:
        yield (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


def _xla_local(tensors: Iterable[Any]) -> Iterator[int]:
    from torch_xla.distributed.spmd import XLAShardedTensor, wrap_if_sharded

    for tensor in tensors:
        wrapped = wrap_if_sharded(tensor)
        is_cut = isinstance(wrapped, XLAShardedTensor)
        yield wrapped.local_shards[0].data.nbytes if is_cut else tensor.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--form", choices=["loss", "function", "fused", "flax"], default="function")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shapes = {name: tuple(parameter.shape) for name, parameter in GPT(layers=LAYERS, width=WIDTH).named_parameters()}
    accelerator = Accelerator(split_batches=True)
    if args.form == "flax":
        import mesh_flax

        set_seed(0)
        loader = DataLoader(batches(args.steps), batch_size=BATCH)
        found = mesh_flax.train(accelerator, lambda: GPT(layers=LAYERS, width=WIDTH), loader, MAX_NORM)
        losses, model, optimizer, shapes = found
    else:
        losses, model, optimizer = train(accelerator, args.form, args.steps)
    sizes = accelerator.plan.mesh.sizes
    parameters, state = held_bytes(accelerator, model, optimizer)
    report = {
        "mesh": sizes,
        "losses": losses,
        "whole": predicted_bytes(shapes, {}),
        "predicted": predicted_bytes(shapes, sizes, backend=accelerator.backend),
        "parameters": parameters,
        "state": state,
    }
    if accelerator.is_main_process:
        Path(args.output).write_text(json.dumps(report))
    accelerator.end_training()


if __name__ == "__main__":
    main()

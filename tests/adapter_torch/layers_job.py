"""Run in each process of a two-process gloo job by test_torch_layers.py: layers of known models on the axes tensor and fsdp, as JSON.

Nothing is judged here. Every function is called on both processes, in this order; without a job, alone, on one process.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from small_gpt import accelerator, gpt, loader, loss_fn, train
from torch import nn

from polyaccel import EMA, ShardingRule
from polyaccel.errors import PolyaccelError
from polyaccel.utils import FullyShardedDataParallelPlugin, GradScalerKwargs, InitProcessGroupKwargs

ALONE, FSDP, TENSOR = {"data": 1}, {"data": 1, "fsdp": 2}, {"data": 1, "tensor": 2}


def local_size(tensor):
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()


# -- models of transformers --------------------------------------------------------------------------------------------------


def llama(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **settings))


def tied_llama():
    return llama(tie_word_embeddings=True)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"bos_token_id": 1, "eos_token_id": 1}
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_embd=32,
            n_layer=1,
            n_head=4,
            n_positions=16,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            **ids,
        )
    )


def in_thread(function, *arguments):
    """Autograd differentiates on a thread of its own where there is a GPU; on the CPU on the one that asks."""
    with concurrent.futures.ThreadPoolExecutor(1) as fresh:
        fresh.submit(function, *arguments).result()


def language_model(mesh, make, call=lambda function, *arguments: function(*arguments)):
    """(losses, sizes of this process's pieces by parameter), and what greedy decoding says afterwards."""
    torch.manual_seed(0)
    run = accelerator(mesh=mesh)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model, optimizer = run.prepare(model, optimizer)
    tokens = torch.randint(64, (5, 4, 16), generator=torch.Generator().manual_seed(0))
    losses, norms = [], []
    for batch in tokens:
        loss = model(input_ids=batch, labels=batch).loss
        call(run.backward, loss)
        norms.append(float(run.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "losses": losses,
        "norms": norms,
        "parts": {name: local_size(p) / p.numel() for name, p in model.named_parameters()},
        "text": run.unwrap_model(model).generate(tokens[0, :2, :4], max_new_tokens=4, do_sample=False).tolist(),
    }


# -- rules of the script -----------------------------------------------------------------------------------------------------

OWN_NAMES = (
    ShardingRule("*.expand.weight", ("tensor", None)),
    ShardingRule("*.shrink.weight", (None, "tensor")),
    ShardingRule("*.shrink.bias", None),
)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.expand, self.shrink = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.mix = nn.Bilinear(8, 8, 8)

    def forward(self, x):
        x = x + self.shrink(nn.functional.gelu(self.expand(self.norm(x))))
        return self.mix(x, x)


def with_rules(mesh, rules, num_micro_batches=2):
    torch.manual_seed(0)
    run = accelerator(mesh=mesh, sharding_rules=rules, gradient_accumulation_steps=num_micro_batches)
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    data = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    model, optimizer, batches = run.prepare(model, optimizer, torch.utils.data.DataLoader(data, batch_size=4))
    losses = []
    for batch in batches:
        with run.accumulate(model):
            losses.append(float(run.backward(lambda model, x: model(x).square().mean(), model, batch)))
            if run.sync_gradients:
                run.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    return {
        "losses": losses,
        "parts": {name: local_size(p) / p.numel() for name, p in model.named_parameters()},
        "norm": float(sum(value.square().sum() for value in run.get_state_dict(model).values())),
    }


def refused(mesh, rule):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("polyaccel.sharding").addHandler(handler)
    try:
        accelerator(mesh=mesh, sharding_rules=[rule, *OWN_NAMES]).prepare(Mlp())
    except PolyaccelError as error:
        return [error.message]
    finally:
        logging.getLogger("polyaccel.sharding").removeHandler(handler)
    return said


# -- what is kept, and where ---------------------------------------------------------------------------------------------------


def kept_less(mesh, settings):
    """Losses of the GPT with dropout, and how often a layer inside a block ran in the first update."""
    run = accelerator(mesh=mesh, **settings)
    model = gpt(0)
    for block in model.blocks:
        block.mlp.register_module("dropout", nn.Dropout(0.2))
        block.mlp.fc2.register_forward_hook(lambda layer, args, output, drop=block.mlp.dropout: drop(output))
    names = list(model.state_dict())
    calls = []
    model.blocks[0].attention.q_proj.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model, optimizer, batches = run.prepare(model, optimizer, loader())
    torch.manual_seed(run.process_index)
    losses, norms = train(run, model, optimizer, batches, 3)
    assert list(run.unwrap_model(model).state_dict()) == names
    return {"losses": losses, "norms": norms, "calls": len(calls) / 3}


def offload_alone(mesh):
    try:
        accelerator(mesh=mesh, offload="cpu")
    except PolyaccelError as error:
        return error.message
    return None


# -- the rest of a training loop ----------------------------------------------------------------------------------------------


def with_average(mesh, other):
    """Losses of evaluations with averages of the parameters, which continue on another mesh from what was saved."""
    found = []
    folder = Path(sys.argv[1] if mesh is not ALONE else tempfile.mkdtemp()) / "average"
    for axes, seed in ((mesh, 0), (other if mesh is not ALONE else ALONE, 1)):
        run = accelerator(mesh=axes)
        model = gpt(seed)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        model, optimizer, batches = run.prepare(model, optimizer, loader())
        ema = EMA(model, decay=0.5)
        run.register_for_checkpointing(ema)
        if found:
            run.load_state(folder)
        for _ in range(2):
            train(run, model, optimizer, batches, 1)
            ema.update()
            before = float(loss_fn(model, next(iter(batches))).detach())
            with ema.applied(), torch.no_grad():
                found.append(float(run.gather(loss_fn(model, next(iter(batches)))).mean()))
            assert float(loss_fn(model, next(iter(batches))).detach()) == before
        run.save_state(folder, blocking=True)
    return found


def half(mesh, is_broken_on=None):
    """Losses under fp16, whose third update meets a gradient that is not finite on one process; scales; which updates were skipped."""
    scaling = GradScalerKwargs(init_scale=1024.0, growth_interval=2)
    run = accelerator(mesh=mesh, mixed_precision="fp16", kwargs_handlers=[scaling])
    model = gpt(0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model, optimizer, batches = run.prepare(model, optimizer, loader())
    losses, scales, skipped = [], [], []
    for number, batch in enumerate(batches):
        losses.append(float(run.backward(loss_fn, model, batch)))
        if number == 2 and is_broken_on in (None, run.process_index):
            grad = model.blocks[0].mlp.fc1.weight.grad
            (grad.to_local() if hasattr(grad, "to_local") else grad)[0, 0] = float("inf")
        if number % 2:
            run.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        skipped.append(run.optimizer_step_was_skipped)
        optimizer.zero_grad()
        scales.append(run.scaler.get_scale())
        if number == 5:
            break
    return {"losses": losses, "scales": scales, "skipped": skipped}


def dropped(mesh, how):
    """The gradient's norm after a micro batch whose gradients were dropped before their exchange."""
    run = accelerator(mesh=mesh)
    model = gpt(0)
    model, optimizer, batches = run.prepare(model, torch.optim.SGD(model.parameters(), 0.1), loader())
    first, second, *_ = batches
    if how is not None:
        with run.no_sync(model):
            run.backward(loss_fn, model, first)
        (optimizer if how == "optimizer" else model).zero_grad()
    run.backward(loss_fn, model, second)
    return float(run.clip_grad_norm_(model.parameters(), 1e9))


class PreciseBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.product = nn.LayerNorm(8, dtype=torch.float64), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.product(self.norm(x.double()).float())


class Precise(nn.Module):
    """Norms in float64, within blocks and beside them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([PreciseBlock() for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(8, dtype=torch.float64), nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.double()).float())


class Unnamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8, dtype=torch.float64))


def several_dtypes(mesh):
    """Losses and norms of a model whose norms are in another dtype; what was said of models that do not keep dtypes apart."""
    run = accelerator(mesh=mesh, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = Precise()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model, optimizer = run.prepare(model, optimizer)
    losses, norms = [], []
    for number in range(4):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(number)).chunk(run.num_data_shards)
        with run.accumulate(model):
            loss = model(x[run.process_index % len(x)]).square().mean()
            run.backward(loss)
            if run.sync_gradients:
                norms.append(float(run.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(run.gather(loss.detach()).mean()))
    said = []
    for refused in (Unnamed(), nn.Sequential(nn.Linear(8, 8), nn.ParameterList([torch.ones(2).double()]))):
        try:
            run.prepare(refused)
        except PolyaccelError as error:
            said.append(error.message)
    return {"losses": losses, "norms": norms, "said": said}


def timeouts(mesh):
    """Seconds that exchanges wait, of each group of the mesh."""
    waits = InitProcessGroupKwargs(timeout=timedelta(seconds=77))
    axes = accelerator(mesh=mesh, kwargs_handlers=[waits])._engine._sharding.mesh
    backends = [axes.group(axis)._get_backend(torch.device("cpu")) for axis in axes.sizes]
    return [backend.options._timeout.total_seconds() for backend in backends]


def created(mesh, make):
    """Whether the model had memory before prepare; the range of values of each parameter afterwards, and those of buffers."""
    run = accelerator(mesh=mesh)
    torch.manual_seed(run.process_index)
    model = run.create_model(make)
    is_empty = all(parameter.is_meta for parameter in model.parameters())
    try:
        model = run.prepare(model)
    except PolyaccelError as error:
        return error.message
    state = run.get_state_dict(model)
    ranges = {name: [float(value.min()), float(value.max())] for name, value in state.items()}
    return {"is_empty": is_empty, "ranges": ranges}


AXES, REMATS = (("fsdp", FSDP), ("tensor", TENSOR)), ("none", "full", "dots")
WHOLE = (ShardingRule("*.norm.*", None), ShardingRule("*.mix.weight", None))
QUESTIONS = {
    "llama": (language_model, TENSOR, llama),
    "llama in threads": (language_model, TENSOR, llama, in_thread),
    "tied llama": (language_model, TENSOR, tied_llama),
    "gpt2": (language_model, TENSOR, gpt2),
    "gpt2 on fsdp": (language_model, FSDP, gpt2),
    "rules": (with_rules, TENSOR, OWN_NAMES),
    "rules, whole": (with_rules, FSDP, WHOLE),
    **{f"{axis}, remat {remat}": (kept_less, mesh, {"remat": remat}) for axis, mesh in AXES for remat in REMATS},
    "offload": (kept_less, FSDP, {"fsdp_plugin": FullyShardedDataParallelPlugin(cpu_offload=True)}),
    "offload of tensor": (offload_alone, TENSOR),
    "average": (with_average, FSDP, TENSOR),
    "fp16": (half, TENSOR, 1),
    "fp16, fsdp": (half, FSDP, 0),
    "nothing dropped": (dropped, FSDP, None),
    "dropped by the optimizer": (dropped, FSDP, "optimizer"),
    "dropped by the model": (dropped, FSDP, "model"),
    "several dtypes": (several_dtypes, FSDP),
    "timeouts": (timeouts, TENSOR),
    "created": (created, FSDP, Mlp),
    "created on data": (created, {"data": 2}, Mlp),
    "created, of transformers": (created, FSDP, gpt2),
    "a rule for Bilinear": (refused, TENSOR, ShardingRule("*.mix.weight", ("tensor", None, None))),
    "a rule that does not divide": (refused, TENSOR, ShardingRule("*.norm.weight", ("tensor", None))),
    "no rule for Bilinear": (refused, TENSOR, ShardingRule("*.nothing", None)),
}


def main(folder: Path, only: str = "") -> None:
    torch.set_num_threads(1)
    answers = {}
    for name, (ask, *arguments) in QUESTIONS.items():
        if any(part in name for part in only.split(",")):
            answers[name] = ask(*arguments)
    (folder / f"{accelerator().process_index}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
